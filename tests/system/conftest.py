"""Nodes in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.seeds import SeedProcess

LOCAL = "/ip4/127.0.0.1/tcp/0"


StartSeed = Callable[..., SeedProcess]


@pytest.fixture
def start_seed() -> Iterator[StartSeed]:
    """Start seeds, `start_seed(home, "--bootstrap", addr)`, on 127.0.0.1; killed afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(home: Path, *args: str, listen: str = LOCAL) -> SeedProcess:
        process = subprocess.Popen(
            [sys.executable, "-m", "omnistore.cli.main", "seed", "--json", "--listen", listen, *args],
            env={**os.environ, "OMNI_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return SeedProcess(process, home)

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

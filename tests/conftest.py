"""Fixtures that every kind of test uses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of reference models beside the repository."""
    path = ROOT.parent / "shared"
    if not (path / "models").is_dir():
        pytest.skip(f"{path} is not here: it holds reference models that the repository does not carry")
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An `$OMNI_HOME` that does not exist yet."""
    return tmp_path / "home"


@pytest.fixture
def omni(home: Path) -> Run:
    """Run the command line in a process of its own: `omni("ls", "--json")`, `omni(…, home=other)`."""

    def run(*args: object, home: Path = home, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "omnistore.cli.main", *map(str, args)],
            env={**os.environ, "OMNI_HOME": str(home), **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run

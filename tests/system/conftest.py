"""Nodes in processes of their own."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

LOCAL = "/ip4/127.0.0.1/tcp/0"


@dataclass
class SeedProcess:
    """`omni seed --json`, its events read as they come."""

    process: subprocess.Popen[str]
    home: Path
    seen: list[dict[str, Any]] = field(default_factory=list)
    _lines: queue.Queue[str] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def event(self, name: str, timeout: float = 20, **fields: Any) -> dict[str, Any]:
        """The next event of this name and these fields; earlier ones count once only."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                line = self._lines.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {name} {fields} within {timeout} s, but {self.seen}") from None
            event: dict[str, Any] = json.loads(line)
            self.seen.append(event)
            if event["event"] == name and fields.items() <= event.items():
                return event

    @property
    def addr(self) -> str:
        """Where it listens, once it said so."""
        for event in self.seen:
            if event["event"] == "ready":
                return str(event["addrs"][0])
        return str(self.event("ready")["addrs"][0])

    @property
    def peer_id(self) -> str:
        return self.addr.rpartition("/")[2]

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout: float = 5) -> int:
        """Send a signal and wait; the exit code."""
        self.process.send_signal(how)
        return self.process.wait(timeout)


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

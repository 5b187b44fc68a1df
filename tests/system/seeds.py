"""A seed in a process of its own, and what it says."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class SeedProcess:
    """`omni seed --json`, its events read as they come."""

    process: subprocess.Popen[str]
    home: Path
    patience: float = 20
    """Seconds that an event may take."""
    seen: list[dict[str, Any]] = field(default_factory=list)
    _lines: queue.Queue[str] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def event(self, name: str, timeout: float | None = None, **fields: Any) -> dict[str, Any]:
        """The next event of this name and these fields; earlier ones count once only."""
        timeout = self.patience if timeout is None else timeout
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

    def told(self) -> list[dict[str, Any]]:
        """Every event so far."""
        while not self._lines.empty():
            self.seen.append(json.loads(self._lines.get()))
        return list(self.seen)

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

    def stop(self, how: signal.Signals = signal.SIGTERM, timeout: float = 10) -> int:
        """Send a signal and wait; the exit code."""
        self.process.send_signal(how)
        return self.process.wait(timeout)

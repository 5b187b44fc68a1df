"""The processes of a soak: seeds that are restarted on their home, peers that misbehave, commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

CLI: Final = (sys.executable, str(Path(__file__).resolve().parent / "watched.py"))
READY: Final = 180.0
"""Seconds for a node to listen, on a machine whose processors and disk do other work."""
COMMAND: Final = 300.0
"""Seconds for one command; the slowest fetches from seeds that are stopped."""
LAST_WORDS: Final = 3.0
"""Seconds for a stuck process to write where it is."""
TAIL: Final = 200_000
"""Characters kept of what a command that failed said."""


def environ(home: Path) -> dict[str, str]:
    return {**os.environ, "OMNI_HOME": str(home)}


@dataclass
class Node:
    """A process that prints where it listens as JSON, then events; its log in a file that is kept."""

    name: str
    command: Sequence[str]
    home: Path
    logs: Path
    role: str
    starts: int = 0
    process: trio.Process | None = None
    addr: str = ""
    stopping: bool = False
    """Whether its end is ours."""

    @property
    def peer_id(self) -> str:
        return self.addr.rpartition("/")[2]

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def log(self) -> Path:
        return self.logs / f"{self.name}.log"

    @property
    def events_file(self) -> Path:
        return self.logs / f"{self.name}.events"

    async def start(self) -> None:
        """Start it, again on the same home after it was killed; until it listens."""
        self.stopping = False
        self.starts += 1
        seen = self.events_file.stat().st_size if self.events_file.exists() else 0
        with self.log.open("ab") as log, self.events_file.open("ab") as events:
            self.process = await trio.lowlevel.open_process(
                list(self.command), env=environ(self.home), stdin=subprocess.PIPE, stdout=events, stderr=log
            )
        with trio.move_on_after(READY):
            while True:
                for event in self.events(seen):
                    if "addrs" in event:
                        self.addr = str(event["addrs"][0])
                        return
                await trio.sleep(0.2)
        await self.tell_where()
        raise RuntimeError(f"{self.name} was not ready after {READY:.0f} s; {self.log} says where it was")

    def events(self, start: int = 0) -> list[dict[str, Any]]:
        """Whole lines from byte `start` on."""
        with self.events_file.open("rb") as file:
            file.seek(start)
            lines = file.read().split(b"\n")[:-1]
        # A node killed in the middle of a line leaves half of one.
        return [event for line in lines if (event := _parsed(line)) is not None]

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def tell_where(self) -> None:
        """Have one that is stuck write to its log where it is."""
        if tuple(self.command[: len(CLI)]) == CLI:
            self.signal(signal.SIGUSR1)
            await trio.sleep(LAST_WORDS)

    async def kill(self) -> None:
        """As a power cut would."""
        self.stopping = True
        self.signal(signal.SIGKILL)
        assert self.process is not None
        await self.process.wait()

    async def stop(self) -> int:
        """In good order; the exit code."""
        self.stopping = True
        assert self.process is not None
        self.signal(signal.SIGTERM)
        with trio.move_on_after(15):
            return await self.process.wait()
        await self.tell_where()
        self.process.kill()
        await self.process.wait()
        return -1


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(line)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


@dataclass
class Result:
    """What a command did."""

    args: Sequence[object]
    code: int
    out: str
    err: str
    last: Mapping[str, Any] = field(default_factory=dict)
    """The last JSON document that it printed."""

    def keep(self, path: Path) -> None:
        """Write what it said to `path`, with where it was if it was stuck."""
        head = f"{self.args}\nexit code {self.code}\n"
        said = f"{head}--- stdout\n{self.out[-TAIL:]}\n--- stderr\n{self.err[-TAIL:]}\n"
        path.write_text(said, encoding="utf-8", errors="replace")


async def omni(home: Path, *args: object, kill_after: float | None = None) -> Result:
    """One command, killed after so many seconds if asked; 124 when it takes longer than any should."""
    process = await trio.lowlevel.open_process(
        [*CLI, *map(str, args)],
        env={**environ(home), "SOAK_USAGE": str(home.parent / "usage")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    parts: dict[str, bytes] = {}

    async def drain(name: str, stream: Any) -> None:
        found = bytearray()
        async for data in stream:
            found += data
        parts[name] = bytes(found)

    limit = COMMAND if kill_after is None else kill_after
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain, "out", process.stdout)
            nursery.start_soon(drain, "err", process.stderr)
            with trio.move_on_after(limit) as scope:
                await process.wait()
            if scope.cancelled_caught:
                if kill_after is None:
                    process.send_signal(signal.SIGUSR1)
                    await trio.sleep(LAST_WORDS)
                process.kill()
                await process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
    out = parts.get("out", b"").decode()
    documents = [event for line in out.splitlines() if (event := _parsed(line.encode())) is not None]
    code = 124 if scope.cancelled_caught else process.returncode
    assert code is not None
    return Result(args, code, out, parts.get("err", b"").decode(), documents[-1] if documents else {})

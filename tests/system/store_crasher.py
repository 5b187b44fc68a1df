"""Runs store operations in forked children that kill themselves at a chosen line of the store's code.

A program of its own, single-threaded, so that forking is safe and a child costs milliseconds. Reads one
JSON command a line: {"job", "home", "source", "acks", "die_at"}; answers {"killed", "lines", "error"}.
What a job has acknowledged it appends to the file `acks`, one JSON list a line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from omnistore.config import Config
from omnistore.store.files import FileStore
from omnistore.store.publish import publish
from omnistore.store.sweep import sweep
from omnistore.testing.store_contract import PUBLISHER, begin, sample_of

BATCH = 3
"""Blocks per write of a pin."""


class Countdown:
    """Counts lines of the store's code and kills the process at one of them."""

    def __init__(self, die_at: int | None) -> None:
        self.lines = 0
        self._die_at = die_at

    def trace(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if "/omnistore/store/" not in frame.f_code.co_filename:
            return None
        self._count()
        return self._line

    def _line(self, _frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "line":
            self._count()
        return self._line

    def _count(self) -> None:
        self.lines += 1
        if self.lines == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def work(job: str, home: Path, source: Path, acks: int) -> None:
    def acknowledge(*words: object) -> None:
        os.write(acks, json.dumps(words).encode() + b"\n")

    store = FileStore(Config(home, copy_batch=1 << 16))
    try:
        if job in ("add", "copy"):
            published = publish(store, source, PUBLISHER, copy=job == "copy")
            acknowledge("added", str(published.cid))
        elif job == "gc":
            sweep(store, now=time.time() + 1e6)
            acknowledge("swept")
        else:
            made = sample_of([source])
            assembly = begin(store, made)
            missing = {place.cid for place in assembly.missing()}
            blocks = [block for block in made.blocks() if block.cid in missing]
            acknowledge("asked", *(str(block.cid) for block in blocks))
            for start in range(0, len(blocks), BATCH):
                some = blocks[start : start + BATCH]
                assembly.write(some)
                acknowledge("wrote", *(str(block.cid) for block in some))
            assembly.finish()
            acknowledge("added", str(made.signed.cid))
            assembly.close()
    finally:
        store.close()


def child(command: dict[str, Any], answer: int) -> None:
    countdown = Countdown(command["die_at"])
    acks = os.open(command["acks"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    error = None
    sys.settrace(countdown.trace)
    try:
        work(command["job"], Path(command["home"]), Path(command["source"]), acks)
    except BaseException:  # noqa: BLE001  a forked child reports everything and never returns
        error = traceback.format_exc()
    sys.settrace(None)
    os.write(answer, json.dumps({"killed": False, "lines": countdown.lines, "error": error}).encode())
    os._exit(0)


def main() -> None:
    for line in sys.stdin:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            child(json.loads(line), writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as answer:
            text = answer.read().decode() or json.dumps({"killed": True, "lines": None, "error": None})
        os.waitpid(pid, 0)
        print(text, flush=True)


if __name__ == "__main__":
    main()

"""A stock js-libp2p node in a process of its own, told what to do (tests/interop/peer.mjs). Not a test."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

INTEROP = Path(__file__).resolve().parent.parent / "interop"
NODES = sorted(INTEROP.glob("node_modules/node-*/bin/node"))

needs_js = pytest.mark.skipif(
    not NODES or not (INTEROP / "node_modules" / "libp2p").is_dir(),
    reason="js-libp2p and Node 22 are not installed: run `make interop-js`",
)


@dataclass(frozen=True)
class JsPeer:
    process: subprocess.Popen[str]
    peer: str
    addrs: list[str]

    async def do(self, command: str, *args: object) -> Any:
        """Have it do something; what came of it. Raises `AssertionError` with its stack trace."""
        return await trio.to_thread.run_sync(self.do_now, command, *args, abandon_on_cancel=True)

    def do_now(self, command: str, *args: object) -> Any:
        """The same, for a test without a loop."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *args]) + "\n")
        self.process.stdin.flush()
        return _value(self.process)


@contextmanager
def js_peer(*listen: str, inside: Sequence[str] = ()) -> Iterator[JsPeer]:
    """Run one, at 127.0.0.1 unless told otherwise; `inside`: a command to run it with."""
    with subprocess.Popen(
        [*inside, NODES[0], INTEROP / "peer.mjs", *listen],
        env={**os.environ, "NODE_NO_WARNINGS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            ready = _value(process)
            yield JsPeer(process, ready["peer"], ready["addrs"])
        finally:
            process.kill()


def _value(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    answer = json.loads(process.stdout.readline() or '{"error": "the process ended"}')
    assert "error" not in answer, answer["error"]
    return answer["value"]

"""A fetch on a real terminal draws bars; anywhere else it says lines, or JSON."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path
from typing import TYPE_CHECKING

from omnistore.testing.tiny_gguf import split_set, tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.system.conftest import StartSeed

    Run = Callable[..., subprocess.CompletedProcess[str]]

PIN = [sys.executable, "-m", "omnistore.cli.main", "pin"]


def on_a_terminal(words: list[str], home: Path) -> str:
    """What a command draws on a terminal of 140 columns, as a person would see it pass by."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    process = subprocess.Popen(
        words, env={**os.environ, "OMNI_HOME": str(home), "TERM": "xterm-256color", "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen, deadline = bytearray(), time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 1)[0]:
                continue
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # Linux says so where the other end was closed.
                break
            if not data:
                break
            seen += data
        assert process.wait(10) == 0, bytes(seen)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())


def test_bars_for_files_and_peers_with_rate_and_time_left(
    tmp_path: Path, omni: Run, start_seed: StartSeed
) -> None:
    publisher = tmp_path / "publisher"
    for name, data in split_set(tiny_model(6, width=128), "m", [20]).items():
        (tmp_path / name).write_bytes(data)
    cid = omni("add", tmp_path / "m-00001-of-00002.gguf", home=publisher).stdout.strip()
    seed = start_seed(publisher, "--no-mdns")
    slowly = ["--peer", seed.addr, "--no-mdns", "--down-limit", "1MB/s"]
    drawn = on_a_terminal([*PIN, cid, *slowly], tmp_path / "a")
    assert "m from 1 peer" in drawn and f"…{seed.peer_id[-12:]}" in drawn
    assert "m-00001-of-00002.gguf" in drawn or "m-00002-of-00002.gguf" in drawn
    assert "━" in drawn and re.search(r"\d+(\.\d+)?/\d+(\.\d+)? [kM]B", drawn)
    assert re.search(r"\d [kM]B/s", drawn) and re.search(r"\d:\d\d:\d\d", drawn)
    # Not on a terminal: lines, or events and nothing else.
    plain = omni("pin", cid, *slowly, home=tmp_path / "b")
    assert plain.returncode == 0 and "\x1b" not in plain.stderr and "━" not in plain.stderr
    told = omni("pin", cid, *slowly, "--json", home=tmp_path / "c")
    events = [json.loads(line) for line in told.stdout.splitlines()]
    assert {event["event"] for event in events} == {"progress", "done"} and "━" not in told.stderr

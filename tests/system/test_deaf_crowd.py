"""A crowd that takes up all that a seed has for requesters: who comes to fetch is served."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bench.make_gguf import make_gguf
from tests.conftest import Run
from tests.system.conftest import StartSeed

DEAF = Path(__file__).resolve().parent.parent / "soak" / "deaf.py"
Beset = Callable[[str, Path, str, int, str], subprocess.Popen[str]]


@pytest.fixture
def beset() -> Iterator[Beset]:
    """Have a crowd come, wait until all are there; gone afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(addr: str, home: Path, cid: str, peers: int, kind: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(DEAF), addr, str(home), cid, str(peers), kind]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "beset":
                return process
        raise AssertionError("the crowd did not come")

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.mark.parametrize(
    ("kind", "peers", "wait"),
    [
        # 64 streams that ask and never read, on memory for 64 blocks of theirs.
        ("never-reads", 16, 4.0),
        # 256 streams that say nothing, on places for 256.
        pytest.param("mute", 64, 11.0, marks=pytest.mark.slow),
    ],
)
def test_a_seed_that_is_beset_serves_who_comes_to_fetch(
    omni: Run, start_seed: StartSeed, beset: Beset, tmp_path: Path, kind: str, peers: int, wait: float
) -> None:
    file, home = tmp_path / "model.gguf", tmp_path / "seed"
    make_gguf(file, 24 << 20, layers=4, seed=0)
    added = omni("add", file, "--json", home=home)
    cid = str(json.loads(added.stdout.splitlines()[-1])["cid"])
    seed = start_seed(home, "--no-mdns")
    beset(seed.addr, home, cid, peers, kind)
    time.sleep(wait)
    pinned = omni("pin", cid, "--json", "--no-mdns", "--peer", seed.addr, home=tmp_path / "mine")
    assert pinned.returncode == 0, pinned.stderr
    done = json.loads(pinned.stdout.splitlines()[-1])
    assert done["bytes_fetched"] > 23 << 20
    assert Path(done["path"]).read_bytes() == file.read_bytes()

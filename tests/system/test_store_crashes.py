"""SIGKILL at any line of add, pin and gc: nothing acknowledged is lost, nothing unverified is visible."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omnistore.cid import CID
from omnistore.config import Config
from omnistore.store.files import FileStore, read_location
from omnistore.store.index import Location
from omnistore.testing.store_contract import Sample, sample, sample_of
from omnistore.testing.tiny_gguf import TinyGGUF, TinyTensor, pseudo_random, tiny_model

Line = list[str]


class Crasher:
    """The program beside this file, kept running."""

    def __init__(self, directory: Path) -> None:
        self._acks = directory / "acks"
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("store_crasher.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, job: str, home: Path, source: Path, die_at: int | None = None) -> dict[str, Any]:
        """Run a job, killed at the `die_at`-th line of the store's code if it gets there."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        command = {
            "job": job,
            "home": str(home),
            "source": str(source),
            "acks": str(self._acks),
            "die_at": die_at,
        }
        print(json.dumps(command), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert answer["error"] is None, answer["error"]
        return answer

    def acknowledged(self) -> list[Line]:
        """What jobs acknowledged since the last call."""
        if not self._acks.exists():
            return []
        lines = [json.loads(line) for line in self._acks.read_text().splitlines()]
        self._acks.unlink()
        return lines

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture
def crasher(tmp_path: Path) -> Iterator[Crasher]:
    crasher = Crasher(tmp_path)
    yield crasher
    crasher.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    sample(tmp_path, tiny_model(layers=2))
    return tmp_path / "tiny.gguf"


def check_all_readable(home: Path) -> None:
    """Whatever the index names is on disk and matches its digest."""
    store = FileStore(Config(home))
    for _, file in store.index.files():
        assert not file.lost
        for offset, length, digest in store.index.contents(file.id):
            cid = CID.of_digest(0x55, digest)
            assert read_location(Location(file, offset, length), cid).cid == cid
    store.close()


def check_whole(home: Path, made: Sample) -> None:
    store = FileStore(Config(home))
    status = store.status(made.bare.cid)
    assert status.whole
    assert status.pinned == made.keys
    assert [path.read_bytes() for path in status.files] == list(made.files.values())
    store.close()


def check_tidy(home: Path) -> None:
    """Under the home there is no file that the index does not name."""
    store = FileStore(Config(home))
    named = {file.where for _, file in store.index.files() if file.owned}
    assert {path for path in store.models_directory.rglob("*") if path.is_file()} == named
    store.close()


def crash_adds(crasher: Crasher, job: str, tmp_path: Path, source: Path, seed: int, count: int) -> None:
    rng = random.Random(seed)
    made = sample_of([source])
    total = crasher.run(job, tmp_path / "measure", source)["lines"]
    crasher.acknowledged()
    died = 0
    home = tmp_path / "home"
    for number in range(count):
        if number % 4 == 0:
            # A new home now and then: its making can be interrupted too.
            home = tmp_path / f"home{number}"
        died += crasher.run(job, home, source, rng.randrange(1, total + 1))["killed"]
        check_all_readable(home)
        if ["added", str(made.signed.cid)] in crasher.acknowledged():
            check_whole(home, made)
        if number % 4 == 3:
            crasher.run(job, home, source)
            check_whole(home, made)
            crasher.run("gc", home, source)
            check_whole(home, made)
            if job == "copy":
                check_tidy(home)
            crasher.acknowledged()
    assert died >= count * 3 // 4


def crash_pins(crasher: Crasher, tmp_path: Path, source: Path, seed: int, count: int) -> None:
    rng = random.Random(seed)
    made = sample_of([source])
    total = crasher.run("pin", tmp_path / "measure", source)["lines"]
    crasher.acknowledged()
    home, written, died = tmp_path / "home", set[str](), 0
    for number in range(count):
        died += crasher.run("pin", home, source, rng.randrange(1, total + 1))["killed"]
        check_all_readable(home)
        for verb, *words in crasher.acknowledged():
            if verb == "asked":
                assert written.isdisjoint(words), "a finished block was asked for again"
            elif verb == "wrote":
                written.update(words)
            else:
                check_whole(home, made)
        store = FileStore(Config(home))
        assert all(store.has(CID.parse_untrusted(text)) for text in written)
        store.close()
        if number % 6 == 5:
            crasher.run("pin", home, source)
            check_whole(home, made)
            crasher.acknowledged()
            home, written = tmp_path / f"home{number}", set()
    assert died >= count // 2


def crash_sweeps(crasher: Crasher, tmp_path: Path, source: Path, seed: int, count: int) -> None:
    rng = random.Random(seed)
    kept = sample_of([source])
    (tmp_path / "other").mkdir()
    unpinned = sample(tmp_path / "other", tiny_model(layers=1, seed="other"))
    total = died = 0
    for number in range(count + 1):
        home = tmp_path / f"home{number}"
        crasher.run("pin", home, source)
        crasher.run("pin", home, tmp_path / "other" / "tiny.gguf")
        store = FileStore(Config(home))
        store.unpin(unpinned.signed.cid)
        store.close()
        # The first is left alone, to learn how long a sweep is.
        first = crasher.run("gc", home, source, rng.randrange(1, total + 1) if total else None)
        total = total or first["lines"]
        died += first["killed"]
        check_all_readable(home)
        check_whole(home, kept)
        crasher.run("gc", home, source)
        check_whole(home, kept)
        check_tidy(home)
        store = FileStore(Config(home))
        assert [status.model.cid for status in store.models()] == [kept.signed.cid]
        store.close()
    assert died >= count * 3 // 4


@pytest.mark.parametrize("job", ["add", "copy"])
def test_adding(crasher: Crasher, job: str, tmp_path: Path, source: Path) -> None:
    crash_adds(crasher, job, tmp_path, source, seed=1, count=12)


def test_pinning(crasher: Crasher, tmp_path: Path, source: Path) -> None:
    crash_pins(crasher, tmp_path, source, seed=2, count=18)


def test_sweeping(crasher: Crasher, tmp_path: Path, source: Path) -> None:
    crash_sweeps(crasher, tmp_path, source, seed=3, count=8)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(10, 14))
def test_everything_many_times(crasher: Crasher, tmp_path: Path, source: Path, seed: int) -> None:
    for job in ("add", "copy"):
        (tmp_path / job).mkdir()
        crash_adds(crasher, job, tmp_path / job, source, seed, count=60)
    for name, crash in (("pin", crash_pins), ("gc", crash_sweeps)):
        (tmp_path / name).mkdir()
        crash(crasher, tmp_path / name, source, seed, count=60)


def test_the_command_killed_from_outside(tmp_path: Path) -> None:
    """A real `omni add --copy`, killed by the clock: also inside the kernel and SQLite."""
    rng = random.Random(4)
    tensors = [
        TinyTensor(f"blk.{n}.ffn_up.weight", "F32", (1024, 512), pseudo_random(f"{n}", 1 << 21))
        for n in range(16)
    ]
    metadata = [("general.architecture", "llama"), ("llama.block_count", 16)]
    made = sample(tmp_path, TinyGGUF(tensors, metadata), "large.gguf")
    home = tmp_path / "home"
    command = [sys.executable, "-m", "omnistore.cli.main", "add", "--copy", str(tmp_path / "large.gguf")]
    environ = {**os.environ, "OMNI_HOME": str(home)}
    died = 0
    for _ in range(8):
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0.05, 0.3))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            died += 1
        told, _ = process.communicate()
        check_all_readable(home)
        if told:
            check_whole(home, made)
    assert died
    assert subprocess.run(command, env=environ, capture_output=True, check=False).returncode == 0
    check_whole(home, made)

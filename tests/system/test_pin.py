"""`omni pin` between processes over real sockets: seeders that die, stall and lie; a pin that is killed."""

from __future__ import annotations

import filecmp
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from omnistore.cid import CID
from omnistore.config import Config
from omnistore.errors import BlockMissing
from omnistore.manifest import PartKey
from omnistore.store.files import FileStore
from omnistore.testing.tiny_gguf import TinyGGUF, TinyTensor

if TYPE_CHECKING:
    from tests.system.conftest import StartSeed

MIB = 1 << 20
LAYERS, LAYER = 12, 8 * MIB
Run = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Published:
    """A model of 100 MB in a home of its own."""

    file: Path
    home: Path
    cid: str
    size: int


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    root = tmp_path_factory.mktemp("published")
    names = ["token_embd.weight", *(f"blk.{n}.ffn_up.weight" for n in range(LAYERS)), "output.weight"]
    tensors = [TinyTensor(name, shape=(2048, LAYER // 8192)) for name in names]
    tensors.append(TinyTensor("rope_freqs.weight", shape=(100_000,)))
    metadata = {"general.architecture": "llama", "general.name": "twelve", "llama.block_count": LAYERS}
    file = root / "twelve.gguf"
    file.write_bytes(TinyGGUF(tensors, metadata).build())
    added = subprocess.run(
        [sys.executable, "-m", "omnistore.cli.main", "add", str(file)],
        env={**os.environ, "OMNI_HOME": str(root / "home")},
        capture_output=True,
        text=True,
        check=True,
    )
    return Published(file, root / "home", added.stdout.split()[-1], file.stat().st_size)


@pytest.fixture
def second(published: Published, tmp_path: Path, omni: Run) -> Path:
    """Another seeder's home with the same model: the same publisher, or its CID would differ."""
    home = tmp_path / "second"
    home.mkdir(mode=0o700)
    key = published.home / "identity.key"
    (home / "identity.key").write_bytes(key.read_bytes())
    (home / "identity.key").chmod(0o600)
    assert omni("add", published.file, home=home).stdout.split()[-1] == published.cid
    (home / "identity.key").unlink()
    return home


@dataclass
class Pinning:
    """`omni pin --json` under way."""

    process: subprocess.Popen[str]

    def lines(self) -> Iterator[dict[str, Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)

    def until_fetching(self) -> None:
        """Return when some bytes of the model have arrived."""
        for line in self.lines():
            if line["event"] == "progress" and line["bytes_fetched"] > MIB:
                return
        raise AssertionError("it ended before it could be disturbed")

    def done(self) -> dict[str, Any]:
        """The last event, which must be `done`."""
        *_, last = self.lines()
        assert last["event"] == "done", last
        assert self.process.wait(10) == 0
        return last


@pytest.fixture
def pin(home: Path) -> Iterator[Callable[..., Pinning]]:
    """Start `omni pin CID … --json`; killed afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(cid: str, *args: str, home: Path = home) -> Pinning:
        process = subprocess.Popen(
            [sys.executable, "-m", "omnistore.cli.main", "pin", cid, "--json", *args],
            env={**os.environ, "OMNI_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return Pinning(process)

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def peers(*addrs: str) -> list[str]:
    return [word for addr in addrs for word in ("--peer", addr)]


def check_whole(done: dict[str, Any], published: Published) -> None:
    assert filecmp.cmp(done["path"], published.file, shallow=False)
    assert done["bytes_fetched"] == sum(done["peers"].values())


def held(home: Path, cid: str) -> int:
    """Bytes of the model's blocks that a home holds, by its index."""
    store = FileStore(Config(home))
    try:
        return store.status(CID.parse_untrusted(cid)).bytes_held
    except BlockMissing:
        return 0
    finally:
        store.close()


def payload(published: Published, *parts: PartKey) -> int:
    """Bytes of the blocks of some parts, or all."""
    store = FileStore(Config(published.home))
    model = store.model(CID.parse_untrusted(published.cid))
    store.close()
    return sum(ref.size for ref in model.manifest.parts if not parts or ref.key in parts)


def test_by_address_then_again_without_a_network(
    start_seed: StartSeed, published: Published, omni: Run, tmp_path: Path
) -> None:
    seed = start_seed(published.home)
    first = omni("pin", published.cid, "--peer", seed.addr, "--output", tmp_path / "here.gguf")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == str(tmp_path / "here.gguf")
    assert filecmp.cmp(tmp_path / "here.gguf", published.file, shallow=False)
    seed.stop(signal.SIGKILL)
    again = json.loads(omni("pin", published.cid, "--json").stdout)
    assert again["event"] == "done"
    assert (again["bytes_fetched"], again["blocks_fetched"], again["peers"]) == (0, 0, {})
    assert again["blocks_local"] > 100
    assert filecmp.cmp(again["path"], published.file, shallow=False)


def test_from_two_seeders_found_through_a_third_node(
    start_seed: StartSeed, published: Published, second: Path, pin: Callable[..., Pinning], tmp_path: Path
) -> None:
    third = start_seed(tmp_path / "third")
    seeds = [start_seed(home, "--bootstrap", third.addr) for home in (published.home, second)]
    for seed in seeds:
        seed.event("provided", cid=published.cid)
    done = pin(published.cid, "--bootstrap", third.addr).done()
    check_whole(done, published)
    assert done["bytes_fetched"] == payload(published)
    assert set(done["peers"]) == {seed.peer_id for seed in seeds}
    assert min(done["peers"].values()) > done["bytes_fetched"] * 0.1
    assert done["dropped"] == {}


def test_only_some_layers_then_the_rest(
    start_seed: StartSeed, published: Published, pin: Callable[..., Pinning]
) -> None:
    seed = start_seed(published.home)
    some = [PartKey("header"), PartKey("shared"), *(PartKey("layer", n) for n in range(3, 6))]
    done = pin(published.cid, "--layers", "3-5", *peers(seed.addr)).done()
    assert done["bytes_fetched"] == payload(published, *some)
    assert done["path"].endswith(".part")
    done = pin(published.cid, *peers(seed.addr)).done()
    assert done["bytes_fetched"] == payload(published) - payload(published, *some)
    assert filecmp.cmp(done["path"], published.file, shallow=False)


def test_a_seeder_killed_in_mid_fetch(
    start_seed: StartSeed, published: Published, second: Path, pin: Callable[..., Pinning]
) -> None:
    doomed, steady = start_seed(published.home), start_seed(second)
    pinning = pin(published.cid, *peers(doomed.addr, steady.addr))
    pinning.until_fetching()
    doomed.stop(signal.SIGKILL)
    check_whole(pinning.done(), published)


def test_a_seeder_stopped_in_mid_fetch(
    start_seed: StartSeed, published: Published, second: Path, pin: Callable[..., Pinning]
) -> None:
    stopped, steady = start_seed(published.home), start_seed(second)
    pinning = pin(published.cid, *peers(stopped.addr, steady.addr))
    pinning.until_fetching()
    stopped.process.send_signal(signal.SIGSTOP)
    done = pinning.done()
    check_whole(done, published)
    assert done["peers"][steady.peer_id] > 0


@pytest.mark.parametrize("fault", ["lies", "wrong-length", "garbage"])
def test_a_faulty_seeder_is_dropped_and_named(
    start_seed: StartSeed, published: Published, second: Path, pin: Callable[..., Pinning], fault: str
) -> None:
    faulty = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("faulty_seed.py")), str(published.home), fault],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert faulty.stdout is not None
        told = json.loads(faulty.stdout.readline())
        steady = start_seed(second)
        done = pin(published.cid, *peers(told["addrs"][0], steady.addr)).done()
    finally:
        faulty.kill()
        faulty.communicate()
    check_whole(done, published)
    assert list(done["dropped"]) == [told["peer_id"]]
    assert done["peers"][told["peer_id"]] <= 3 * MIB


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 20))])
def test_a_pin_killed_at_any_moment_resumes_by_block(
    start_seed: StartSeed, published: Published, pin: Callable[..., Pinning], home: Path, seed: int
) -> None:
    node = start_seed(published.home)
    rng = random.Random(seed)
    fetched = []
    for _ in range(3):
        pinning = pin(published.cid, *peers(node.addr))
        try:
            pinning.process.wait(rng.uniform(0.5, 2.0))
        except subprocess.TimeoutExpired:
            pinning.process.kill()
            pinning.process.wait()
        fetched.append(held(home, published.cid))
    assert fetched == sorted(fetched)
    done = pin(published.cid, *peers(node.addr)).done()
    assert done["bytes_fetched"] == payload(published) - fetched[-1]
    assert filecmp.cmp(done["path"], published.file, shallow=False)


def test_what_goes_wrong_is_said(
    start_seed: StartSeed, published: Published, omni: Run, tmp_path: Path
) -> None:
    alone = omni("pin", published.cid, "--no-mdns")
    assert alone.returncode == 2
    assert "--peer" in alone.stderr
    assert "--bootstrap" in alone.stderr
    nonsense = omni("pin", "QmNonsense", "--peer", "/ip4/127.0.0.1/tcp/1/p2p/x")
    assert nonsense.returncode == 2
    nobody = omni("pin", published.cid, "--peer", "/ip4/127.0.0.1/tcp/1")
    assert nobody.returncode == 2
    empty = start_seed(tmp_path / "empty")
    gone = empty.addr
    empty.stop()
    missing = omni("pin", published.cid, "--peer", gone)
    assert missing.returncode == 10
    assert gone.rpartition("/")[2] in missing.stderr


@pytest.mark.parametrize("name", ["stories260K-F32.gguf", "stories260K-F16.gguf"])
def test_a_reference_model(
    start_seed: StartSeed, shared: Path, pin: Callable[..., Pinning], omni: Run, tmp_path: Path, name: str
) -> None:
    file = shared / "models" / name
    added = omni("add", file, home=tmp_path / "seed")
    seed = start_seed(tmp_path / "seed")
    done = pin(added.stdout.split()[-1], *peers(seed.addr)).done()
    assert filecmp.cmp(done["path"], file, shallow=False)

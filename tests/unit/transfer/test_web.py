"""Web servers as sources of a fetch, over real sockets: each thing one can do wrong."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from omnistore.cid import CID
from omnistore.errors import NoProviders
from omnistore.keys import PrivateKey
from omnistore.store.memory import MemoryStore
from omnistore.testing.seeding import seeded
from omnistore.testing.tiny_gguf import TinyGGUF, TinyTensor
from omnistore.transfer.client import FetchOptions, FetchReport, Offline, fetch_model
from omnistore.transfer.web import CONNECTIONS
from tests.unit.transfer.web_server import FAULTS, serving

MIB = 1 << 20
KEY = PrivateKey(bytes(32))
Model = tuple[Path, MemoryStore, CID]


def build(path: Path) -> None:
    tensors = [TinyTensor(f"blk.{n}.ffn_up.weight", shape=(2048, 2 * MIB // 8192)) for n in range(6)]
    tensors.append(TinyTensor("token_embd.weight", shape=(1001, 300)))
    tensors.append(TinyTensor("output.weight", shape=(77,)))
    metadata = {"general.architecture": "llama", "general.name": "six", "llama.block_count": 6}
    path.write_bytes(TinyGGUF(tensors, metadata).build())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of 13 MB, described and not held by anybody: the store has its nodes only."""
    path = tmp_path_factory.mktemp("web") / "six.gguf"
    build(path)
    return path, *seeded(path, KEY)


def nodes_of(seed: MemoryStore, cid: CID) -> MemoryStore:
    """A store that knows what the model is, and holds none of it."""
    mine, found = MemoryStore(), seed.model(cid)
    for node in {cid, found.manifest_cid, *(ref.cid for ref in found.manifest.parts)}:
        mine.put_node(seed.read(node))
    return mine


def fetch(mine: MemoryStore, cid: CID, output: Path, *urls: str, gateways: Sequence[str] = ()) -> FetchReport:
    async def main() -> FetchReport:
        with trio.fail_after(60):
            options = FetchOptions(mirrors=urls, gateways=gateways, output=output)
            return await fetch_model(Offline(), None, mine, cid, options)

    return trio.run(main)


def test_a_web_server_alone_is_enough_once_the_nodes_are_here(model: Model, tmp_path: Path) -> None:
    path, seed, cid = model
    with serving(path.parent) as web:
        url = f"{web.url}/{path.name}"
        report = fetch(nodes_of(seed, cid), cid, tmp_path / "out.gguf", url)
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()
    assert report.peers == {url: report.bytes_fetched} and not report.dropped
    assert web.sent < path.stat().st_size + MIB // 4
    # One for the probe, and those that are kept for the rest.
    assert web.connections <= 1 + CONNECTIONS < len(web.requests)


def test_two_servers_share_the_work(model: Model, tmp_path: Path) -> None:
    path, seed, cid = model
    with serving(path.parent) as one, serving(path.parent) as two:
        urls = [f"{web.url}/{path.name}" for web in (one, two)]
        report = fetch(nodes_of(seed, cid), cid, tmp_path / "out.gguf", *urls)
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()
    assert set(report.peers) == set(urls)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_server_is_dropped_and_named(model: Model, tmp_path: Path, fault: str) -> None:
    path, seed, cid = model
    with serving(path.parent, fault) as bad, serving(path.parent) as good:
        urls = [f"{web.url}/{path.name}" for web in (bad, good)]
        report = fetch(nodes_of(seed, cid), cid, tmp_path / "out.gguf", *urls)
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()
    assert list(report.dropped) == urls[:1]
    assert report.dropped[urls[0]]


def test_a_server_without_ranges_is_not_read_to_its_end(model: Model, tmp_path: Path) -> None:
    path, seed, cid = model
    large = tmp_path / "large.gguf"
    shutil.copy(path, large)
    with serving(path.parent, "no-ranges") as web, pytest.raises(NoProviders, match="range requests"):
        fetch(nodes_of(seed, cid), cid, tmp_path / "out.gguf", f"{web.url}/{path.name}")
    # What fills the sockets' buffers before the connection is cut, a few times over.
    assert len(web.requests) < 6


@pytest.mark.parametrize("fault", ["redirect", "short", "error"])
def test_what_may_pass_is_borne(model: Model, tmp_path: Path, fault: str) -> None:
    path, seed, cid = model
    if fault == "redirect":
        (tmp_path / "real").mkdir()
        shutil.copy(path, tmp_path / "real")
        root = tmp_path
    else:
        root = path.parent
    after = 4 if fault == "error" else 3
    with serving(root, fault, after=after) as web, serving(path.parent) as other:
        urls = [f"{web.url}/{path.name}"] + ([f"{other.url}/{path.name}"] if fault == "error" else [])
        report = fetch(nodes_of(seed, cid), cid, tmp_path / "out.gguf", *urls)
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()
    assert report.dropped == {}


def test_a_server_that_asks_to_wait_is_left_alone_meanwhile(model: Model, tmp_path: Path) -> None:
    path, seed, cid = model
    with serving(path.parent, busy=1) as web:
        fetch(nodes_of(seed, cid), cid, tmp_path / "out.gguf", f"{web.url}/{path.name}")
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()


def test_a_stalled_server_loses_its_asks(model: Model, tmp_path: Path) -> None:
    path, seed, cid = model
    with serving(path.parent, "stalls") as bad, serving(path.parent) as good:
        urls = [f"{web.url}/{path.name}" for web in (bad, good)]
        fetch(nodes_of(seed, cid), cid, tmp_path / "out.gguf", *urls)
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()


def test_nobody_there_is_said_soon(model: Model, tmp_path: Path) -> None:
    path, seed, cid = model
    with serving(path.parent) as web:
        url = f"{web.url}/{path.name}"
    with pytest.raises(NoProviders, match=url):
        fetch(nodes_of(seed, cid), cid, tmp_path / "out.gguf", url)


def test_without_anybody_to_describe_the_model(model: Model, tmp_path: Path) -> None:
    _, _, cid = model
    with pytest.raises(NoProviders, match="not its manifest"):
        fetch(MemoryStore(), cid, tmp_path / "out.gguf", "http://127.0.0.1:9/six.gguf")


@pytest.mark.parametrize("by", ["member", "directory", "each"])
def test_a_split_set(tmp_path: Path, by: str) -> None:
    there = tmp_path / "there"
    there.mkdir()
    names = [f"m-{n:05d}-of-00002.gguf" for n in (1, 2)]
    for number, name in enumerate(names):
        tensors = [TinyTensor(f"blk.{number}.ffn_up.weight", shape=(2048, MIB // 8192))]
        metadata: dict[str, object] = {"split.no": number, "split.count": 2, "split.tensors.count": 2}
        if not number:
            metadata |= {"general.architecture": "llama", "llama.block_count": 2}
        (there / name).write_bytes(TinyGGUF(tensors, metadata).build())
    seed, cid = seeded(there / names[0], KEY)
    with serving(there) as web:
        urls = {
            "member": [f"{web.url}/{names[1]}"],
            "directory": [f"{web.url}/"],
            "each": [f"{web.url}/{name}" for name in names],
        }[by]
        fetch(nodes_of(seed, cid), cid, tmp_path / "out", *urls)
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (there / name).read_bytes()

"""Models that a publisher made to do harm, served honestly: each refused by name, with nothing in the home.

Every node here is canonical and has the digest of its CID, so no peer is at fault. Faults of single nodes
are in `spec/vectors/manifest.json`; here the nodes are fetched, and mostly it is what they say together
that is wrong. The homes are real ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from omnistore import dagcbor
from omnistore.block import Block
from omnistore.chunker.cut import cut
from omnistore.cid import CID
from omnistore.config import Config
from omnistore.errors import BadSignature, MalformedGGUF, MalformedManifest, OmniError, StoreError, StoreFull
from omnistore.keys import PrivateKey
from omnistore.manifest import HeaderPart, Manifest, Part, PartKey, PartRef, SignedManifest, TensorPart
from omnistore.store.files import FileStore
from omnistore.store.interface import Store
from omnistore.testing.faulty import FaultyPeer
from omnistore.testing.network import LinkModel, VirtualNetwork
from omnistore.testing.tiny_gguf import TinyGGUF, TinyTensor, tiny_model
from omnistore.transfer.client import FetchOptions, fetch_model
from omnistore.transfer.messages import PROTOCOL

KEY, OTHER = PrivateKey(bytes(32)), PrivateKey(bytes(31) + b"\1")
HEADER, LAYER = PartKey("header"), PartKey("layer", 1)
MIB = 1 << 20
PETABYTE = 10**15


class Shelf:
    """As much of a store as a `FaultyPeer` reads: blocks by CID, whatever they say."""

    def __init__(self) -> None:
        self.blocks: dict[CID, Block] = {}

    def has(self, cid: CID) -> bool:
        return cid in self.blocks

    def read(self, cid: CID, room: memoryview | None = None) -> Block:
        if cid not in self.blocks:
            raise StoreError(f"no {cid}")
        return self.blocks[cid]

    def held(self, cids: Sequence[CID]) -> frozenset[CID]:
        return frozenset(self.blocks.keys() & set(cids))

    def put(self, block: Block) -> CID:
        self.blocks[block.cid] = block
        return block.cid


class Publication:
    """A model that is right to begin with; `cid` is its signed manifest's after what was done to it."""

    def __init__(self, directory: Path, data: bytes | None = None) -> None:
        path = directory / "tiny.gguf"
        path.write_bytes(data or tiny_model(3).build())
        made = cut([path])
        self.shelf = Shelf()
        self.manifest: Manifest = made.manifest
        self.parts: dict[PartKey, Part] = {part.key: part for part, _ in made.parts}
        self.data = path.read_bytes()
        for extent in made.layout.extents:
            for offset, size in extent.blocks():
                self.shelf.put(Block.raw(self.data[offset : offset + size]))
        for _, node in made.parts:
            self.shelf.put(node)
        self.bare = self.shelf.put(made.node)

    def publish(self, manifest: Manifest | None = None) -> CID:
        """Sign, and hand out the CID."""
        if manifest is not None:
            self.bare = self.shelf.put(manifest.encode())
        return self.sign(self.bare)

    def sign(self, bare: CID, key: PrivateKey = KEY, **altered: Any) -> CID:
        node = cast(
            dict[str, Any],
            dagcbor.decode_untrusted(bytes(SignedManifest.sign(bare, key).encode().data), limit=1 << 21),
        )
        return self.shelf.put(Block.node(dagcbor.encode({**node, **altered})))

    def refer(self, key: PartKey, size: int, node: Block) -> CID:
        """Publish with another node for one part."""
        ref = PartRef(key, size, self.shelf.put(node))
        parts = tuple(ref if old.key == key else old for old in self.manifest.parts)
        return self.publish(replace(self.manifest, parts=parts))

    def tensors(self, *, key: PartKey = LAYER, **altered: Any) -> CID:
        """Publish with the first tensor of a part altered."""
        part = self.parts[key]
        assert isinstance(part, TensorPart)
        changed = replace(part, tensors=(replace(part.tensors[0], **altered), *part.tensors[1:]))
        return self.refer(key, changed.size, changed.encode())

    def header(self, data: bytes) -> CID:
        """Publish with other bytes for the header."""
        part = HeaderPart(HEADER, len(data), (self.shelf.put(Block.raw(data)),), ())
        return self.refer(HEADER, len(data), part.encode())

    @property
    def header_size(self) -> int:
        part = self.parts[HEADER]
        assert isinstance(part, HeaderPart)
        return part.header_size


def file_named(name: str) -> Callable[[Publication], CID]:
    return lambda p: p.publish(replace(p.manifest, files=(replace(p.manifest.files[0], name=name),)))


def file_sized(size: int) -> Callable[[Publication], CID]:
    return lambda p: p.publish(replace(p.manifest, files=(replace(p.manifest.files[0], size=size),)))


def another_version(p: Publication) -> CID:
    node = cast(dict[str, Any], dagcbor.decode_untrusted(bytes(p.shelf.blocks[p.bare].data), limit=1 << 21))
    return p.sign(p.shelf.put(Block.node(dagcbor.encode({**node, "omni": 2}))))


def altered_after_signing(p: Publication) -> CID:
    signature = SignedManifest.sign(p.bare, KEY).signature
    return p.sign(p.shelf.put(replace(p.manifest, name="better").encode()), signature=signature)


def tensor_left_out(p: Publication) -> CID:
    part = p.parts[LAYER]
    assert isinstance(part, TensorPart)
    fewer = replace(part, tensors=part.tensors[1:])
    return p.refer(LAYER, fewer.size, fewer.encode())


def overlapping(p: Publication) -> CID:
    a, b = TinyTensor("blk.0.a", shape=(64,)), TinyTensor("blk.0.b", shape=(64,), offset=128)
    return p.header(TinyGGUF([a, b]).build()[: p.header_size])


def bomb(p: Publication) -> CID:
    """One block of 1 MiB, named 40,000 times in each of 3 layers: 120 GiB from a 5 MB manifest."""
    links, size = (p.shelf.put(Block.raw(bytes(MIB))),) * 40_000, 40_000 * MIB
    names = [f"blk.{n}.w" for n in range(3)]
    tensors = [TinyTensor(name, "F32", (size // 4,), b"", n * size) for n, name in enumerate(names)]
    header = TinyGGUF(tensors).build()
    refs = []
    for number, name in enumerate(names):
        node = Block.node(
            dagcbor.encode(
                {
                    "kind": "layer",
                    "index": number,
                    "tensors": [
                        {
                            "name": name,
                            "type": "F32",
                            "shape": [size // 4],
                            "size": size,
                            "blocks": list(links),
                        }
                    ],
                }
            )
        )
        refs.append(PartRef(PartKey("layer", number), size, p.shelf.put(node)))
    head = HeaderPart(HEADER, len(header), (p.shelf.put(Block.raw(header)),), ())
    refs.insert(0, PartRef(HEADER, len(header), p.shelf.put(head.encode())))
    files = (replace(p.manifest.files[0], size=len(header) + 3 * size),)
    return p.publish(replace(p.manifest, files=files, parts=tuple(refs), layers=3))


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[Publication], CID]
    error: type[OmniError]
    says: str


CASES = [
    Case("signature altered", lambda p: p.sign(p.bare, signature=bytes(64)), BadSignature, "signature"),
    Case("signed by another", lambda p: p.sign(p.bare, publisher=OTHER.public.protobuf), BadSignature, ""),
    Case("key of another type", lambda p: p.sign(p.bare, publisher=b"\10\2\22 " + bytes(32)), OmniError, ""),
    Case("manifest altered", altered_after_signing, BadSignature, "signature"),
    Case("a version to come", another_version, MalformedManifest, "version 2"),
    Case("a signature of a signature", lambda p: p.sign(p.publish()), MalformedManifest, ""),
    Case("a part as the manifest", lambda p: p.sign(p.manifest.parts[0].cid), MalformedManifest, ""),
    *(
        Case(f"file name {name!r}", file_named(name), MalformedManifest, "name")
        for name in ("../../evil.gguf", "/etc/cron.d/x", "a/b.gguf", "a\\b", "..", "con.gguf", "a\nb", "x\0")
    ),
    Case("a file of a petabyte of zeros", file_sized(PETABYTE), StoreFull, "tiny.gguf"),
    Case("a file shorter than its tensors", file_sized(5000), MalformedManifest, ""),
    Case("120 GiB of one block", bomb, StoreFull, ""),
    Case(
        "layers that are not there", lambda p: p.publish(replace(p.manifest, layers=9)), MalformedManifest, ""
    ),
    Case("a tensor of another type", lambda p: p.tensors(type="F16"), MalformedManifest, "blk.1"),
    Case("a tensor of another shape", lambda p: p.tensors(shape=(1, 2, 3)), MalformedManifest, "blk.1"),
    Case("a tensor under another name", lambda p: p.tensors(name="a"), MalformedManifest, ""),
    Case("a tensor of a petabyte", lambda p: p.tensors(size=PETABYTE), MalformedManifest, ""),
    Case("a tensor left out", tensor_left_out, MalformedManifest, ""),
    Case(
        "a part that is the manifest",
        lambda p: p.refer(LAYER, 1, Block.node(bytes(p.shelf.blocks[p.bare].data))),
        OmniError,
        "",
    ),
    Case("a part of noise", lambda p: p.refer(LAYER, 9, Block.node(b"\xff" * 99)), MalformedManifest, ""),
    Case(
        "a part without end", lambda p: p.refer(LAYER, 9, Block.node(b"\x81" * 9999)), MalformedManifest, ""
    ),
    Case("a header that is no GGUF", lambda p: p.header(b"GGML" + bytes(96)), MalformedGGUF, "not a GGUF"),
    Case("a big-endian header", lambda p: p.header(b"GGUF\0\0\0\3" + bytes(96)), OmniError, "big-endian"),
    Case("a header cut short", lambda p: p.header(p.data[: p.header_size // 2]), OmniError, "truncated"),
    Case(
        "a header of 2^40 tensors",
        lambda p: p.header(b"GGUF\3\0\0\0" + bytes(5) + b"\1" + bytes(10)),
        OmniError,
        "tensors",
    ),
    Case("a header of overlapping tensors", overlapping, OmniError, ""),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused_and_nothing_left_behind(case: Case, tmp_path: Path) -> None:
    publication = Publication(tmp_path)
    cid = case.make(publication)
    store = FileStore(Config(tmp_path / "home"))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            network = VirtualNetwork(nursery, random.Random(1), LinkModel(bandwidth=1e9))
            peer = FaultyPeer(cast(Store, publication.shelf), "lies", after=1 << 60)
            network.node("a").serve(PROTOCOL, peer.stream)
            options = FetchOptions(peers=("/memory/a/p2p/a",))
            await fetch_model(network.node("me"), None, store, cid, options)
            nursery.cancel_scope.cancel()

    try:
        with pytest.raises((case.error, ExceptionGroup)) as caught:
            trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.005))
        error = caught.value
        while isinstance(error, ExceptionGroup):
            (error,) = error.exceptions
        assert isinstance(error, case.error)
        assert isinstance(error, OmniError)
        assert case.says in error.message
    finally:
        store.close()
    left = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert all(path.name.startswith("index.") or path.suffix == ".lock" for path in left), left
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".gguf", ".part")][1:]

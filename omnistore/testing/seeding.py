"""Fills a `MemoryStore` with a model, as a seeder that added the file would hold it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from omnistore.block import Block
from omnistore.chunker.cut import cut, model_files
from omnistore.cid import CID
from omnistore.keys import PrivateKey
from omnistore.manifest import PartKey, SignedManifest
from omnistore.store.memory import MemoryStore


def seeded(path: Path, key: PrivateKey, parts: Collection[PartKey] | None = None) -> tuple[MemoryStore, CID]:
    """A store that holds the model at `path` (only the blocks of `parts` if given), and its signed CID."""
    paths = model_files(path)
    result = cut(paths)
    store = MemoryStore()
    signed = SignedManifest.sign(result.node.cid, key).encode()
    contents = [path.read_bytes() for path in paths]
    for extent in result.layout.extents:
        if parts is None or extent.part in parts:
            data = contents[extent.file]
            store.put(Block.raw(data[offset : offset + size]) for offset, size in extent.blocks())
    nodes = [signed, result.node, *(node for _, node in result.parts)]
    store.publish(nodes, signed.cid)
    return store, signed.cid

"""From a store's verified blocks to what engines need: a model's shape, its metadata, its tensors.

Weights are read block by block when an engine asks for a tensor, each digest checked again as it leaves
the disk; at most one tensor (or the range asked for) is in memory. Nothing is fetched here: a missing block
raises `BlockMissing`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from omninfer.arch import ModelSpec
from omninfer.engines.interface import StageSpec
from omnistore.block import BLOCK_SIZE
from omnistore.chunker.ggml import GGMLType, by_name
from omnistore.chunker.gguf import GGUFHeader, read_header_untrusted
from omnistore.cid import CID
from omnistore.errors import BlockMissing
from omnistore.manifest import HeaderPart, Manifest, PartKey, TensorEntry, TensorPart
from omnistore.store.interface import Model, Store


@dataclass(frozen=True, slots=True)
class Description:
    """What a model's headers say: enough to plan, to tokenize and to check a stage."""

    model: Model
    spec: ModelSpec
    metadata: Mapping[str, object]
    """Of the first file."""
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """Type and shape (ne[0] first) of every tensor, by name."""


def header_parts(manifest: Manifest) -> frozenset[PartKey]:
    """The parts that `describe` reads."""
    return frozenset(ref.key for ref in manifest.parts if ref.key.kind == "header")


def stage_parts(manifest: Manifest, stage: StageSpec) -> frozenset[PartKey]:
    """The parts that a stage reads, headers included; a tied head reads the embedding."""
    wanted = {ref.key for ref in manifest.parts if ref.key.kind in ("header", "shared")}
    wanted |= {PartKey("layer", n) for n in range(stage.first, stage.last)}
    if stage.embed or (stage.head and stage.model.tied_head):
        wanted.add(PartKey("embed"))
    if stage.head:
        wanted.add(PartKey("head"))
    return frozenset(key for key in wanted if manifest.part(key) is not None)


def describe_untrusted(store: Store, cid: CID) -> Description:
    """Read a model's headers from the store.

    Raises `BlockMissing` while they are not here, `MalformedGGUF`, `UnsupportedGGUF` or `UnsupportedModel`
    for what a stranger wrote into them, and the store's own errors.
    """
    model = store.model(cid)
    headers = [_header(store, model, number) for number in range(len(model.manifest.files))]
    tensors = {t.name: (t.type.name, t.shape) for header in headers for t in header.tensors}
    metadata = headers[0].metadata
    return Description(model, ModelSpec.from_metadata_untrusted(metadata, tensors), metadata, tensors)


def _header(store: Store, model: Model, number: int) -> GGUFHeader:
    part = model.parts.get(PartKey("header", number))
    entry = model.manifest.files[number]
    if not isinstance(part, HeaderPart):
        raise BlockMissing(f"the header of {entry.name} is not held here")
    data = b"".join(bytes(store.read(cid).data) for cid in part.blocks)
    return read_header_untrusted(data, file_size=entry.size, name=entry.name)


class StoreTensorSource:
    """The tensors of those parts of a model whose nodes are held."""

    def __init__(self, store: Store, model: Model, parts: Collection[PartKey]) -> None:
        self._store = store
        self.packed = store.packed_directory
        self._tensors: dict[str, TensorEntry] = {}
        self._origins: dict[str, str] = {}
        for key in parts:
            part, ref = model.parts.get(key), model.manifest.part(key)
            if isinstance(part, TensorPart) and ref is not None:
                self._tensors |= {tensor.name: tensor for tensor in part.tensors}
                self._origins |= {tensor.name: str(ref.cid) for tensor in part.tensors}

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def info(self, name: str) -> tuple[GGMLType, tuple[int, ...]]:
        tensor = self._tensors[name]
        return by_name(tensor.type), tensor.shape

    def origin(self, name: str) -> str | None:
        return self._origins[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Bytes `start` to `stop` of a tensor; whole blocks are read and checked for it."""
        tensor = self._tensors[name]
        stop = tensor.size if stop is None else min(stop, tensor.size)
        if stop <= start:
            return memoryview(b"")
        first, last = start // BLOCK_SIZE, -(-stop // BLOCK_SIZE)
        if last - first == 1:
            data = memoryview(self._store.read(tensor.blocks[first]).data)
            return data[start - first * BLOCK_SIZE : stop - first * BLOCK_SIZE]
        joined, filled = bytearray(stop - start), 0
        for number in range(first, last):
            piece = memoryview(self._store.read(tensor.blocks[number]).data)
            offset = number * BLOCK_SIZE
            piece = piece[max(start - offset, 0) : stop - offset]
            joined[filled : filled + len(piece)] = piece
            filled += len(piece)
        return memoryview(joined).toreadonly()

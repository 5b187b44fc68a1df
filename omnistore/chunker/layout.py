"""How the bytes of a model's GGUF files map to parts, extents and blocks, and back.

Pure values: no bytes are read here. `Layout.plan` goes from headers to extents when a model is
cut; `resolve_untrusted` goes from a manifest, its verified parts and the headers to the place
of every block when a model is fetched. A part node says what, the headers say where, and
nothing is placed before the two agree. Implements spec/02-layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeAlias

from omnistore.block import BLOCK_SIZE
from omnistore.chunker.gguf import GGUFHeader, TensorInfo
from omnistore.cid import CID
from omnistore.errors import MalformedManifest
from omnistore.manifest import (
    MAX_LAYERS,
    MAX_TEXT,
    FileEntry,
    HeaderPart,
    Manifest,
    Part,
    PartKey,
    PartRef,
    TensorEntry,
    TensorPart,
    block_sizes,
)

_LAYER: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\..+", re.DOTALL)
_EMBED: Final = ("token_embd", "token_types", "position_embd")
_HEAD: Final = ("output",)

Gap: TypeAlias = tuple[int, int]
"""(offset, size) of bytes of a file that belong to no header and no tensor."""


def part_of(tensor_name: str) -> PartKey:
    """The part that a tensor belongs to: a function of its name alone."""
    layer = _LAYER.fullmatch(tensor_name)
    if layer and int(layer[1]) < MAX_LAYERS:
        return PartKey("layer", int(layer[1]))
    if tensor_name.startswith(_EMBED):
        return PartKey("embed")
    if tensor_name.startswith(_HEAD):
        return PartKey("head")
    return PartKey("shared")


def architecture(headers: Sequence[GGUFHeader]) -> str:
    """`general.architecture`, or `unknown` when the first file has none that a manifest can carry."""
    value = headers[0].metadata.get("general.architecture")
    return value if isinstance(value, str) and 0 < len(value) <= MAX_TEXT else "unknown"


def layer_count(headers: Sequence[GGUFHeader]) -> int:
    """Layers of the model: what the metadata says, or more when a tensor's name says so."""
    claimed = headers[0].metadata.get(f"{architecture(headers)}.block_count")
    keys = (part_of(tensor.name) for header in headers for tensor in header.tensors)
    named = max((key.index + 1 for key in keys if key.kind == "layer"), default=0)
    if isinstance(claimed, int) and not isinstance(claimed, bool) and named <= claimed <= MAX_LAYERS:
        return claimed
    return named


@dataclass(frozen=True, slots=True)
class Extent:
    """One contiguous byte range of one file: the header, one tensor, or non-zero padding."""

    file: int
    offset: int
    size: int
    part: PartKey
    name: str | None = None
    """The tensor's; None for a header or padding."""

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(offset in the file, size) of each block, cut from the extent's own start."""
        end = self.offset + self.size
        for offset in range(self.offset, end, BLOCK_SIZE):
            yield offset, min(BLOCK_SIZE, end - offset)

    @property
    def block_count(self) -> int:
        """Blocks the extent is cut into."""
        return -(-self.size // BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class Layout:
    """Every byte range of a model that is addressed, in file order."""

    extents: tuple[Extent, ...]
    file_sizes: tuple[int, ...]

    @classmethod
    def plan(
        cls,
        headers: Sequence[GGUFHeader],
        file_sizes: Sequence[int],
        nonzero_gaps: Mapping[int, Sequence[Gap]],
    ) -> Layout:
        """Cover the files; `nonzero_gaps` are those of `gaps` (by file) whose bytes are not all zero."""
        extents: list[Extent] = []
        for file, header in enumerate(headers):
            own = PartKey("header", file)
            covered = [
                Extent(file, tensor.offset, tensor.size, part_of(tensor.name), tensor.name)
                for tensor in header.tensors
            ]
            padding = [Extent(file, offset, size, own) for offset, size in nonzero_gaps.get(file, ())]
            extents.append(Extent(file, 0, header.size, own))
            extents += sorted(covered + padding, key=lambda extent: extent.offset)
        return cls(tuple(extents), tuple(file_sizes))

    @property
    def block_count(self) -> int:
        """Blocks of all extents."""
        return sum(extent.block_count for extent in self.extents)

    @property
    def size(self) -> int:
        """Bytes of all extents: the files without their zero padding."""
        return sum(extent.size for extent in self.extents)


def gaps(header: GGUFHeader, file_size: int) -> tuple[Gap, ...]:
    """The maximal ranges of a file after its header that no tensor covers, in order."""
    edges = [(0, header.size), *((t.offset, t.offset + t.size) for t in header.in_file_order())]
    if header.tensors:
        edges.append((file_size, file_size))
    return tuple((end, start - end) for (_, end), (start, _) in pairwise(edges) if start > end)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one block lies. The same block may lie in several places."""

    cid: CID
    file: int
    offset: int
    size: int
    part: PartKey


Placed: TypeAlias = tuple[int, TensorInfo]
"""A tensor and the number of the file it is in."""


def tensors_by_part(headers: Sequence[GGUFHeader]) -> dict[PartKey, list[Placed]]:
    """The tensors of each part, sorted by name as a part node lists them."""
    found: dict[PartKey, list[Placed]] = {}
    for file, header in enumerate(headers):
        for tensor in header.tensors:
            found.setdefault(part_of(tensor.name), []).append((file, tensor))
    for tensors in found.values():
        tensors.sort(key=lambda placed: placed[1].name.encode())
    return found


def resolve_untrusted(
    manifest: Manifest, parts: Mapping[PartKey, Part], headers: Sequence[GGUFHeader]
) -> tuple[Placement, ...]:
    """The place of every block of `parts`, which may be only some of the manifest's, in file order.

    `headers` are those of all files, read from their verified header blocks. Raises
    MalformedManifest when manifest, parts and headers do not describe the same model.
    """
    _check_files(manifest.files, headers)
    expected = tensors_by_part(headers)
    _check_manifest(manifest, headers, expected)
    found: list[Placement] = []
    for key, part in parts.items():
        ref = manifest.part(key)
        if ref is None or part.key != key or isinstance(part, HeaderPart) != (key.kind == "header"):
            raise MalformedManifest(f"part {key} is not one of this manifest's")
        if part.size != ref.size:
            raise MalformedManifest(f"part {key} holds {part.size} bytes but the manifest says {ref.size}")
        if isinstance(part, HeaderPart):
            found += _place_header(part, headers[key.index], manifest.files[key.index])
        else:
            found += _place_tensors(part, expected[key])
    found.sort(key=lambda placement: (placement.file, placement.offset))
    return tuple(found)


def _check_files(files: Sequence[FileEntry], headers: Sequence[GGUFHeader]) -> None:
    if len(files) != len(headers):
        raise MalformedManifest(f"the manifest lists {len(files)} files but {len(headers)} headers were read")
    owner: dict[str, str] = {}
    for entry, header in zip(files, headers, strict=True):
        if header.size > entry.size or (not header.tensors and header.size != entry.size):
            raise MalformedManifest(
                f"{entry.name}: its header takes {header.size} bytes of a file of {entry.size}"
            )
        for tensor in header.tensors:
            if tensor.offset + tensor.size > entry.size:
                raise MalformedManifest(
                    f"{entry.name}: tensor {tensor.name!r} lies beyond the end of the file"
                )
            other = owner.setdefault(tensor.name, entry.name)
            if other is not entry.name:
                raise MalformedManifest(f"tensor {tensor.name!r} is in {other} and in {entry.name}")


def _check_manifest(
    manifest: Manifest, headers: Sequence[GGUFHeader], expected: Mapping[PartKey, Sequence[Placed]]
) -> None:
    layers = layer_count(headers)
    if manifest.layers != layers:
        raise MalformedManifest(f"the manifest says {manifest.layers} layers but the headers say {layers}")
    listed: dict[PartKey, PartRef] = {ref.key: ref for ref in manifest.parts}
    for file in range(len(headers)):
        if PartKey("header", file) not in listed:
            raise MalformedManifest(f"the manifest lists no header part for file {file}")
    for key, tensors in expected.items():
        ref = listed.get(key)
        if ref is None:
            raise MalformedManifest(
                f"tensor {tensors[0][1].name!r} belongs to part {key}, which is not listed"
            )
        size = sum(tensor.size for _, tensor in tensors)
        if ref.size != size:
            raise MalformedManifest(
                f"part {key} is said to hold {ref.size} bytes, but its tensors take {size}"
            )
    for key in listed:
        if key not in expected and not (key.kind == "header" and key.index < len(headers)):
            raise MalformedManifest(f"the manifest lists part {key}, but no tensor belongs to it")


def _place_header(part: HeaderPart, header: GGUFHeader, entry: FileEntry) -> list[Placement]:
    if part.header_size != header.size:
        raise MalformedManifest(
            f"{entry.name}: part {part.key} says the header takes {part.header_size} bytes, not {header.size}"
        )
    found = _place(part.blocks, part.key, part.key.index, 0, part.header_size)
    free = set(gaps(header, entry.size))
    for padding in part.padding:
        gap = (padding.offset, padding.size)
        if gap not in free:
            raise MalformedManifest(
                f"{entry.name}: padding of {padding.size} bytes at {padding.offset} is no gap of the file"
            )
        free.remove(gap)
        found += _place(padding.blocks, part.key, part.key.index, *gap)
    return found


def _place_tensors(part: TensorPart, expected: Sequence[Placed]) -> list[Placement]:
    entries = {entry.name: entry for entry in part.tensors}
    missing = [tensor.name for _, tensor in expected if tensor.name not in entries]
    unknown = entries.keys() - {tensor.name for _, tensor in expected}
    if missing or unknown or len(entries) != len(part.tensors):
        name = repr(missing[0] if missing else min(unknown, default=part.tensors[0].name))
        fault = "lacks" if missing else "lists, against the headers," if unknown else "lists twice"
        raise MalformedManifest(f"part {part.key} {fault} tensor {name}")
    found: list[Placement] = []
    for file, tensor in expected:
        entry = entries[tensor.name]
        _check_tensor(part.key, entry, tensor)
        found += _place(entry.blocks, part.key, file, tensor.offset, tensor.size)
    return found


def _check_tensor(key: PartKey, entry: TensorEntry, tensor: TensorInfo) -> None:
    said = (entry.type, entry.shape, entry.size)
    true = (tensor.type.name, tensor.shape, tensor.size)
    if said != true:
        raise MalformedManifest(
            f"part {key} describes tensor {entry.name!r} as {said}, but the header has {true}"
        )


def _place(blocks: Sequence[CID], key: PartKey, file: int, offset: int, size: int) -> list[Placement]:
    if len(blocks) != -(-size // BLOCK_SIZE):
        raise MalformedManifest(f"part {key}: {size} bytes can not be {len(blocks)} blocks")
    return [
        Placement(cid, file, offset + number * BLOCK_SIZE, length, key)
        for number, (cid, length) in enumerate(block_sizes(blocks, size))
    ]

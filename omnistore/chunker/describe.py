"""From headers, a layout and the blocks' CIDs to part nodes and a manifest.

Pure and deterministic: the same files under the same name give the same CIDs. Publishers only
claim what the headers say; nothing here looks at weights. Implements spec/02-layout, sections
"Parts" and "What a manifest says of a header".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from math import prod
from typing import Final

from omnistore.block import Block
from omnistore.chunker.ggml import file_type_name
from omnistore.chunker.gguf import GGUFHeader
from omnistore.chunker.layout import Layout, architecture, layer_count, tensors_by_part
from omnistore.cid import CID
from omnistore.manifest import (
    FileEntry,
    HeaderPart,
    Manifest,
    PaddingEntry,
    Part,
    PartKey,
    PartRef,
    TensorEntry,
    TensorPart,
)

_TEXT_FACTS: Final = {
    "license": "general.license",
    "size_label": "general.size_label",
    "description": "general.description",
    "url": "general.url",
}
_FACT_TEXT_LIMIT: Final = 4096
"""Characters; a longer text stays in the header alone."""
_FACT_MAX: Final = 1 << 62


def build_parts(headers: Sequence[GGUFHeader], layout: Layout, cids: Sequence[CID]) -> tuple[Part, ...]:
    """The parts in a manifest's order; `cids` are those of the layout's blocks, in its order."""
    supply = iter(cids)
    header_blocks: dict[int, tuple[CID, ...]] = {}
    tensor_blocks: dict[str, tuple[CID, ...]] = {}
    padding: dict[int, list[PaddingEntry]] = {}
    for extent in layout.extents:
        blocks = tuple(islice(supply, extent.block_count))
        if extent.name is not None:
            tensor_blocks[extent.name] = blocks
        elif extent.offset == 0:
            header_blocks[extent.file] = blocks
        else:
            padding.setdefault(extent.file, []).append(PaddingEntry(extent.offset, extent.size, blocks))
    parts: list[Part] = [
        HeaderPart(PartKey("header", file), header.size, header_blocks[file], tuple(padding.get(file, ())))
        for file, header in enumerate(headers)
    ]
    for key, tensors in tensors_by_part(headers).items():
        entries = (
            TensorEntry(t.name, t.type.name, t.shape, t.size, tensor_blocks[t.name]) for _, t in tensors
        )
        parts.append(TensorPart(key, tuple(entries)))
    return tuple(sorted(parts, key=lambda part: part.key.rank))


def build_manifest(
    headers: Sequence[GGUFHeader],
    files: Sequence[FileEntry],
    parts: Sequence[tuple[Part, Block]],
    *,
    name: str,
    base: CID | None = None,
) -> Manifest:
    """The manifest of a model with these parts, each given with its encoded node."""
    return Manifest(
        name=name,
        architecture=architecture(headers),
        quantisation=quantisation(headers),
        layers=layer_count(headers),
        files=tuple(files),
        parts=tuple(PartRef(part.key, part.size, node.cid) for part, node in parts),
        facts=facts(headers),
        base=base,
    )


def quantisation(headers: Sequence[GGUFHeader]) -> str:
    """What people call the model's quantisation: `general.file_type`, else the type of most bytes."""
    file_type = headers[0].metadata.get("general.file_type")
    if isinstance(file_type, int) and not isinstance(file_type, bool):
        name = file_type_name(file_type)
        if name is not None:
            return name
    totals: Counter[str] = Counter()
    for header in headers:
        for tensor in header.tensors:
            totals[tensor.type.name] += tensor.size
    # Ties go to the first name, so that the order of the tensors does not matter.
    return min(totals, key=lambda kind: (-totals[kind], kind)) if totals else "none"


def facts(headers: Sequence[GGUFHeader]) -> Mapping[str, int | str]:
    """The few metadata values people search for, those that the file has."""
    metadata = headers[0].metadata
    found: dict[str, int | str] = {}
    context = metadata.get(f"{architecture(headers)}.context_length")
    if isinstance(context, int) and not isinstance(context, bool) and 0 <= context <= _FACT_MAX:
        found["context_length"] = context
    parameters = sum(prod(tensor.shape) for header in headers for tensor in header.tensors)
    if 0 < parameters <= _FACT_MAX:
        found["parameters"] = parameters
    for fact, key in _TEXT_FACTS.items():
        value = metadata.get(key)
        if isinstance(value, str) and 0 < len(value) <= _FACT_TEXT_LIMIT:
            found[fact] = value
    return dict(sorted(found.items()))

"""What a model consists of, as values, and the dag-cbor nodes that they are written as (spec/03-manifest).

The other way, from a stranger's node to one of these, is `decoding`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from omnistore import dagcbor
from omnistore.block import BLOCK_SIZE, Block
from omnistore.cid import CID
from omnistore.keys import PrivateKey, PublicKey

FORMAT_VERSION: Final = 1
SIGNATURE_DOMAIN: Final = "omni-manifest"
SIGNATURE_PAYLOAD_TYPE: Final = b"/omni/manifest/1"

MAX_FILE_NAME: Final = 200
"""Bytes of a file name in UTF-8: file systems take 255, and a store adds to it while it writes."""

PartKind = Literal["header", "shared", "embed", "layer", "head"]
_KIND_ORDER: Final[Mapping[str, int]] = {kind: order for order, kind in enumerate(get_args(PartKind))}
# Control and bidirectional formatting characters, separators, and what Windows refuses or interprets.
_NOT_IN_FILE_NAMES: Final = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff/\\:*?\"<>|]"
)
_DEVICE: Final = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])[ ]*(\.|$)", re.IGNORECASE | re.ASCII
)


@dataclass(frozen=True, slots=True)
class PartKey:
    """Which part of a model: `index` is the layer number, the file number of a header, else 0."""

    kind: PartKind
    index: int = 0

    def __str__(self) -> str:
        return f"{self.kind}.{self.index}" if self.kind in ("layer", "header") else self.kind

    @property
    def rank(self) -> tuple[int, int]:
        """Sort key: headers, shared, embed, layers, head."""
        return _KIND_ORDER[self.kind], self.index


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a part: what it is and its blocks, not where it lies."""

    name: str
    type: str
    """Name of the ggml type, such as `Q4_K`."""
    shape: tuple[int, ...]
    """GGUF order: the contiguous dimension first."""
    size: int
    """Bytes."""
    blocks: tuple[CID, ...]
    """`ceil(size / 1 MiB)` raw blocks, in order."""


@dataclass(frozen=True, slots=True)
class PaddingEntry:
    """Non-zero bytes of a file that belong to no tensor."""

    offset: int
    size: int
    blocks: tuple[CID, ...]


@dataclass(frozen=True, slots=True)
class TensorPart:
    """A group of tensors fetched as one unit; sorted by tensor name (bytewise)."""

    key: PartKey
    tensors: tuple[TensorEntry, ...]

    @property
    def size(self) -> int:
        """Payload bytes."""
        return sum(tensor.size for tensor in self.tensors)

    def links(self) -> list[tuple[CID, int]]:
        """Every block with its payload size, in order."""
        return [pair for tensor in self.tensors for pair in block_sizes(tensor.blocks, tensor.size)]

    def encode(self) -> Block:
        """The part's node."""
        node: dict[str, dagcbor.Value] = {
            "kind": self.key.kind,
            "tensors": [
                {
                    "name": t.name,
                    "type": t.type,
                    "shape": list(t.shape),
                    "size": t.size,
                    "blocks": list(t.blocks),
                }
                for t in self.tensors
            ],
        }
        if self.key.kind == "layer":
            node["index"] = self.key.index
        return Block.node(dagcbor.encode(node))


@dataclass(frozen=True, slots=True)
class HeaderPart:
    """The header of one file and that file's non-zero padding."""

    key: PartKey
    header_size: int
    blocks: tuple[CID, ...]
    padding: tuple[PaddingEntry, ...]

    @property
    def size(self) -> int:
        """Payload bytes."""
        return self.header_size + sum(entry.size for entry in self.padding)

    def links(self) -> list[tuple[CID, int]]:
        """Every block with its payload size: the header's first."""
        pairs = block_sizes(self.blocks, self.header_size)
        for entry in self.padding:
            pairs += block_sizes(entry.blocks, entry.size)
        return pairs

    def encode(self) -> Block:
        """The part's node. It does not name its file: `Manifest.parts` does."""
        node: dict[str, dagcbor.Value] = {
            "kind": "header",
            "size": self.header_size,
            "blocks": list(self.blocks),
            "padding": [{"offset": p.offset, "size": p.size, "blocks": list(p.blocks)} for p in self.padding],
        }
        return Block.node(dagcbor.encode(node))


Part: TypeAlias = TensorPart | HeaderPart


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the model."""

    name: str
    """A bare file name that every system can store; see `is_file_name`."""
    size: int
    sha256: bytes | None = None


@dataclass(frozen=True, slots=True)
class PartRef:
    """A manifest's link to a part."""

    key: PartKey
    size: int
    """Payload bytes of the part (its node not counted)."""
    cid: CID


@dataclass(frozen=True, slots=True)
class Manifest:
    """The description of a model. `encode().cid` is the bare manifest's CID."""

    name: str
    architecture: str
    quantisation: str
    layers: int
    files: tuple[FileEntry, ...]
    parts: tuple[PartRef, ...]
    """In the order of `PartKey.rank`."""
    facts: Mapping[str, int | str]
    base: CID | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)

    def part(self, key: PartKey) -> PartRef | None:
        """The reference to one part, if the model has it."""
        return next((ref for ref in self.parts if ref.key == key), None)

    def encode(self) -> Block:
        """The manifest's node."""
        files: list[dagcbor.Value] = []
        for entry in self.files:
            file: dict[str, dagcbor.Value] = {"name": entry.name, "size": entry.size}
            if entry.sha256 is not None:
                file["sha256"] = entry.sha256
            files.append(file)
        node: dict[str, dagcbor.Value] = {
            "omni": FORMAT_VERSION,
            "name": self.name,
            "architecture": self.architecture,
            "quantisation": self.quantisation,
            "layers": self.layers,
            "files": files,
            "parts": [
                {"kind": r.key.kind, "index": r.key.index, "size": r.size, "link": r.cid} for r in self.parts
            ],
            "facts": dict(self.facts),
        }
        if self.base is not None:
            node["base"] = self.base
        return Block.node(dagcbor.encode(node))


@dataclass(frozen=True, slots=True)
class SignedManifest:
    """A link to a manifest under a publisher's verified signature."""

    manifest: CID
    publisher: PublicKey
    signature: bytes

    @classmethod
    def sign(cls, manifest: CID, key: PrivateKey) -> SignedManifest:
        """Sign a bare manifest's CID (deterministic: Ed25519)."""
        signature = key.sign(
            domain=SIGNATURE_DOMAIN, payload_type=SIGNATURE_PAYLOAD_TYPE, payload=manifest.binary
        )
        return cls(manifest, key.public, signature)

    def encode(self) -> Block:
        """The signed manifest's node: its CID is what `omni add` prints."""
        return Block.node(
            dagcbor.encode(
                {
                    "manifest": self.manifest,
                    "publisher": self.publisher.protobuf,
                    "signature": self.signature,
                }
            )
        )


def is_file_name(name: str) -> bool:
    """Whether `name` can be created in a directory, and nowhere else, on every common system."""
    return (
        not _NOT_IN_FILE_NAMES.search(name)
        and not name.startswith((".", " "))
        and not name.endswith((".", " "))
        and not _DEVICE.match(name)
        and 0 < len(name.encode()) <= MAX_FILE_NAME
    )


def block_sizes(blocks: Sequence[CID], size: int) -> list[tuple[CID, int]]:
    """Pair the blocks of an extent of `size` bytes with their payload sizes."""
    last = len(blocks) - 1
    return [(cid, BLOCK_SIZE if i < last else size - last * BLOCK_SIZE) for i, cid in enumerate(blocks)]

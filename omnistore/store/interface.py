"""What every store does: hold verified blocks, know models, assemble files (pure: types only).

A store is synchronous and safe to call from several threads; asynchronous code calls it through
`trio.to_thread.run_sync`. Implementations: `omnistore.store.files` (the real one),
`omnistore.store.memory` (tests, simulations). Both pass `omnistore.testing.store_contract`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from omnistore.block import Block
from omnistore.chunker.layout import Placement
from omnistore.cid import CID
from omnistore.keys import PublicKey
from omnistore.manifest import Manifest, Part, PartKey


@dataclass(frozen=True, slots=True)
class Model:
    """A model's description as far as its nodes are held."""

    cid: CID
    """What people name it by: the signed manifest's CID, or the bare manifest's."""
    manifest_cid: CID
    manifest: Manifest
    publisher: PublicKey | None
    """Whose signature was checked; None when known only by its bare manifest."""
    parts: Mapping[PartKey, Part]
    """The part nodes in hand; all of them for a model added here. May decode on access."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model and how much of it is here."""

    model: Model
    pinned: frozenset[PartKey]
    """Parts that garbage collection keeps, whole or still being fetched; empty after `unpin`."""
    complete: frozenset[PartKey]
    """Parts whose every block is held."""
    bytes_held: int
    """Payload bytes held, a block that lies in several places counted at each."""
    files: tuple[Path, ...]
    """Where its files are, in the manifest's order: referenced in place, or under the home (`NAME.gguf`, or
    a sparse `NAME.gguf.part` while it is not whole). Empty unless all of them have a place."""
    referenced: bool
    """True when the files are the user's own, referenced in place."""
    mirrors: tuple[str, ...] = ()
    """As `Store.mirrors` has them."""

    @property
    def whole(self) -> bool:
        """Whether every part is complete."""
        return len(self.complete) == len(self.model.manifest.parts)


class Assembly(Protocol):
    """Files of one model being put together, block by block, in any order.

    Survives a crash at any instruction: what `write` returned from is found again by the next
    assembly of the same model, and is not asked for again.
    """

    @property
    def model(self) -> Model:
        """What is being assembled."""
        ...

    @property
    def local_blocks(self) -> int:
        """Distinct blocks that were held already (here or under another model) when it was opened."""
        ...

    def missing(self) -> Sequence[Placement]:
        """Placements of the wanted parts still without bytes, by part then file offset."""
        ...

    def lacking(self) -> Mapping[int, int]:
        """Bytes that `missing` placements take, by the file's number; quick, and for showing only."""
        ...

    def write(self, blocks: Sequence[Block]) -> None:
        """Put verified blocks at every place they belong. Raises `StoreFull`.

        What it returned from outlives the process; from `finish` and `close` on, also a power cut. A block
        that belongs nowhere raises `LocalProtocolError`; one of another length than the manifest says,
        `MalformedManifest`.
        """
        ...

    def finish(self, output: Path | None = None) -> Sequence[Path]:
        """End the assembly: with every part of the model whole, the files get their names.

        The files' paths, in the manifest's order; a partial assembly stays a sparse `.part`. `output` is
        a file, or a directory (the only choice for several files), that gets the files too; refused
        with `InputError` for a partial assembly. Raises `BlockMissing` while something is missing.
        """
        ...

    def close(self) -> None:
        """Let go of the files; what was written stays."""
        ...


class Store(Protocol):
    """Blocks, nodes and models of one home."""

    @property
    def packed_directory(self) -> Path | None:
        """Where engines keep what they made of parts, in files named after them; None to keep nothing."""
        ...

    def has(self, cid: CID) -> bool:
        """Whether the block or node is held (by the index; `read` re-checks the bytes)."""
        ...

    def held(self, cids: Iterable[CID]) -> set[CID]:
        """Those of `cids` that are held."""
        ...

    def read(self, cid: CID, room: memoryview | None = None) -> Block:
        """The bytes, digest re-checked from disk on every call.

        They may lie in `room`, if that is large enough: then only for as long as nobody writes there.
        Raises `BlockMissing`, `SourceChanged` (file moved or rewritten) or `DigestMismatch` (rotten);
        after either of the last two the block is no longer `has`.
        """
        ...

    def put_node(self, block: Block) -> None:
        """Keep a dag-cbor node, durably."""
        ...

    def model(self, cid: CID) -> Model:
        """The model under a signed or bare manifest's CID. Raises `BlockMissing`, `TrustError`."""
        ...

    def models(self) -> Sequence[ModelStatus]:
        """Every model here, by name."""
        ...

    def status(self, cid: CID) -> ModelStatus:
        """One model's status. Raises `BlockMissing`."""
        ...

    def find(self, text: str) -> Model:
        """The model a person means: a CID, the beginning of one (12 characters or more), or a name.

        Raises `BlockMissing` when none fits and `InputError`, listing them, when several do.
        """
        ...

    def unpin(self, cid: CID, parts: Collection[PartKey] | None = None) -> None:
        """Let garbage collection have these parts (None: all) of a model. Raises `BlockMissing`."""
        ...

    def mirrors(self, cid: CID) -> Sequence[str]:
        """URLs that this home's user recorded for the model under a signed or bare manifest's CID, sorted.

        Empty when there are none, and for what is not held.
        """
        ...

    def set_mirrors(self, cid: CID, urls: Collection[str]) -> None:
        """Record mirrors of a model, in place of those before. Raises `BlockMissing`."""
        ...

    def announced(self) -> Collection[CID]:
        """What to advertise: signed manifests, manifests, and parts held whole."""
        ...

    def assemble(self, model: Model, placements: Sequence[Placement], parts: Collection[PartKey]) -> Assembly:
        """Open (or resume) the files of `model` and pin `parts`. `placements` covers at least `parts`.

        The model's nodes must have been `put_node`. Pinned at once, so that no garbage collection takes
        what is being fetched; blocks held under other models are copied in at once. Raises
        `StoreLocked` when the same model is being assembled already, `StoreFull` when the disk has no room,
        `BlockMissing` when nodes are not here (any more: they were swept with a model without pins).
        """
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...

"""From stored nodes to a `Model`, and from what a person typed to a model: what all stores share.

Pure: the caller says where nodes come from. Nodes are decoded strictly (spec/03-manifest); a
`PartsOnDemand` puts the decoding of part nodes off, because listing models needs none of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from omnistore.block import Block
from omnistore.chunker.layout import Placement
from omnistore.cid import CID
from omnistore.errors import BlockMissing, InputError, MalformedCID
from omnistore.manifest import (
    Manifest,
    Part,
    PartKey,
    PartRef,
    SignedManifest,
    manifest_untrusted,
    open_untrusted,
    part_untrusted,
)
from omnistore.store.interface import Model

NodeOf = Callable[[CID], Block]
"""Gives a held node. Raises `BlockMissing`."""

_SHORTEST_PREFIX: Final = 12
"""Characters of a CID's text that name a model: 7 are the same for all, the rest tell models apart."""


class PartsOnDemand(Mapping[PartKey, Part]):
    """The held parts of a manifest, each decoded when it is first looked at."""

    def __init__(self, refs: Sequence[PartRef], node: NodeOf) -> None:
        self._refs = {ref.key: ref for ref in refs}
        self._node = node
        self._decoded: dict[PartKey, Part] = {}

    def __getitem__(self, key: PartKey) -> Part:
        if key not in self._decoded:
            ref = self._refs[key]
            self._decoded[key] = part_untrusted(self._node(ref.cid), ref)
        return self._decoded[key]

    def __iter__(self) -> Iterator[PartKey]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)


def open_model(cid: CID, node: NodeOf, has: Callable[[CID], bool]) -> Model:
    """Build the model under a signed or bare manifest's CID from the nodes held.

    Raises `BlockMissing` when a manifest's node is not held, `TrustError` when it can not be believed.
    """
    opened = open_untrusted(node(cid))
    if isinstance(opened, SignedManifest):
        manifest_cid, publisher = opened.manifest, opened.publisher
        manifest = manifest_untrusted(node(manifest_cid))
    else:
        manifest_cid, publisher, manifest = cid, None, opened
    refs = [ref for ref in manifest.parts if has(ref.cid)]
    return Model(cid, manifest_cid, manifest, publisher, PartsOnDemand(refs, node))


def checked(model: Model) -> Model:
    """The model with every held part decoded and held against the manifest. Raises `MalformedManifest`."""
    return Model(model.cid, model.manifest_cid, model.manifest, model.publisher, dict(model.parts))


def choose_model(text: str, known: Sequence[tuple[CID, CID, str]]) -> CID:
    """The CID of the one model that `text` names among (CID, manifest's CID, name) triples.

    Raises `BlockMissing` or `InputError`. A full CID is returned whether or not it is known.
    """
    try:
        return CID.parse_untrusted(text)
    except MalformedCID as error:
        malformed = error
    bare = text.strip()
    # Both at once: a publisher may call a model what is the beginning of another's CID.
    prefix = bare if len(bare) >= _SHORTEST_PREFIX else "no CID's beginning"
    found = [
        cid
        for cid, manifest, name in known
        if name == bare or str(cid).startswith(prefix) or str(manifest).startswith(prefix)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(str(cid) for cid in found)
        raise InputError(f"{text!r} names {len(found)} models: {listed}", remedy="Give the CID in full.")
    if bare.startswith("bafy") and len(bare) > _SHORTEST_PREFIX:
        raise malformed
    raise BlockMissing(f"no model here is called {text!r}", remedy="`omni ls` lists the models held here.")


def by_file(placements: Iterable[Placement]) -> Counter[int]:
    """The bytes of placements by the number of the file they lie in."""
    found = Counter[int]()
    for placement in placements:
        found[placement.file] += placement.size
    return found


def names_of(manifest: Manifest) -> tuple[str, ...]:
    """The file names of a model, in order."""
    return tuple(entry.name for entry in manifest.files)

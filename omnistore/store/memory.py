"""`MemoryStore`: a store in dictionaries, for tests and simulations.

The obvious implementation of `omnistore.store.interface`; nothing survives the process, and
files exist only where `finish(output)` writes them.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from omnistore.block import Block
from omnistore.chunker.layout import Placement
from omnistore.cid import CID, DAG_CBOR
from omnistore.errors import BlockMissing, InputError, LocalProtocolError, StoreLocked
from omnistore.manifest import PartKey
from omnistore.store.interface import Model, ModelStatus
from omnistore.store.models import by_file, checked, choose_model, names_of, open_model


class MemoryStore:
    """Blocks, nodes and models in memory."""

    packed_directory: Path | None = None

    def __init__(self) -> None:
        self._blocks: dict[CID, bytes] = {}
        self._models: dict[CID, CID] = {}
        """Manifest to the CID that people name the model by."""
        self._pins: dict[CID, frozenset[PartKey]] = {}
        """By manifest."""
        self._mirrors: dict[CID, frozenset[str]] = {}
        """By manifest: this store knows one publisher of each."""
        self._open: set[CID] = set()
        """Manifests being assembled."""
        self._lock = threading.RLock()

    def put(self, blocks: Iterable[Block]) -> None:
        """Hold raw blocks outside any assembly: how a simulation fills a seeder."""
        with self._lock:
            for block in blocks:
                self._blocks[block.cid] = bytes(block.data)

    def publish(self, nodes: Iterable[Block], cid: CID) -> Model:
        """Hold a model's nodes and pin all its parts: what `omni add` does for a file."""
        for node in nodes:
            self.put_node(node)
        model = checked(self.model(cid))
        with self._lock:
            self._register(model, model.parts)
        return model

    def has(self, cid: CID) -> bool:
        return cid in self._blocks

    def held(self, cids: Iterable[CID]) -> set[CID]:
        return {cid for cid in cids if cid in self._blocks}

    def read(self, cid: CID, room: memoryview | None = None) -> Block:
        data = self._blocks.get(cid)
        if data is None:
            raise BlockMissing(f"block {cid} is not held here")
        return Block.verify_untrusted(cid, data)

    def put_node(self, block: Block) -> None:
        if block.cid.codec != DAG_CBOR:
            raise LocalProtocolError(f"{block.cid} is not a dag-cbor node")
        self.put([block])

    def model(self, cid: CID) -> Model:
        return open_model(self._models.get(cid, cid), self.read, self.has)

    def models(self) -> Sequence[ModelStatus]:
        with self._lock:
            found = [self.status(cid) for cid in self._models]
        return sorted(found, key=lambda status: (status.model.manifest.name, status.model.cid))

    def status(self, cid: CID) -> ModelStatus:
        with self._lock:
            model = self.model(cid)
            if model.manifest_cid not in self._models:
                raise BlockMissing(f"model {cid} is not held here")
            complete, count = set(), 0
            for key, part in model.parts.items():
                held = [size for block, size in part.links() if block in self._blocks]
                count += sum(held)
                if len(held) == len(part.links()):
                    complete.add(key)
            pinned = self._pins[model.manifest_cid]
            return ModelStatus(
                model, pinned, frozenset(complete), count, (), False, tuple(self.mirrors(model.manifest_cid))
            )

    def find(self, text: str) -> Model:
        with self._lock:
            models = [
                (cid, manifest, self.model(cid).manifest.name) for manifest, cid in self._models.items()
            ]
        return self.model(choose_model(text, models))

    def unpin(self, cid: CID, parts: Collection[PartKey] | None = None) -> None:
        with self._lock:
            status = self.status(cid)
            gone = status.pinned if parts is None else frozenset(parts)
            self._pins[status.model.manifest_cid] = status.pinned - gone

    def mirrors(self, cid: CID) -> Sequence[str]:
        with self._lock:
            known = [manifest for manifest, named in self._models.items() if cid in (manifest, named)]
            return sorted(url for manifest in known for url in self._mirrors.get(manifest, ()))

    def set_mirrors(self, cid: CID, urls: Collection[str]) -> None:
        with self._lock:
            self._mirrors[self.status(cid).model.manifest_cid] = frozenset(urls)

    def announced(self) -> Collection[CID]:
        found: set[CID] = set()
        for status in self.models():
            refs = [status.model.manifest.part(key) for key in status.complete]
            found |= {status.model.cid, status.model.manifest_cid, *(ref.cid for ref in refs if ref)}
        return found

    def assemble(
        self, model: Model, placements: Sequence[Placement], parts: Collection[PartKey]
    ) -> MemoryAssembly:
        with self._lock:
            if model.manifest_cid in self._open:
                raise StoreLocked(f"{model.manifest.name} is being assembled already")
            refs = (ref.cid for ref in model.manifest.parts if ref.key in model.parts)
            if not {model.cid, model.manifest_cid, *refs} <= self._blocks.keys():
                raise BlockMissing(f"nodes of {model.manifest.name} are not here: put them first")
            self._open.add(model.manifest_cid)
            self._register(model, parts)
        return MemoryAssembly(self, model, placements, parts)

    def close(self) -> None:
        """Nothing to flush."""

    def _register(self, model: Model, parts: Collection[PartKey]) -> None:
        known = self._models.get(model.manifest_cid)
        if known is None or known == model.manifest_cid:
            self._models[model.manifest_cid] = model.cid
        self._pins[model.manifest_cid] = self._pins.get(model.manifest_cid, frozenset()) | frozenset(parts)

    def _let_go(self, manifest: CID) -> None:
        with self._lock:
            self._open.discard(manifest)


class MemoryAssembly:
    """One model's blocks arriving in memory."""

    def __init__(
        self, store: MemoryStore, model: Model, placements: Sequence[Placement], parts: Collection[PartKey]
    ) -> None:
        self.model = model
        self._store = store
        self._placements = placements
        self._wanted = [placement for placement in placements if placement.part in parts]
        self._belonging = {placement.cid for placement in placements}
        self.local_blocks = len(store.held(placement.cid for placement in self._wanted))

    def missing(self) -> Sequence[Placement]:
        found = [placement for placement in self._wanted if not self._store.has(placement.cid)]
        return sorted(found, key=lambda p: (p.part.rank, p.file, p.offset))

    def lacking(self) -> Mapping[int, int]:
        return by_file(self.missing())

    def write(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            if block.cid not in self._belonging:
                raise LocalProtocolError(f"block {block.cid} has no place in {self.model.manifest.name}")
        self._store.put(blocks)

    def finish(self, output: Path | None = None) -> Sequence[Path]:
        missing = self.missing()
        if missing:
            raise BlockMissing(f"{len(missing)} blocks of {self.model.manifest.name} are missing")
        if output is None:
            return []
        if not self._store.status(self.model.cid).whole:
            raise InputError(f"{self.model.manifest.name} is not whole", remedy="Pin all its layers first.")
        names = names_of(self.model.manifest)
        into = output.is_dir() or len(names) > 1
        paths = [output / name if into else output for name in names]
        for number, (path, entry) in enumerate(zip(paths, self.model.manifest.files, strict=True)):
            data = bytearray(entry.size)
            for place in self._placements:
                if place.file == number:
                    data[place.offset : place.offset + place.size] = self._store.read(place.cid).data
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return paths

    def close(self) -> None:
        self._store._let_go(self.model.manifest_cid)

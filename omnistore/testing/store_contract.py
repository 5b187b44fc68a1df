"""What every store must do: a suite that each implementation runs.

Subclass `StoreContract`, give it a `store` fixture, and override `reopen` if the store outlives its
process. `Sample` is a small model with its blocks in hand, for these and other tests.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from omnistore.block import Block
from omnistore.chunker.cut import cut
from omnistore.chunker.layout import Placement
from omnistore.cid import CID, RAW
from omnistore.errors import (
    BlockMissing,
    InputError,
    LocalProtocolError,
    MalformedCID,
    MalformedManifest,
    StoreLocked,
)
from omnistore.keys import PrivateKey
from omnistore.manifest import Manifest, PartKey, SignedManifest
from omnistore.store.interface import Assembly, Model, Store
from omnistore.store.memory import MemoryStore
from omnistore.testing.tiny_gguf import Metadata, TinyGGUF, TinyTensor, pseudo_random, tiny_model

PUBLISHER = PrivateKey(bytes(range(32)))
ABSENT = CID.of_digest(RAW, bytes(32))


@dataclass(frozen=True)
class Sample:
    """A model cut, with everything a store may be given of it."""

    files: dict[str, bytes]
    manifest: Manifest
    bare: Block
    signed: Block
    parts: tuple[Block, ...]
    placements: tuple[Placement, ...]

    @property
    def nodes(self) -> list[Block]:
        """Signed manifest, manifest and parts."""
        return [self.signed, self.bare, *self.parts]

    @property
    def keys(self) -> frozenset[PartKey]:
        """Every part."""
        return frozenset(ref.key for ref in self.manifest.parts)

    def blocks(self, parts: Collection[PartKey] | None = None) -> list[Block]:
        """The distinct raw blocks of `parts` (None: all)."""
        names = [entry.name for entry in self.manifest.files]
        found: dict[CID, Block] = {}
        for place in self.placements:
            if parts is None or place.part in parts:
                data = self.files[names[place.file]][place.offset : place.offset + place.size]
                found.setdefault(place.cid, Block.raw(data))
        return list(found.values())


def sample(directory: Path, gguf: TinyGGUF | None = None, name: str = "tiny.gguf") -> Sample:
    """Cut a tiny model; `directory` gets its file."""
    path = directory / name
    path.write_bytes((gguf or tiny_model(layers=3)).build())
    return sample_of([path])


def sample_of(paths: list[Path], key: PrivateKey = PUBLISHER) -> Sample:
    """Cut the model in `paths`."""
    places: list[Placement] = []
    result = cut(paths, sink=places.extend)
    return Sample(
        files={path.name: path.read_bytes() for path in paths},
        manifest=result.manifest,
        bare=result.node,
        signed=SignedManifest.sign(result.node.cid, key).encode(),
        parts=tuple(block for _, block in result.parts),
        placements=tuple(places),
    )


def repetitive() -> TinyGGUF:
    """A model with the same block at many places, and one of more than a MiB."""
    same = pseudo_random("same", 4096)
    metadata: Metadata = [("general.architecture", "llama"), ("llama.block_count", 3)]
    tensors = [TinyTensor(f"blk.{n}.attn_q.weight", "F32", (32, 32), same) for n in range(3)]
    large = TinyTensor("token_embd.weight", "F32", (512, 1200), pseudo_random("large", 512 * 1200 * 4))
    return TinyGGUF([large, *tensors], metadata)


def put_nodes(store: Store, nodes: Iterable[Block]) -> None:
    """Give a store nodes one by one, as they arrive from peers."""
    for node in nodes:
        store.put_node(node)


def begin(store: Store, made: Sample, parts: Collection[PartKey] | None = None) -> Assembly:
    """Put the model's nodes and open an assembly of `parts` (None: all)."""
    put_nodes(store, made.nodes)
    wanted = made.keys if parts is None else parts
    return store.assemble(store.model(made.signed.cid), made.placements, wanted)


def fill(store: Store, made: Sample, parts: Collection[PartKey] | None = None) -> Model:
    """Fetch the model, or some parts, as a pin would."""
    assembly = begin(store, made, parts)
    try:
        wanted = {place.cid for place in assembly.missing()}
        assembly.write([block for block in made.blocks() if block.cid in wanted])
        assembly.finish()
    finally:
        assembly.close()
    return store.model(made.signed.cid)


class StoreContract:
    """The suite; `store` and `made` are its fixtures."""

    @pytest.fixture
    def made(self, tmp_path: Path) -> Sample:
        return sample(tmp_path)

    def reopen(self, store: Store) -> Store:
        """The store as the next process finds it."""
        return store

    def test_an_empty_store_holds_nothing(self, store: Store) -> None:
        assert not store.has(ABSENT)
        assert store.held([ABSENT]) == set()
        assert list(store.models()) == []
        assert list(store.announced()) == []
        for ask in (store.read, store.model, store.status):
            with pytest.raises(BlockMissing):
                ask(ABSENT)

    def test_nodes_are_kept(self, store: Store, made: Sample) -> None:
        put_nodes(store, made.nodes)
        put_nodes(store, made.nodes)
        store = self.reopen(store)
        for node in made.nodes:
            assert store.has(node.cid)
            assert bytes(store.read(node.cid).data) == node.data
        assert store.held([ABSENT, made.bare.cid]) == {made.bare.cid}

    def test_raw_blocks_are_no_nodes(self, store: Store) -> None:
        with pytest.raises(LocalProtocolError):
            store.put_node(Block.raw(b"weights"))

    def test_a_model_is_opened_from_its_nodes(self, store: Store, made: Sample) -> None:
        put_nodes(store, made.nodes[:-1])
        signed = store.model(made.signed.cid)
        assert (signed.cid, signed.manifest_cid) == (made.signed.cid, made.bare.cid)
        assert signed.publisher == PUBLISHER.public
        assert set(signed.parts) == {ref.key for ref in made.manifest.parts[:-1]}
        assert store.model(made.bare.cid).manifest == made.manifest
        assert store.model(made.bare.cid).publisher is None
        with pytest.raises(BlockMissing):
            store.status(made.signed.cid)

    def test_a_signed_manifest_alone_is_not_enough(self, store: Store, made: Sample) -> None:
        store.put_node(made.signed)
        with pytest.raises(BlockMissing):
            store.model(made.signed.cid)

    def test_a_node_that_is_no_manifest_is_refused(self, store: Store, made: Sample) -> None:
        store.put_node(made.parts[0])
        with pytest.raises(MalformedManifest):
            store.model(made.parts[0].cid)

    def test_a_fetched_model_is_whole(self, store: Store, made: Sample) -> None:
        fill(store, made)
        store = self.reopen(store)
        status = store.status(made.signed.cid)
        assert status.whole
        assert status.complete == status.pinned == made.keys
        assert status.bytes_held == sum(ref.size for ref in made.manifest.parts)
        assert not status.referenced
        for block in made.blocks():
            assert store.read(block.cid).data == block.data
            for size in (0, len(block), len(block) + 9):
                assert bytes(store.read(block.cid, memoryview(bytearray(size))).data) == block.data
        assert set(store.announced()) == {node.cid for node in made.nodes}

    def test_both_manifests_name_the_model(self, store: Store, made: Sample) -> None:
        fill(store, made)
        assert store.model(made.bare.cid).cid == made.signed.cid
        assert store.status(made.bare.cid).model.cid == made.signed.cid
        assert [status.model.cid for status in store.models()] == [made.signed.cid]

    def test_finishing_writes_the_files(self, store: Store, made: Sample, tmp_path: Path) -> None:
        assembly = begin(store, made)
        assembly.write(made.blocks())
        (path,) = assembly.finish(tmp_path / "out.gguf")
        assembly.close()
        assert path == tmp_path / "out.gguf"
        assert path.read_bytes() == made.files["tiny.gguf"]

    def test_missing_says_what_is_to_be_fetched(self, store: Store, made: Sample) -> None:
        assembly = begin(store, made)
        assert set(assembly.missing()) == set(made.placements)
        assert [p.part.rank for p in assembly.missing()] == sorted(p.part.rank for p in made.placements)
        first = made.blocks()[:5]
        assembly.write(first)
        assembly.write(first)
        assert {p.cid for p in assembly.missing()} == {b.cid for b in made.blocks()[5:]}
        with pytest.raises(BlockMissing):
            assembly.finish()
        assembly.close()

    def test_an_assembly_resumes(self, store: Store, made: Sample) -> None:
        first, rest = made.blocks()[:7], made.blocks()[7:]
        assembly = begin(store, made)
        assembly.write(first)
        assembly.close()
        store = self.reopen(store)
        assert not store.status(made.signed.cid).whole
        assembly = begin(store, made)
        assert assembly.local_blocks == len(first)
        assert {place.cid for place in assembly.missing()} == {block.cid for block in rest}
        assembly.write(rest)
        assembly.finish()
        assembly.close()
        assert store.status(made.signed.cid).whole

    def test_one_assembly_of_a_model_at_a_time(self, store: Store, made: Sample) -> None:
        assembly = begin(store, made)
        with pytest.raises(StoreLocked):
            begin(store, made)
        assembly.close()
        begin(store, made).close()

    def test_an_assembly_without_a_node_locks_nothing(self, store: Store, made: Sample) -> None:
        other = MemoryStore()
        put_nodes(other, made.nodes)
        model = other.model(made.signed.cid)
        for lacking in range(len(made.nodes)):
            put_nodes(store, made.nodes[:lacking])
            with pytest.raises(BlockMissing):
                store.assemble(model, made.placements, made.keys)
        begin(store, made).close()

    def test_a_block_without_a_place_is_refused(self, store: Store, made: Sample) -> None:
        assembly = begin(store, made)
        with pytest.raises(LocalProtocolError):
            assembly.write([Block.raw(b"stray")])
        assembly.close()

    def test_some_parts_then_the_rest(self, store: Store, made: Sample, tmp_path: Path) -> None:
        some = {PartKey("header"), PartKey("shared"), PartKey("layer", 1)} & made.keys
        fill(store, made, some)
        status = store.status(made.signed.cid)
        assert status.pinned == some
        assert status.complete >= some
        assert not status.whole
        partly = begin(store, made, some)
        with pytest.raises(InputError):
            partly.finish(tmp_path / "out.gguf")
        partly.close()
        assembly = begin(store, made)
        needed = {b.cid for b in made.blocks()} - {b.cid for b in made.blocks(some)}
        assert {place.cid for place in assembly.missing()} == needed
        assembly.write([block for block in made.blocks() if block.cid in needed])
        assembly.finish()
        assembly.close()
        assert store.status(made.signed.cid).whole
        assert store.status(made.signed.cid).pinned == made.keys

    def test_blocks_of_another_model_are_not_fetched(
        self, store: Store, made: Sample, tmp_path: Path
    ) -> None:
        fill(store, made)
        other = tiny_model(layers=3)
        assert isinstance(other.metadata, Mapping)
        metadata: Metadata = [*other.metadata.items(), ("general.note", "another")]
        derived = sample(tmp_path, TinyGGUF(other.tensors, metadata), "derived.gguf")
        assembly = begin(store, derived)
        assert {place.part.kind for place in assembly.missing()} == {"header"}
        assembly.write(derived.blocks({PartKey("header")}))
        (path,) = assembly.finish(tmp_path / "joined.gguf")
        assembly.close()
        assert path.read_bytes() == derived.files["derived.gguf"]

    def test_a_block_at_many_places(self, store: Store, tmp_path: Path) -> None:
        made = sample(tmp_path, repetitive(), "repetitive.gguf")
        assert len(made.blocks()) < len(made.placements)
        assembly = begin(store, made)
        assembly.write(made.blocks())
        (path,) = assembly.finish(tmp_path / "out.gguf")
        assembly.close()
        assert path.read_bytes() == made.files["repetitive.gguf"]
        assert store.status(made.signed.cid).bytes_held == sum(ref.size for ref in made.manifest.parts)

    def test_unpinning_keeps_the_blocks_for_now(self, store: Store, made: Sample) -> None:
        fill(store, made)
        store.unpin(made.signed.cid, [PartKey("layer", 0)])
        assert store.status(made.signed.cid).pinned == made.keys - {PartKey("layer", 0)}
        store.unpin(made.bare.cid)
        assert self.reopen(store).status(made.signed.cid).pinned == frozenset()
        with pytest.raises(BlockMissing):
            store.unpin(ABSENT)

    def test_mirrors_are_kept_beside_the_model(self, store: Store, made: Sample) -> None:
        fill(store, made)
        cid, urls = made.signed.cid, ["https://b.example/x.gguf", "https://a.example/"]
        assert store.mirrors(cid) == [] == store.mirrors(ABSENT)
        store.set_mirrors(cid, urls)
        store = self.reopen(store)
        assert store.mirrors(cid) == store.mirrors(made.bare.cid) == sorted(urls)
        assert store.status(cid).mirrors == tuple(sorted(urls))
        store.set_mirrors(made.bare.cid, urls[:1])
        assert store.mirrors(cid) == urls[:1]
        store.set_mirrors(cid, [])
        assert self.reopen(store).mirrors(cid) == []
        with pytest.raises(BlockMissing):
            store.set_mirrors(ABSENT, urls)

    def test_people_find_models(self, store: Store, made: Sample) -> None:
        fill(store, made)
        cid = made.signed.cid
        for text in (str(cid), f"ipfs://{cid}", str(cid)[:16], str(made.bare.cid)[:16], "tiny", " tiny "):
            assert store.find(text).cid == cid
        for text, error in (("tin", BlockMissing), (str(cid)[:7], BlockMissing), ("", BlockMissing)):
            with pytest.raises(error):
                store.find(text)
        with pytest.raises(MalformedCID):
            store.find(str(cid)[:-1] + "1")
        with pytest.raises(BlockMissing):
            store.find(str(ABSENT))

    def test_two_of_one_name_are_ambiguous(self, store: Store, made: Sample, tmp_path: Path) -> None:
        fill(store, made)
        (tmp_path / "other").mkdir()
        other = sample(tmp_path / "other", tiny_model(layers=1))
        fill(store, other)
        with pytest.raises(InputError) as caught:
            store.find("tiny")
        assert str(made.signed.cid) in str(caught.value)
        assert str(other.signed.cid) in str(caught.value)
        assert [status.model.manifest.name for status in store.models()] == ["tiny", "tiny"]

    def test_a_name_can_not_pass_for_a_cid(self, store: Store, made: Sample, tmp_path: Path) -> None:
        fill(store, made)
        disguise = str(made.signed.cid)[:20]
        (tmp_path / "other").mkdir()
        other = sample(tmp_path / "other", tiny_model(layers=1), f"{disguise}.gguf")
        fill(store, other)
        with pytest.raises(InputError, match="names 2 models"):
            store.find(disguise)

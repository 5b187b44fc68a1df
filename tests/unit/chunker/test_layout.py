from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from omnistore.block import BLOCK_SIZE, Block
from omnistore.chunker.describe import build_manifest, build_parts, quantisation
from omnistore.chunker.ggml import by_name
from omnistore.chunker.gguf import GGUFHeader, read_header_untrusted
from omnistore.chunker.layout import (
    Extent,
    Layout,
    Placement,
    gaps,
    layer_count,
    part_of,
    resolve_untrusted,
)
from omnistore.cid import CID
from omnistore.errors import MalformedManifest
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
from omnistore.testing.tiny_gguf import TinyGGUF, TinyTensor, block_tensors, split_set


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("blk.0.attn_q.weight", "layer.0"),
        ("blk.79.ffn_down.bias", "layer.79"),
        ("blk.4095.x", "layer.4095"),
        ("blk.4096.x", "shared"),
        ("blk.01.x", "shared"),
        ("blk.-1.x", "shared"),
        ("blk.٣.x", "shared"),
        ("blk.3", "shared"),
        ("blk.3.", "shared"),
        ("xblk.3.x", "shared"),
        ("token_embd.weight", "embed"),
        ("token_embd_norm.weight", "embed"),
        ("token_types.weight", "embed"),
        ("position_embd.weight", "embed"),
        ("output.weight", "head"),
        ("output.bias", "head"),
        ("output_norm.weight", "head"),
        ("rope_freqs.weight", "shared"),
        ("per_layer_token_embd.weight", "shared"),
        ("v.blk.3.attn_q.weight", "shared"),
        ("enc.blk.0.attn_q.weight", "shared"),
        ("mm.0.weight", "shared"),
    ],
)
def test_the_name_of_a_tensor_decides_its_part(name: str, part: str) -> None:
    assert str(part_of(name)) == part


def header_of(data: bytes, name: str = "m.gguf") -> GGUFHeader:
    return read_header_untrusted(data, file_size=len(data), name=name)


def test_blocks_are_cut_from_an_extents_own_start() -> None:
    extent = Extent(0, 100, 2 * BLOCK_SIZE + 5, PartKey("shared"), "x")
    assert list(extent.blocks()) == [
        (100, BLOCK_SIZE),
        (100 + BLOCK_SIZE, BLOCK_SIZE),
        (100 + 2 * BLOCK_SIZE, 5),
    ]
    assert extent.block_count == 3
    assert list(replace(extent, size=BLOCK_SIZE).blocks()) == [(100, BLOCK_SIZE)]


def test_gaps_are_what_no_tensor_covers() -> None:
    tensors = [
        TinyTensor("a", shape=(3,)),
        TinyTensor("b", shape=(8,)),
        TinyTensor("c", shape=(1,), gap=b"x" * 32),
    ]
    data = TinyGGUF(tensors, tail=b"tail").build()
    header = header_of(data)
    begin = header.size
    assert gaps(header, len(data)) == ((begin + 12, 20), (begin + 64, 32), (begin + 100, 28 + 4))


def test_a_file_without_tensors_has_no_gaps() -> None:
    data = TinyGGUF((), {"a": 1}, tail=b"tail").build()
    assert gaps(header_of(data), len(data)) == ()


@pytest.mark.parametrize(
    ("metadata", "layers", "count"),
    [
        ({"general.architecture": "llama", "llama.block_count": 3}, 2, 3),
        ({"general.architecture": "llama", "llama.block_count": 1}, 2, 2),
        ({"general.architecture": "llama", "llama.block_count": 4097}, 2, 2),
        ({"general.architecture": "llama", "llama.block_count": "3"}, 2, 2),
        ({"general.architecture": "llama", "llama.block_count": 32}, 0, 32),
        ({"general.architecture": "llama", "llama.block_count": True}, 0, 0),
        ({"unknown.block_count": 9}, 5, 9),
        ({}, 5, 5),
        ({}, 0, 0),
    ],
)
def test_layers_are_counted_by_metadata_and_by_name(
    metadata: dict[str, Any], layers: int, count: int
) -> None:
    assert layer_count([header_of(TinyGGUF(block_tensors(layers), metadata).build())]) == count


def test_quantisation_is_the_file_type_or_the_type_of_most_bytes() -> None:
    mixed = [
        TinyTensor("a", "F32", (32,)),
        TinyTensor("b", "Q8_0", (64, 64)),
        TinyTensor("c", "Q4_0", (64, 64)),
    ]
    assert quantisation([header_of(TinyGGUF(mixed, {"general.file_type": 15}).build())]) == "Q4_K_M"
    assert quantisation([header_of(TinyGGUF(mixed, {"general.file_type": 4711}).build())]) == "Q8_0"
    assert quantisation([header_of(TinyGGUF(mixed).build())]) == "Q8_0"
    assert quantisation([header_of(TinyGGUF().build())]) == "none"


# --- resolve ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What a fetch has in hand: replaced piece by piece, it must be refused."""

    manifest: Manifest
    parts: Mapping[PartKey, Part]
    headers: tuple[GGUFHeader, ...]
    layout: Layout
    cids: tuple[CID, ...]

    def resolve(self) -> tuple[Placement, ...]:
        return resolve_untrusted(self.manifest, self.parts, self.headers)

    def with_part(self, part: Part) -> Model:
        """The part replaced, and the manifest agreeing with its size."""
        refs = tuple(
            PartRef(part.key, part.size, part.encode().cid) if ref.key == part.key else ref
            for ref in self.manifest.parts
        )
        return replace(
            self, parts={**self.parts, part.key: part}, manifest=replace(self.manifest, parts=refs)
        )

    def with_tensor(self, name: str, **changes: Any) -> Model:
        part = self.parts[part_of(name)]
        assert isinstance(part, TensorPart)
        entries = tuple(replace(t, **changes) if t.name == name else t for t in part.tensors)
        return self.with_part(replace(part, tensors=entries))

    def with_header(self, file: int, **changes: Any) -> Model:
        part = self.parts[PartKey("header", file)]
        assert isinstance(part, HeaderPart)
        return self.with_part(replace(part, **changes))

    def with_files(self, *sizes: int) -> Model:
        files = tuple(FileEntry(f"{n}.gguf", size) for n, size in enumerate(sizes))
        return replace(self, manifest=replace(self.manifest, files=files))

    def with_refs(self, *refs: PartRef) -> Model:
        ordered = tuple(sorted(refs, key=lambda ref: ref.key.rank))
        return replace(self, manifest=replace(self.manifest, parts=ordered))


def model_of(files: Mapping[str, bytes]) -> Model:
    headers = tuple(header_of(data, name) for name, data in files.items())
    sizes = [len(data) for data in files.values()]
    found = {
        file: [(o, n) for o, n in gaps(header, len(data)) if any(data[o : o + n])]
        for file, (header, data) in enumerate(zip(headers, files.values(), strict=True))
    }
    layout = Layout.plan(headers, sizes, found)
    datas = list(files.values())
    cids = tuple(
        Block.raw(datas[extent.file][offset : offset + size]).cid
        for extent in layout.extents
        for offset, size in extent.blocks()
    )
    parts = [(part, part.encode()) for part in build_parts(headers, layout, cids)]
    entries = [FileEntry(name, len(data)) for name, data in files.items()]
    manifest = build_manifest(headers, entries, parts, name="m")
    return Model(manifest, {part.key: part for part, _ in parts}, headers, layout, cids)


@pytest.fixture(scope="module")
def model() -> Model:
    tensors = [*block_tensors(2), TinyTensor("blk.1.big", "I8", (BLOCK_SIZE, 2), gap=b"junk")]
    return model_of(split_set(TinyGGUF(tensors), "m", [3]))


def test_resolve_is_the_reverse_of_plan(model: Model) -> None:
    expected = [
        (extent.file, offset, size, extent.part)
        for extent in model.layout.extents
        for offset, size in extent.blocks()
    ]
    placements = model.resolve()
    assert [(p.file, p.offset, p.size, p.part) for p in placements] == expected
    assert [p.cid for p in placements] == list(model.cids)


def test_some_parts_resolve_without_the_others(model: Model) -> None:
    wanted = {PartKey("header", 0), PartKey("header", 1), PartKey("layer", 1)}
    some = replace(model, parts={key: model.parts[key] for key in wanted})
    assert set(some.resolve()) == {p for p in model.resolve() if p.part in wanted}


def unlisted(key: PartKey) -> Callable[[Model], Model]:
    return lambda m: m.with_refs(*(ref for ref in m.manifest.parts if ref.key != key))


def renamed(entry: TensorPart, old: str, new: str) -> TensorPart:
    return replace(entry, tensors=tuple(replace(t, name=new) if t.name == old else t for t in entry.tensors))


def wrong_part(m: Model) -> Model:
    """A tensor of layer 0 listed, too, in the shared part."""
    layer, shared = m.parts[PartKey("layer", 0)], m.parts[PartKey("shared")]
    assert isinstance(layer, TensorPart)
    assert isinstance(shared, TensorPart)
    moved = m.with_part(replace(shared, tensors=(layer.tensors[0], *shared.tensors)))
    # The manifest keeps the true size, as it must to get past the check of sums.
    return replace(moved, manifest=m.manifest)


def without_tensor(m: Model) -> Model:
    head = m.parts[PartKey("head")]
    assert isinstance(head, TensorPart)
    both = head.tensors
    one = replace(both[0], size=both[0].size + both[1].size)
    return m.with_part(replace(head, tensors=(one,)))


def listed_twice(m: Model) -> Model:
    head = m.parts[PartKey("head")]
    assert isinstance(head, TensorPart)
    a, b = head.tensors
    tensors = (a, replace(b, size=b.size - 1), replace(b, size=1))
    return m.with_part(replace(head, tensors=tensors))


def unknown_tensor(m: Model) -> Model:
    head = m.parts[PartKey("head")]
    assert isinstance(head, TensorPart)
    a, b = head.tensors
    extra = TensorEntry("output_extra", "F32", (1,), 4, a.blocks)
    return m.with_part(replace(head, tensors=(a, replace(b, size=b.size - 4), extra)))


def claims_size(key: PartKey, more: int) -> Callable[[Model], Model]:
    def change(m: Model) -> Model:
        return m.with_refs(
            *(replace(ref, size=ref.size + more) if ref.key == key else ref for ref in m.manifest.parts)
        )

    return change


def padding(offset: int, size: int) -> Callable[[Model], Model]:
    """Padding at `offset` from the end of file 1's header."""

    def change(m: Model) -> Model:
        place = m.headers[1].size + offset
        entry = PaddingEntry(place, size, (m.cids[0],) * -(-size // BLOCK_SIZE))
        return m.with_header(1, padding=(entry,))

    return change


def padding_twice(m: Model) -> Model:
    part = m.parts[PartKey("header", 1)]
    assert isinstance(part, HeaderPart)
    return m.with_header(1, padding=part.padding * 2)


def padding_beyond_the_end(m: Model) -> Model:
    return m.with_header(1, padding=(PaddingEntry(m.manifest.files[1].size, 8, (m.cids[0],)),))


def shrunk(m: Model, by: int) -> Model:
    return m.with_files(m.manifest.files[0].size, m.manifest.files[1].size - by)


Q = "blk.0.attn_q.weight"
LAYER = PartKey("layer", 0)
DISAGREEMENTS: dict[str, tuple[Callable[[Model], Model], str]] = {
    "a tensor in two headers": (
        lambda m: replace(m, headers=(m.headers[0], m.headers[0])),
        "is in m-00001.* and in m-00002",
    ),
    "fewer headers than files": (lambda m: replace(m, headers=m.headers[:1]), "2 files but 1 headers"),
    "more files than headers": (lambda m: m.with_files(1 << 20, 1 << 30, 9), "3 files but 2 headers"),
    "a file shorter than its header": (
        lambda m: m.with_files(8, m.manifest.files[1].size),
        "its header takes",
    ),
    "a tensor beyond the file": (lambda m: shrunk(m, 64), "beyond the end"),
    "wrong number of layers": (lambda m: replace(m, manifest=replace(m.manifest, layers=3)), "3 layers"),
    "a part that is not listed": (unlisted(LAYER), "belongs to part layer.0, which is not listed"),
    "a header part that is not listed": (unlisted(PartKey("header", 1)), "no header part for file 1"),
    "a part without tensors": (
        lambda m: m.with_refs(*m.manifest.parts, PartRef(PartKey("layer", 7), 4, m.cids[0])),
        "no tensor belongs to it",
    ),
    "a header part of no file": (
        lambda m: m.with_refs(*m.manifest.parts, PartRef(PartKey("header", 2), 4, m.cids[0])),
        "lists part header.2",
    ),
    "a part size that is not the sum": (claims_size(LAYER, 4), "said to hold"),
    "a header part size that is not the sum": (claims_size(PartKey("header", 1), 1), "but the manifest says"),
    "a part under another's key": (
        lambda m: replace(m, parts={LAYER: m.parts[PartKey("layer", 1)]}),
        "not one of this manifest's",
    ),
    "a part of another model": (
        lambda m: replace(m, parts={PartKey("layer", 9): TensorPart(PartKey("layer", 9), ())}),
        "not one of this manifest's",
    ),
    "a tensor part where a header belongs": (
        lambda m: replace(m, parts={PartKey("header", 0): TensorPart(PartKey("header", 0), ())}),
        "not one of this manifest's",
    ),
    "a tensor in the wrong part": (wrong_part, "shared holds"),
    "a tensor that the part lacks": (without_tensor, "lacks tensor 'output_norm.weight'"),
    "a tensor listed twice": (listed_twice, "lists twice"),
    "a tensor of no header": (unknown_tensor, "lists, against the headers, tensor 'output_extra'"),
    "another type": (lambda m: m.with_tensor(Q, type="I32"), "describes tensor 'blk.0.attn_q.weight'"),
    "another shape": (lambda m: m.with_tensor(Q, shape=(8, 32)), "describes tensor"),
    "another size": (lambda m: m.with_tensor(Q, size=1020), "said to hold"),
    "too many blocks": (lambda m: m.with_tensor(Q, blocks=m.cids[:2]), "can not be 2 blocks"),
    "too few blocks": (lambda m: m.with_tensor("blk.1.big", blocks=m.cids[:1]), "can not be 1 blocks"),
    "no blocks": (lambda m: m.with_tensor(Q, blocks=()), "can not be 0 blocks"),
    "another header size": (lambda m: m.with_header(0, header_size=5000), "says the header takes 5000"),
    "too many header blocks": (lambda m: m.with_header(0, blocks=m.cids[:2]), "can not be 2 blocks"),
    "padding over a tensor": (padding(0, 32), "is no gap"),
    "padding over the header": (padding(-32, 32), "is no gap"),
    "padding twice": (padding_twice, "is no gap"),
    "padding beyond the end": (padding_beyond_the_end, "is no gap"),
}


@pytest.mark.parametrize("fault", DISAGREEMENTS)
def test_a_disagreement_is_refused(model: Model, fault: str) -> None:
    change, says = DISAGREEMENTS[fault]
    model.resolve()
    with pytest.raises(MalformedManifest, match=says):
        change(model).resolve()


def test_a_header_that_says_otherwise_is_refused(model: Model) -> None:
    tensors = tuple(replace(t, type=by_name("I32")) if t.name == Q else t for t in model.headers[0].tensors)
    with pytest.raises(MalformedManifest, match="describes tensor"):
        replace(model, headers=(replace(model.headers[0], tensors=tensors), model.headers[1])).resolve()


def test_a_file_without_tensors_is_all_header() -> None:
    model = model_of({"v.gguf": TinyGGUF((), {"a": "b"}).build()})
    (placement,) = model.resolve()
    assert (placement.offset, placement.size) == (0, model.manifest.files[0].size)
    with pytest.raises(MalformedManifest, match="its header takes"):
        model.with_files(model.manifest.files[0].size + 1).resolve()

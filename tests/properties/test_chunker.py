"""Cutting and joining any GGUF gives back its bytes; damaged headers give exactly two errors."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from omnistore.block import BLOCK_SIZE
from omnistore.chunker.cut import CutResult, cut
from omnistore.chunker.gguf import StringArray, read_header_untrusted
from omnistore.chunker.join import join
from omnistore.chunker.layout import Placement, part_of, resolve_untrusted
from omnistore.errors import MalformedGGUF, UnsupportedGGUF
from omnistore.manifest import PartKey, manifest_untrusted, part_untrusted
from omnistore.testing.tiny_gguf import TinyGGUF, TinyTensor, Typed, split_set

NAMES = [
    "token_embd.weight", "output.weight", "output_norm.weight", "rope_freqs.weight", "v.blk.0.ln.weight",
    "mm.0.bias",
    *(f"blk.{layer}.{kind}.weight" for layer in (0, 1, 2, 10) for kind in ("attn_q", "attn_k", "ffn_up")),
]  # fmt: skip
SHAPES = [
    ("F32", (1,)),
    ("F32", (8, 3)),
    ("F16", (5,)),
    ("Q4_0", (32, 2)),
    ("Q8_0", (64,)),
    ("Q4_K", (256, 2)),
]
# An extent just below, at and above a block's size, and one of several blocks.
LARGE = [("I8", (BLOCK_SIZE + more,)) for more in (-1, 0, 1, 2 * BLOCK_SIZE)]


@st.composite
def models(draw: st.DrawFn) -> dict[str, bytes]:
    """A model of one to three files: any order, runs, gaps, fill and alignment."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=10))
    large = draw(st.integers(0, 20)) if names else 20
    tensors = []
    for number, name in enumerate(names):
        kind, shape = draw(st.sampled_from(LARGE if number == large else SHAPES))
        gap = draw(st.sampled_from([b"", b"", b"", bytes(64), b"\0\0x", b"y" * 40]))
        content = draw(st.sampled_from([None, None, 0]))
        tensor = TinyTensor(name, kind, shape, gap=gap)
        data = None if content is None else bytes(len(tensor.payload()))
        tensors.append(TinyTensor(name, kind, shape, data, gap=gap))
    model = TinyGGUF(
        tensors,
        {
            "general.architecture": "llama",
            "tokenizer.ggml.tokens": draw(st.lists(st.text(max_size=9), max_size=5)),
        },
        version=draw(st.sampled_from([2, 3])),
        alignment=draw(st.sampled_from([8, 32, 64, 256])),
        data_order=draw(st.permutations(range(len(tensors)))),
        fill=draw(st.sampled_from([0, 0, 0x20])),
        tail=draw(st.sampled_from([b"", b"", bytes(100), b"tail"])),
        pad_end=draw(st.booleans()),
    )
    cuts = draw(st.lists(st.integers(0, len(tensors)), max_size=2)) if tensors else []
    return split_set(model, "m", sorted(cuts)) if cuts else {"m.gguf": model.build()}


def cut_files(directory: Path, files: Mapping[str, bytes]) -> tuple[CutResult, list[Placement]]:
    paths = [directory / name for name in files]
    for path, data in zip(paths, files.values(), strict=True):
        path.write_bytes(data)
    placements: list[Placement] = []
    return cut(paths, sink=placements.extend), placements


@settings(max_examples=150, deadline=None)
@given(files=models())
def test_join_of_cut_is_the_file(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        result, cut_at = cut_files(directory, files)
        datas = list(files.values())
        blocks = {p.cid: datas[p.file][p.offset : p.offset + p.size] for p in cut_at}
        assert max((p.size for p in cut_at), default=0) <= BLOCK_SIZE

        # The receiving side knows the manifest, the part nodes and the blocks, and nothing else.
        manifest = manifest_untrusted(result.node)
        parts = {
            ref.key: part_untrusted(node, ref)
            for ref, (_, node) in zip(manifest.parts, result.parts, strict=True)
        }
        headers = []
        for number, entry in enumerate(manifest.files):
            links = parts[PartKey("header", number)].links()
            data = b"".join(blocks[cid] for cid, _ in links)[: result.headers[number].size]
            headers.append(read_header_untrusted(data, file_size=entry.size, name=entry.name))
        placements = resolve_untrusted(manifest, parts, headers)
        assert list(placements) == cut_at

        out = directory / "out"
        out.mkdir()
        joined = join(manifest.files, placements, blocks.__getitem__, out)
        assert {path.name: path.read_bytes() for path in joined} == files


@settings(max_examples=50, deadline=None)
@given(files=models(), data=st.data())
def test_a_partial_set_of_parts_places_only_its_own_bytes(
    files: dict[str, bytes], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        result, cut_at = cut_files(Path(name), files)
    parts = {part.key: part for part, _ in result.parts}
    wanted = data.draw(st.sets(st.sampled_from(sorted(parts, key=lambda key: key.rank))))
    some = {key: part for key, part in parts.items() if key in wanted}
    found = resolve_untrusted(result.manifest, some, result.headers)
    assert list(found) == [p for p in cut_at if p.part in wanted]
    assert sum(p.size for p in found) == sum(part.size for part in some.values())


@given(st.text(max_size=30))
def test_every_name_has_a_part(name: str) -> None:
    key = part_of(name)
    assert (key.kind == "layer") == (key.index > 0 or key == PartKey("layer", 0))
    assert 0 <= key.index < 4096


WHOLE = TinyGGUF(
    [TinyTensor("token_embd.weight", "Q8_0", (32, 4)), TinyTensor("blk.0.ffn_up.weight", "F16", (5, 3))],
    {
        "general.architecture": "llama",
        "general.alignment": 32,
        "tokens": ["a", "bc", ""],
        "flags": Typed("bool", [True, False]),
        "scores": Typed("f32", [0.5, 1.5]),
        "u64": Typed("u64", 5),
    },
).build()
DAMAGE = st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), max_size=4)


@settings(max_examples=1500, deadline=None)
@given(flips=DAMAGE, size=st.integers(0, len(WHOLE)) | st.just(len(WHOLE)))
def test_a_damaged_header_is_read_or_refused(flips: list[tuple[int, int]], size: int) -> None:
    damaged = bytearray(WHOLE)
    for place, flip in flips:
        damaged[place] ^= flip
    check_reader(bytes(damaged[:size]))


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_behind_the_magic_are_read_or_refused(data: bytes) -> None:
    check_reader(b"GGUF\x03\0\0\0" + data)


@settings(max_examples=500, deadline=None)
@given(
    place=st.integers(8, len(WHOLE) - 8),
    number=st.integers(0, 2**64 - 1) | st.integers(0, 64).map(lambda bit: max(2**bit - 1, 0)),
)
def test_any_number_anywhere_is_read_or_refused(place: int, number: int) -> None:
    check_reader(WHOLE[:place] + number.to_bytes(8, "little") + WHOLE[place + 8 :])


def check_reader(data: bytes) -> None:
    """The reader gives a header whose claims hold, or raises one of its two classes."""
    try:
        header = read_header_untrusted(data, file_size=len(data), name="x.gguf")
    except (MalformedGGUF, UnsupportedGGUF) as error:
        assert type(error) in (MalformedGGUF, UnsupportedGGUF)
        return
    end = header.metadata_size
    for tensor in header.in_file_order():
        assert end <= tensor.offset
        assert tensor.size > 0
        end = tensor.offset + tensor.size
    assert end <= len(data)
    assert header.metadata_size <= header.size <= len(data)
    for value in header.metadata.values():
        if isinstance(value, StringArray):
            assert all(len(value.raw(n)) <= len(data) for n in range(len(value)))

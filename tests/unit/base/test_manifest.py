"""Manifests, parts and signed manifests: limits, names, round trips, determinism."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnistore import dagcbor
from omnistore.block import BLOCK_SIZE, Block
from omnistore.errors import MalformedManifest, TrustError
from omnistore.keys import PrivateKey
from omnistore.manifest import (
    MAX_FILES,
    MAX_LAYERS,
    MAX_SIZE,
    MAX_TENSORS,
    FileEntry,
    Manifest,
    PartKey,
    PartRef,
    SignedManifest,
    TensorEntry,
    TensorPart,
    is_file_name,
    manifest_untrusted,
    open_untrusted,
    part_links_untrusted,
    part_untrusted,
    signed_untrusted,
)

VECTORS = Path(__file__).resolve().parents[3] / "spec" / "vectors"
VALID = json.loads((VECTORS / "manifest.json").read_text())["valid"]
KEY = PrivateKey(bytes.fromhex(VALID["seed"]))
OTHER = Block.node(b"\xa0").cid
BARE = Block.node(bytes.fromhex(VALID["manifest"]["hex"]))
MODEL = manifest_untrusted(BARE)
SIGNED = SignedManifest.sign(BARE.cid, KEY)
BLOCKS = [Block.node(bytes.fromhex(part["hex"])) for part in VALID["parts"]]
PARTS = [part_untrusted(block, ref) for block, ref in zip(BLOCKS, MODEL.parts, strict=True)]


# --- limits ---------------------------------------------------------------------------------


def split_set(count: int, layers: int = 0) -> Manifest:
    files = [FileEntry(f"m-{n:05}-of-{count:05}.gguf", 1 << 20) for n in range(1, count + 1)]
    keys = [PartKey("header", n) for n in range(count)] + [PartKey("layer", n) for n in range(layers)]
    parts = tuple(PartRef(key, 1, OTHER) for key in keys)
    return dataclasses.replace(MODEL, files=tuple(files), parts=parts, layers=layers)


def test_the_largest_manifest() -> None:
    most = split_set(MAX_FILES, MAX_LAYERS)
    assert manifest_untrusted(most.encode()) == most


def test_too_many_files() -> None:
    with pytest.raises(MalformedManifest, match="files is not a list of 1 to 1024"):
        manifest_untrusted(split_set(MAX_FILES + 1).encode())


def test_too_many_layers() -> None:
    with pytest.raises(MalformedManifest, match="4097"):
        manifest_untrusted(split_set(1, MAX_LAYERS + 1).encode())


def test_too_many_parts() -> None:
    most = split_set(MAX_FILES, MAX_LAYERS)
    more = dataclasses.replace(most, parts=most.parts + (PartRef(PartKey("head"), 1, OTHER),) * 4)
    with pytest.raises(MalformedManifest, match="parts is not a list of 1 to 5123"):
        manifest_untrusted(more.encode())


def test_too_many_tensors() -> None:
    node = dagcbor.encode({"kind": "shared", "tensors": [None] * (MAX_TENSORS + 1)})
    with pytest.raises(MalformedManifest, match="list of 1 to 65536"):
        part_links_untrusted(Block.node(node))


def test_a_part_of_a_petabyte_needs_its_links() -> None:
    """A claim of size costs its author a link per mebibyte, so no node can claim much."""
    entry = {"name": "x", "type": "I8", "shape": [], "size": MAX_SIZE, "blocks": [Block.raw(b"").cid]}
    node = dagcbor.encode({"kind": "shared", "tensors": [entry]})
    with pytest.raises(MalformedManifest, match="need 1073741824 blocks"):
        part_links_untrusted(Block.node(node))


# --- file names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.gguf", "x", "Llama-3.2-1B-Instruct-Q4_K_M.gguf", "мой-модель.gguf", "模型.gguf", "a b.gguf",
        "a'b(1).gguf", "console.gguf", "com10.gguf", "nul-model.gguf", "aux_.gguf", "x.nul", "-o.gguf",
        "~x.gguf", "x" * 200, "é" * 100,
        "sha256-6a0746a1ec1aef3e7ec53868f220ff6e389f6f8ef87a01d77c96807de94ca2aa",
    ],
)  # fmt: skip
def test_a_file_name_that_people_use(name: str) -> None:
    assert is_file_name(name)
    named = dataclasses.replace(MODEL, files=(FileEntry(name, 1 << 21),), parts=MODEL.parts[:1])
    assert manifest_untrusted(named.encode()) == named


@given(st.text(max_size=220))
def test_a_file_name_stays_in_its_directory(name: str) -> None:
    if is_file_name(name):
        assert not set(name) & set('/\\:\0*?"<>|')
        assert name.strip(" ") == name
        assert not name.startswith(".") and not name.endswith(".")
        assert 0 < len(name.encode()) <= 200


# --- what is accepted -----------------------------------------------------------------------


def test_a_manifest_is_read_as_it_was_written() -> None:
    assert manifest_untrusted(BARE) == open_untrusted(BARE) == MODEL
    assert MODEL.part(PartKey("layer", 0)) == MODEL.parts[3]
    assert MODEL.part(PartKey("layer", 2)) is None
    assert MODEL.size == sum(entry.size for entry in MODEL.files)


@pytest.mark.parametrize("number", range(len(PARTS)))
def test_a_part_is_read_as_it_was_written(number: int) -> None:
    part, block = PARTS[number], BLOCKS[number]
    assert part.encode() == block
    assert part_untrusted(block, MODEL.parts[number]) == part
    links = part.links()
    assert part_links_untrusted(block) == tuple(cid for cid, _ in links)
    assert sum(size for _, size in links) == part.size
    assert all(0 < size <= BLOCK_SIZE for _, size in links)


@pytest.mark.parametrize(
    ("node", "ref"), [(a, b) for a in range(len(PARTS)) for b in range(len(PARTS)) if a != b]
)
def test_a_part_is_not_taken_for_another(node: int, ref: int) -> None:
    with pytest.raises(MalformedManifest):
        part_untrusted(BLOCKS[node], MODEL.parts[ref])


def test_a_scalar_has_no_dimensions() -> None:
    part = TensorPart(PartKey("shared"), (TensorEntry("", "F64", (), 8, (Block.raw(b"8").cid,)),))
    assert part_untrusted(part.encode(), PartRef(part.key, 8, part.encode().cid)) == part


def test_signing_is_deterministic() -> None:
    again = SignedManifest.sign(MODEL.encode().cid, PrivateKey(KEY.seed))
    assert again == SIGNED
    assert again.encode() == SIGNED.encode()
    assert SignedManifest.sign(OTHER, KEY).encode() != SIGNED.encode()


def test_a_signed_manifest_is_read_as_it_was_written() -> None:
    assert signed_untrusted(SIGNED.encode()) == open_untrusted(SIGNED.encode()) == SIGNED
    assert SIGNED.publisher == KEY.public


def test_the_order_of_facts_does_not_matter() -> None:
    turned = dataclasses.replace(MODEL, facts=dict(reversed(MODEL.facts.items())))
    assert turned.encode() == BARE


@given(st.integers(min_value=0), st.integers(1, 255))
def test_any_altered_byte_of_a_signed_manifest_is_refused(place: int, flip: int) -> None:
    altered = bytearray(SIGNED.encode().data)
    altered[place % len(altered)] ^= flip
    with pytest.raises(TrustError):
        open_untrusted(Block.node(bytes(altered)))


@given(st.sampled_from([BARE, *BLOCKS]), st.integers(min_value=0), st.integers(1, 255))
def test_an_altered_byte_gives_another_node_or_none(block: Block, place: int, flip: int) -> None:
    """Whatever is accepted is written back to the very same bytes: there is no second encoding."""
    altered = bytearray(block.data)
    altered[place % len(altered)] ^= flip
    node = Block.node(bytes(altered))
    try:
        if block is BARE:
            assert manifest_untrusted(node).encode() == node
        else:
            assert part_links_untrusted(node)
    except MalformedManifest as error:
        assert len(error.message) < 600


LABEL = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=256)


@given(
    LABEL,
    LABEL,
    st.integers(0, MAX_LAYERS),
    st.dictionaries(st.sampled_from(["parameters", "context_length"]), st.integers(0, 1 << 62)),
    st.none() | st.binary(min_size=32, max_size=32),
)
def test_any_manifest_within_bounds(
    name: str, architecture: str, layers: int, facts: dict[str, int], sha256: bytes | None
) -> None:
    manifest = Manifest(
        name=name,
        architecture=architecture,
        quantisation="F16",
        layers=layers,
        files=(FileEntry("m.gguf", 100, sha256),),
        parts=(PartRef(PartKey("header"), 100, OTHER),),
        facts=facts,
    )
    assert manifest_untrusted(manifest.encode()) == manifest


@given(
    st.dictionaries(
        st.text(max_size=40).filter(lambda name: name.isprintable()), st.integers(1, 3 * BLOCK_SIZE)
    )
)
def test_any_part_within_bounds(sizes: dict[str, int]) -> None:
    if not sizes:
        return
    tensors = tuple(
        TensorEntry(
            name,
            "I8",
            (size,),
            size,
            tuple(Block.raw(f"{name} {n}".encode()).cid for n in range(math.ceil(size / BLOCK_SIZE))),
        )
        for name, size in sorted(sizes.items(), key=lambda item: item[0].encode())
    )
    part = TensorPart(PartKey("layer", 7), tensors)
    block = part.encode()
    assert part_untrusted(block, PartRef(part.key, sum(sizes.values()), block.cid)) == part
    assert [size for _, size in part.links()] == [
        min(BLOCK_SIZE, tensor.size - start)
        for tensor in tensors
        for start in range(0, tensor.size, BLOCK_SIZE)
    ]


def test_parts_name_themselves() -> None:
    names = [str(PartKey(kind, 3)) for kind in ("header", "shared", "embed", "layer", "head")]
    assert names == ["header.3", "shared", "embed", "layer.3", "head"]
    ranks = [
        PartKey(kind, index).rank
        for kind in ("header", "shared", "embed", "layer", "head")
        for index in (0, 9)
    ]
    assert ranks == sorted(ranks)

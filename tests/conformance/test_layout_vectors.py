"""spec/vectors/layout.json and gguf-bad.json: golden CIDs. A silent change here forks the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from omnistore.block import Block
from omnistore.chunker.cut import cut
from omnistore.chunker.gguf import read_header_untrusted
from omnistore.chunker.layout import Placement, resolve_untrusted
from omnistore.cid import CID, DAG_CBOR
from omnistore.errors import MalformedGGUF, UnsupportedGGUF
from omnistore.manifest import PartKey, manifest_untrusted, part_untrusted
from omnistore.testing.bad_gguf import bad_ggufs

VECTORS = Path(__file__).resolve().parent.parent.parent / "spec" / "vectors"
LAYOUT = json.loads((VECTORS / "layout.json").read_text())
BAD = json.loads((VECTORS / "gguf-bad.json").read_text())
BY_NAME = {vector["name"]: vector for vector in LAYOUT}


def file_bytes(file: dict[str, Any]) -> bytes:
    data = b"".join(
        bytes.fromhex(piece["hex"])
        if "hex" in piece
        else blake3(piece["blake3_xof_of"].encode()).digest(length=piece["size"])
        for piece in file["segments"]
    )
    assert len(data) == file["size"]
    return data


def node(entry: dict[str, Any]) -> Block:
    """An encoded node of a vector: it must be what its CID says."""
    block = Block.verify_untrusted(CID.parse_untrusted(entry["cid"]), bytes.fromhex(entry["node"]))
    assert block.cid.codec == DAG_CBOR
    return block


@pytest.mark.parametrize("vector", LAYOUT, ids=lambda vector: vector["name"])
def test_cutting_gives_the_golden_cids(vector: dict[str, Any], tmp_path: Path) -> None:
    paths = [tmp_path / file["name"] for file in vector["files"]]
    for path, file in zip(paths, vector["files"], strict=True):
        path.write_bytes(file_bytes(file))
    placements: list[Placement] = []
    result = cut(paths, sink=placements.extend)
    assert result.manifest.name == vector["model_name"]
    assert [
        {
            "kind": part.key.kind,
            "index": part.key.index,
            "size": part.size,
            "cid": str(block.cid),
            "node": bytes(block.data).hex(),
        }
        for part, block in result.parts
    ] == vector["parts"]
    assert {"cid": str(result.node.cid), "node": bytes(result.node.data).hex()} == vector["manifest"]
    assert [
        {"file": p.file, "offset": p.offset, "size": p.size, "part": str(p.part), "cid": str(p.cid)}
        for p in placements
    ] == vector["blocks"]


@pytest.mark.parametrize("vector", LAYOUT, ids=lambda vector: vector["name"])
def test_the_nodes_place_every_block(vector: dict[str, Any]) -> None:
    """The receiving side, from the vector's nodes and header bytes alone."""
    manifest = manifest_untrusted(node(vector["manifest"]))
    parts = {
        ref.key: part_untrusted(node(entry), ref)
        for ref, entry in zip(manifest.parts, vector["parts"], strict=True)
    }
    datas = [file_bytes(file) for file in vector["files"]]
    headers = []
    for number, (entry, data) in enumerate(zip(manifest.files, datas, strict=True)):
        blocks = [b for b in vector["blocks"] if b["part"] == str(PartKey("header", number))]
        prefix = b"".join(data[b["offset"] : b["offset"] + b["size"]] for b in blocks)
        headers.append(read_header_untrusted(prefix, file_size=entry.size, name=entry.name))
    rebuilt = [bytearray(len(data)) for data in datas]
    for placement in resolve_untrusted(manifest, parts, headers):
        place = slice(placement.offset, placement.offset + placement.size)
        data = datas[placement.file][place]
        assert Block.raw(data).cid == placement.cid
        rebuilt[placement.file][place] = data
    assert rebuilt == datas


@pytest.mark.parametrize(
    "name", ["output-first", "other-template", "zero-padding", "version-2-alignment-64", "split-set"]
)
def test_the_same_tensors_are_the_same_parts(name: str) -> None:
    def parts(vector: dict[str, Any]) -> dict[tuple[str, int], str]:
        return {(p["kind"], p["index"]): p["cid"] for p in vector["parts"] if p["kind"] != "header"}

    assert parts(BY_NAME[name]) == parts(BY_NAME["two-layers"])


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad["fault"])
def test_a_bad_file_is_refused(bad: dict[str, str]) -> None:
    data = bytes.fromhex(bad["hex"])
    with pytest.raises((MalformedGGUF, UnsupportedGGUF)) as caught:
        read_header_untrusted(data, file_size=len(data), name="x.gguf")
    assert type(caught.value).__name__ == bad["error"]


def test_every_small_bad_file_is_a_vector() -> None:
    ours = {bad.fault: bad.data.hex() for bad in bad_ggufs() if len(bad.data) <= 8192}
    assert {bad["fault"]: bad["hex"] for bad in BAD} == ours

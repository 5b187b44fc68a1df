"""Manifests, parts and signed manifests that are refused, each named by its fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import cbor2
import pytest

from omnistore import dagcbor
from omnistore.block import BLOCK_SIZE, MAX_BLOCK_SIZE, Block
from omnistore.cid import CID
from omnistore.errors import BadSignature, MalformedManifest, OmniError, TrustError
from omnistore.keys import PrivateKey
from omnistore.manifest import (
    SIGNATURE_DOMAIN,
    SIGNATURE_PAYLOAD_TYPE,
    FileEntry,
    HeaderPart,
    Manifest,
    PaddingEntry,
    Part,
    PartKey,
    PartRef,
    SignedManifest,
    TensorEntry,
    TensorPart,
    manifest_untrusted,
    open_untrusted,
    part_links_untrusted,
    part_untrusted,
    signed_untrusted,
)

KEY = PrivateKey(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
"""The secret key of RFC 8032's first test: the best known secret there is."""
Node = dict[str, Any]


def example() -> tuple[Manifest, list[tuple[Part, Block]]]:
    """A model of two files, one layer, a tensor of two blocks and a padding. Its bytes are made up."""

    def raw(text: str) -> CID:
        return Block.raw(text.encode()).cid

    parts: list[Part] = [
        HeaderPart(
            PartKey("header", 0), 600, (raw("header 0"),), (PaddingEntry(1000, 24, (raw("padding"),)),)
        ),
        HeaderPart(PartKey("header", 1), 96, (raw("header 1"),), ()),
        TensorPart(
            PartKey("embed"),
            (TensorEntry("token_embd.weight", "F16", (32, 8), 512, (raw("embed"),)),),
        ),
        TensorPart(
            PartKey("layer", 0),
            (
                TensorEntry("blk.0.attn_norm.weight", "F32", (32,), 128, (raw("norm"),)),
                TensorEntry("blk.0.ffn_up.weight", "I8", (1024, 1025), 1_049_600, (raw("up 0"), raw("up 1"))),
            ),
        ),
    ]
    nodes = [(part, part.encode()) for part in parts]
    manifest = Manifest(
        name="example",
        architecture="llama",
        quantisation="F16",
        layers=1,
        files=(
            FileEntry("example-00001-of-00002.gguf", 2048, bytes(range(32))),
            FileEntry("example-00002-of-00002.gguf", 1_050_000),
        ),
        parts=tuple(PartRef(part.key, part.size, block.cid) for part, block in nodes),
        facts={"context_length": 128, "parameters": 1_049_888, "license": "apache-2.0"},
        base=Block.node(b"\xa0").cid,
    )
    return manifest, nodes


Change = Callable[[Node], object]


def changed(block: Block, change: Change) -> bytes:
    node = dagcbor.decode_untrusted(bytes(block.data), limit=1 << 21)
    assert isinstance(node, dict)
    change(node)
    return dagcbor.encode(node)


def bad_manifests(good: Block) -> dict[str, bytes]:
    def put(**fields: Any) -> Change:
        return lambda node: node.update(fields)

    def file(**fields: Any) -> Change:
        return lambda node: node["files"][1].update(fields)

    def ref(number: int, **fields: Any) -> Change:
        return lambda node: node["parts"][number].update(fields)

    def only_file(name: str) -> Change:
        def change(node: Node) -> None:
            del node["files"][1], node["parts"][1]
            node["files"][0] = {"name": name, "size": 2_000_000}

        return change

    raw, manifest = Block.raw(b"x").cid, good.cid
    changes: dict[str, Change] = {
        "version 2": put(omni=2),
        "version 0": put(omni=0),
        "version is text": put(omni="1"),
        "version is true": put(omni=True),
        "version is missing": lambda node: node.pop("omni"),
        "unknown field": put(author="x"),
        "name is missing": lambda node: node.pop("name"),
        "parts are missing": lambda node: node.pop("parts"),
        "facts are missing": lambda node: node.pop("facts"),
        "name is empty": put(name=""),
        "name is bytes": put(name=b"x"),
        "name of 257 characters": put(name="x" * 257),
        "name has an escape": put(name="\x1b[2J"),
        "architecture is null": put(architecture=None),
        "quantisation has a newline": put(quantisation="Q4\n"),
        "layers is text": put(layers="1"),
        "layers is true": put(layers=True),
        "layers is negative": put(layers=-1),
        "layers is 4097": put(layers=4097),
        "layer beyond layers": put(layers=0),
        "files is a map": put(files={}),
        "no files": put(files=[]),
        "file is text": put(files=["x.gguf", "y.gguf"]),
        "two files of one name": file(name="example-00001-of-00002.gguf"),
        "files are not a split set": file(name="other.gguf"),
        "split set out of order": lambda node: node["files"].reverse(),
        "file size 0": file(size=0),
        "file size negative": file(size=-1),
        "file size beyond 2^50": file(size=2**50 + 1),
        "file size is text": file(size="1"),
        "unknown field of a file": file(offset=0),
        "sha256 of 31 bytes": file(sha256=bytes(31)),
        "sha256 is text": file(sha256="00" * 32),
        "sha256 is null": file(sha256=None),
        "no parts": put(parts=[]),
        "parts out of order": lambda node: node["parts"].reverse(),
        "part listed twice": lambda node: node["parts"].append(node["parts"][-1]),
        "layer before embed": lambda node: node["parts"].append(node["parts"].pop(2)),
        "header part missing": lambda node: node["parts"].pop(1),
        "header of a third file": ref(1, index=2),
        "unknown kind": ref(2, kind="block"),
        "kind is an integer": ref(2, kind=1),
        "embed with index 1": ref(2, index=1),
        "index is true": ref(1, index=True),
        "index is negative": ref(3, index=-1),
        "layer 4096": ref(3, index=4096),
        "part without index": lambda node: node["parts"][2].pop("index"),
        "part size 0": ref(2, size=0),
        "part size beyond 2^50": ref(2, size=2**50 + 1),
        "parts larger than the files": ref(2, size=1_500_000),
        "part link is raw": ref(2, link=raw),
        "part link is bytes": ref(2, link=manifest.binary),
        "part link is text": ref(2, link=str(manifest)),
        "unknown field of a part": ref(2, offset=0),
        "facts is a list": put(facts=[]),
        "unknown fact": put(facts={"price": 1}),
        "parameters is text": put(facts={"parameters": "7B"}),
        "parameters is negative": put(facts={"parameters": -1}),
        "parameters beyond 2^62": put(facts={"parameters": 2**62 + 1}),
        "license is an integer": put(facts={"license": 1}),
        "license is empty": put(facts={"license": ""}),
        "description of 4097 characters": put(facts={"description": "x" * 4097}),
        "base is raw": put(base=raw),
        "base is null": put(base=None),
    }
    names = [
        "",
        ".",
        "..",
        "../x.gguf",
        "a/b.gguf",
        "/x.gguf",
        "a\\b.gguf",
        "C:\\x.gguf",
        "C:x.gguf",
        "x.gguf:stream",
        "x\0.gguf",
        "x\n.gguf",
        "x\x1b[2J.gguf",
        "x\x7f.gguf",
        "x\x85.gguf",
        "\u202effug.exe",
        "x\u2066.gguf",
        "*.gguf",
        "x?.gguf",
        'x".gguf',
        "<x>.gguf",
        "x|y.gguf",
        ".bashrc",
        " x.gguf",
        "x.gguf ",
        "x.gguf.",
        "NUL",
        "con.gguf",
        "Com1.gguf",
        "LPT9",
        "lpt²",
        "aux .gguf",
        "CONIN$",
        "x" * 201,
        "é" * 101,
    ]
    changes |= {f"file name {ascii(name)[1:-1]:.24}": only_file(name) for name in names}
    bad = {fault: changed(good, change) for fault, change in changes.items()}
    node = bytes(good.data)
    bad |= {
        "not a map": dagcbor.encode([1]),
        "an empty map": b"\xa0",
        "nothing": b"",
        "truncated": node[:-1],
        "a trailing byte": node + b"\0",
        "keys out of order": cbor2.dumps({"omni": 1, "name": "x"}),
        "version is a float": cbor2.dumps({"omni": 1.0}),
        "a list that holds itself": bytes.fromhex("a1646e616d65d81c81d81d00"),
        "nested 17 deep": b"\x81" * 17 + b"\0",
        "a version in two bytes": node.replace(b"\x64omni\x01", b"\x64omni\x18\x01"),
    }
    return bad


def bad_parts(parts: list[tuple[Part, Block]]) -> list[tuple[str, int, bytes]]:
    """(fault, number of the part in the example, node)."""

    def tensor(number: int, **fields: Any) -> Change:
        return lambda node: node["tensors"][number].update(fields)

    def gap(**fields: Any) -> Change:
        return lambda node: node["padding"][0].update(fields)

    def put(**fields: Any) -> Change:
        return lambda node: node.update(fields)

    def gaps(*places: tuple[int, int]) -> Change:
        blocks = [Block.raw(b"padding").cid]
        return put(padding=[{"offset": offset, "size": size, "blocks": blocks} for offset, size in places])

    node_link = Block.node(b"\xa0").cid
    header, layer = 0, 3
    changes: list[tuple[str, int, Change]] = [
        ("header size 0", header, put(size=0)),
        ("header size does not match its blocks", header, put(size=BLOCK_SIZE + 1)),
        ("header size does not match the manifest", header, put(size=601)),
        ("header with an index", header, put(index=0)),
        ("header without padding", header, lambda node: node.pop("padding")),
        ("header block is a node", header, put(blocks=[node_link])),
        ("header without blocks", header, put(blocks=[])),
        ("padding inside the header", header, gap(offset=599)),
        ("padding of size 0", header, gap(size=0)),
        ("padding with a block too many", header, gap(blocks=[Block.raw(b"x").cid] * 2)),
        ("unknown field of padding", header, gap(file=0)),
        ("padding out of order", header, gaps((1000, 12), (800, 12))),
        ("padding overlaps", header, gaps((1000, 12), (1011, 12))),
        ("another kind", layer, put(kind="head")),
        ("kind is an integer", layer, put(kind=3)),
        ("another layer", layer, put(index=1)),
        ("layer without index", layer, lambda node: node.pop("index")),
        ("index is false", layer, put(index=False)),
        ("embed with index", 2, put(index=0)),
        ("a header in place of a layer", layer, lambda node: None),
        ("unknown field", layer, put(file=0)),
        ("no tensors", layer, put(tensors=[])),
        ("tensors is a map", layer, put(tensors={})),
        ("tensors out of order", layer, lambda node: node["tensors"].reverse()),
        ("tensor listed twice", layer, lambda node: node["tensors"].insert(0, node["tensors"][0])),
        ("tensor is text", layer, put(tensors=["x"])),
        ("unknown field of a tensor", layer, tensor(0, offset=0)),
        ("tensor without type", layer, lambda node: node["tensors"][0].pop("type")),
        ("type is an integer", layer, tensor(0, type=0)),
        ("tensor name of 257 characters", layer, tensor(1, name="blk.0." + "x" * 251)),
        ("shape of 5 dimensions", layer, tensor(0, shape=[1] * 5)),
        ("dimension 0", layer, tensor(0, shape=[0])),
        ("dimension is negative", layer, tensor(0, shape=[-1])),
        ("dimension is true", layer, tensor(0, shape=[True])),
        ("tensor size 0", layer, tensor(0, size=0)),
        ("tensor size beyond 2^50", layer, tensor(0, size=2**50 + 1)),
        ("tensor size does not match its blocks", layer, tensor(0, size=BLOCK_SIZE + 1)),
        ("part size does not match the manifest", layer, tensor(0, size=129)),
        ("a block too few", layer, tensor(1, blocks=[Block.raw(b"x").cid])),
        ("a block is a node", layer, tensor(0, blocks=[node_link])),
        ("a block is bytes", layer, tensor(0, blocks=[b"x"])),
    ]
    found = [(fault, number, changed(parts[number][1], change)) for fault, number, change in changes]
    return [
        (fault, number, bytes(parts[0][1].data) if fault.startswith("a header in place") else node)
        for fault, number, node in found
    ]


def bad_signed(signed: SignedManifest, other: CID) -> list[tuple[str, str, bytes]]:
    """(fault, refusal, node)."""
    good, key = signed.encode(), signed.publisher.protobuf

    def flip(signature: bytes, bit: int) -> bytes:
        return (int.from_bytes(signature, "little") ^ 1 << bit).to_bytes(64, "little")

    order = 2**252 + 27742317777372353535851937790883648493
    r, s = signed.signature[:32], int.from_bytes(signed.signature[32:], "little")
    stranger = PrivateKey(bytes(32))
    elsewhere = KEY.sign(
        domain="libp2p-peer-record", payload_type=SIGNATURE_PAYLOAD_TYPE, payload=signed.manifest.binary
    )
    typed = KEY.sign(
        domain=SIGNATURE_DOMAIN, payload_type=b"/omni/manifest/2", payload=signed.manifest.binary
    )
    signatures = {
        "another key's signature": SignedManifest.sign(signed.manifest, stranger).signature,
        "signature of another manifest": SignedManifest.sign(other, KEY).signature,
        "signature in another domain": elsewhere,
        "signature of another payload type": typed,
        "a bit of R flipped": flip(signed.signature, 0),
        "a bit of S flipped": flip(signed.signature, 300),
        "S plus the group's order": r + (s + order).to_bytes(32, "little"),
        "signature of zeros": bytes(64),
        "signature of 63 bytes": signed.signature[:63],
        "signature of 65 bytes": signed.signature + b"\0",
        "empty signature": b"",
    }
    keys = {
        "another publisher": stranger.public.protobuf,
        "RSA key": bytes.fromhex("08001220") + key[4:],
        "secp256k1 key": bytes.fromhex("08021221") + b"\x02" + key[4:],
        "ECDSA key": bytes.fromhex("08031220") + key[4:],
        "bare key without protobuf": key[4:],
        "key of 31 bytes": bytes.fromhex("0801121f") + key[4:-1],
        "empty key": b"",
        "protobuf fields swapped": b"\x12\x20" + key[4:] + b"\x08\x01",
        "key with a byte over": key + b"\0",
        "key that is no point": key[:4] + bytes.fromhex("02" + "00" * 31),
    }
    shapes: dict[str, Change] = {
        "unknown field": lambda node: node.update(time=0),
        "signature is missing": lambda node: node.pop("signature"),
        "publisher is missing": lambda node: node.pop("publisher"),
        "manifest is missing": lambda node: node.pop("manifest"),
        "manifest link is raw": lambda node: node.update(manifest=Block.raw(b"x").cid),
        "manifest link is text": lambda node: node.update(manifest=str(signed.manifest)),
        "signature is text": lambda node: node.update(signature=signed.signature.hex()),
        "publisher is a peer ID": lambda node: node.update(publisher=signed.publisher.peer_id),
    }
    found = [("altered manifest", "signature", changed(good, lambda node: node.update(manifest=other)))]
    for fields, name in ((signatures, "signature"), (keys, "publisher")):
        for fault, value in fields.items():
            node = {"manifest": signed.manifest, "publisher": key, "signature": signed.signature, name: value}
            found.append((fault, "signature", dagcbor.encode(node)))
    found += [(fault, "malformed", changed(good, change)) for fault, change in shapes.items()]
    found.append(("a trailing byte", "malformed", bytes(good.data) + b"\0"))
    return found


MODEL, PARTS = example()
BARE = MODEL.encode()
SIGNED = SignedManifest.sign(BARE.cid, KEY)
OTHER = Block.node(b"\xa0").cid
BAD_MANIFESTS = bad_manifests(BARE)
BAD_PARTS = {fault: (number, node) for fault, number, node in bad_parts(PARTS)}
BAD_SIGNED = {fault: (refusal, node) for fault, refusal, node in bad_signed(SIGNED, OTHER)}
REFUSALS = {"malformed": MalformedManifest, "signature": BadSignature}


def refused(error: OmniError, block: Block) -> None:
    """A refusal is short, printable and says more than that something is wrong."""
    assert 10 < len(error.message) < 600, error.message
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", error.message.replace(str(block.cid), ""))


@pytest.mark.parametrize("fault", BAD_MANIFESTS, ids=ascii)
def test_a_bad_manifest(fault: str) -> None:
    block = Block.node(BAD_MANIFESTS[fault])
    for read in (manifest_untrusted, open_untrusted):
        with pytest.raises(MalformedManifest) as caught:
            read(block)
        refused(caught.value, block)


@pytest.mark.parametrize("fault", BAD_SIGNED)
def test_a_bad_signed_manifest(fault: str) -> None:
    refusal, node = BAD_SIGNED[fault]
    block = Block.node(node)
    with pytest.raises(REFUSALS[refusal]) as caught:
        signed_untrusted(block)
    refused(caught.value, block)
    with pytest.raises(TrustError):
        open_untrusted(block)


@pytest.mark.parametrize("fault", BAD_PARTS)
def test_a_bad_part(fault: str) -> None:
    number, node = BAD_PARTS[fault]
    block = Block.node(node)
    with pytest.raises(MalformedManifest) as caught:
        part_untrusted(block, MODEL.parts[number])
    refused(caught.value, block)


def test_each_fault_has_a_case_of_its_own() -> None:
    nodes = [*BAD_MANIFESTS.values(), *(node for _, node in BAD_SIGNED.values())]
    assert len(set(nodes)) == len(nodes)


@pytest.mark.parametrize("block", [BARE, SIGNED.encode(), PARTS[0][1]], ids=["bare", "signed", "part"])
def test_a_raw_block_is_no_node(block: Block) -> None:
    raw = Block.raw(block.data)
    for read in (open_untrusted, manifest_untrusted, signed_untrusted, part_links_untrusted):
        with pytest.raises(MalformedManifest, match="raw block"):
            read(raw)


@pytest.mark.parametrize("data", [b"", b"\0", b"\x80", b"\xf6", b"\xa0", b"\xff" * 40], ids=bytes.hex)
def test_what_is_no_map_of_ours(data: bytes) -> None:
    for read in (open_untrusted, manifest_untrusted, signed_untrusted, part_links_untrusted):
        with pytest.raises(MalformedManifest):
            read(Block.node(data))


def test_an_oversize_node() -> None:
    node = dagcbor.encode({"omni": 1, "name": "x" * MAX_BLOCK_SIZE})
    with pytest.raises(MalformedManifest, match="at most 2097152"):
        manifest_untrusted(Block.node(node))


@pytest.mark.parametrize(
    ("version", "shown"), [(2, "2"), ("1", "'1'"), (True, "True"), (None, "None"), ("\x1b" * 10_000, "x1b")]
)
def test_another_version_says_so(version: Any, shown: str) -> None:
    node = changed(BARE, lambda node: node.update(omni=version))
    with pytest.raises(MalformedManifest, match="version") as caught:
        manifest_untrusted(Block.node(node))
    assert shown in caught.value.message
    assert caught.value.remedy is not None

"""Writes spec/vectors/cid.json, dagcbor.json, dagcbor-bad.json and manifest.json.

Run `python tests/conformance/write_base_vectors.py` when a vector is added. Bad inputs are named by their
fault and are otherwise right: canonical encoding, true digests, so that nothing else refuses them first.
"""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cbor2

from omnistore.block import Block
from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.dagcbor import encode
from omnistore.keys import PUBLIC_KEY_PREFIX, PrivateKey
from omnistore.manifest import (
    SIGNATURE_DOMAIN,
    SIGNATURE_PAYLOAD_TYPE,
    FileEntry,
    HeaderPart,
    Manifest,
    PaddingEntry,
    PartKey,
    PartRef,
    SignedManifest,
    TensorEntry,
    TensorPart,
)

VECTORS = Path(__file__).resolve().parent.parent.parent / "spec" / "vectors"
SEED = bytes(range(32))
KEY = PrivateKey(SEED)
LINK = CID.of_digest(RAW, bytes(range(32)))
NODE_LINK = CID.of_digest(DAG_CBOR, bytes(range(32)))

Node = dict[str, Any]


def b32(data: bytes) -> str:
    return "b" + base64.b32encode(data).decode().rstrip("=").lower()


# --- CIDs ---------------------------------------------------------------------------------------


def cids() -> dict[str, Any]:
    payloads = {"empty": b"", "abc": b"abc", "an empty map": b"\xa0", "zeros, 1 MiB": bytes(1 << 20)}
    valid = []
    for name, data in payloads.items():
        for codec, block in (("raw", Block.raw(data)), ("dag-cbor", Block.node(data))):
            short = {"hex": data.hex()} if len(data) < 64 else {"zeros": len(data)}
            valid.append(
                {"name": f"{name}, {codec}", "codec": codec, "payload": short}
                | {"binary": block.cid.binary.hex(), "text": str(block.cid)}
            )
    text, binary = str(LINK), LINK.binary
    digest = binary[4:]
    faulty = {
        "CIDv0": "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWKnpYf",
        "a peer ID": KEY.public.peer_id,
        "SHA-256 instead of BLAKE3": b32(b"\x01\x55\x12\x20" + digest),
        "codec dag-pb": b32(b"\x01\x70\x1e\x20" + digest),
        "version 2": b32(b"\x02\x55\x1e\x20" + digest),
        "a digest of 31 bytes": b32(b"\x01\x55\x1e\x1f" + digest[:31]),
        "a length that lies": b32(b"\x01\x55\x1e\x1f" + digest),
        "a codec as an overlong varint": b32(b"\x01\xd5\x00\x1e\x20" + digest),
        "a byte too many": b32(binary + b"\x00"),
        "a byte too few": b32(binary[:-1]),
        "base58btc": "z" + "2" * 48,
        "base32 with padding": text + "=",
        "stray bits at the end": text[:-1] + chr(ord(text[-1]) + 1),
        "a digit that base32 lacks": text[:20] + "1" + text[21:],
        "mixed case": text[:20] + text[20:].upper(),
        "a letter that only lower-cases to ASCII": text[:20] + "\u212a" + text[21:],
        "a blank inside": text[:20] + " " + text[21:],
        "empty": "",
        "the multibase prefix alone": "b",
        "a path below it": text + "/file",
        "far too long": "b" + "a" * 1000,
    }
    return {
        "valid": valid,
        "accepted_texts": [
            {"text": form, "binary": binary.hex()}
            for form in (text, text.upper(), f"ipfs://{text}", f"/ipfs/{text}", f"  {text}\n")
        ],
        "invalid_texts": [{"fault": fault, "text": bad} for fault, bad in faulty.items()],
    }


# --- dag-cbor -----------------------------------------------------------------------------------


def good_items() -> list[dict[str, str]]:
    values: dict[str, Any] = {
        "null": None,
        "true": True,
        "integers of each length": [0, 23, 24, 255, 256, 65535, 65536, 2**32, 2**64 - 1, -1, -25, -(2**63)],
        "text": ["", "a", "Ω", "𝄞"],
        "bytes": [b"", b"\x00\xff"],
        "a link": LINK,
        "map keys by length, then bytes": {"b": 1, "aa": 2, "a": 3, "": 4, "B": 5},
        "deepest nesting": nested(16),
    }
    return [{"name": name, "hex": encode(value).hex()} for name, value in values.items()]


def nested(levels: int) -> Any:
    value: Any = None
    for _ in range(levels):
        value = [value]
    return value


def bad_items() -> list[dict[str, str]]:
    link = b"\xd8\x2a\x58\x25\x00" + LINK.binary
    faulty = {
        "empty": b"",
        "trailing byte": b"\xa0\x00",
        "truncated map": b"\xa1\x61a",
        "truncated text": b"\x62a",
        "integer longer than needed, 1 byte": b"\x18\x17",
        "integer longer than needed, 8 bytes": b"\x1b" + bytes(7) + b"\x01",
        "text length longer than needed": b"\x78\x01a",
        "array length longer than needed": b"\x98\x00",
        "negative integer below 64 bits": b"\x3b\x80" + bytes(7),
        "indefinite array": b"\x9f\xff",
        "indefinite map": b"\xbf\xff",
        "indefinite text": b"\x7f\x61a\xff",
        "indefinite bytes": b"\x5f\x41a\xff",
        "a break alone": b"\xff",
        "half float": b"\xf9\x3c\x00",
        "double": b"\xfb\x3f\xf0" + bytes(6),
        "NaN": b"\xf9\x7e\x00",
        "undefined": b"\xf7",
        "simple value": b"\xf0",
        "simple value in two bytes": b"\xf8\x20",
        "duplicate keys": b"\xa2\x61a\x01\x61a\x02",
        "keys in the wrong order": b"\xa2\x61b\x01\x61a\x02",
        "a longer key before a shorter": b"\xa2\x62aa\x01\x61b\x02",
        "integer key": b"\xa1\x01\x02",
        "bytes key": b"\xa1\x41a\x02",
        "array key": b"\xa1\x80\x02",
        "text that is not UTF-8": b"\x61\xff",
        "text with a surrogate": b"\x63\xed\xa0\x80",
        "date tag": b"\xc0\x6a2020-01-01",
        "bignum tag": b"\xc2\x49\x01" + bytes(8),
        "huge big float tag": b"\xc5\x82\x1a\x3b\x9a\xca\x00\x01",
        "shareable tag": b"\xd8\x1c\x80",
        "a list that holds itself": b"\xd8\x1c\x81\xd8\x1d\x00",
        "string reference tag": b"\xd9\x01\x00\x82\x61a\xd8\x19\x00",
        "set tag": b"\xd9\x01\x02\x80",
        "self-description tag": b"\xd9\xd9\xf7\xa0",
        "unknown tag": b"\xd8\x63\x01",
        "link without its leading zero": b"\xd8\x2a\x58\x24" + LINK.binary,
        "link to SHA-256": b"\xd8\x2a\x58\x25\x00\x01\x55\x12\x20" + LINK.digest,
        "link as text": b"\xd8\x2a\x78\x3b" + str(LINK).encode(),
        "link of an empty string": b"\xd8\x2a\x40",
        "link tag longer than needed": b"\xd9\x00\x2a" + link[2:],
        "a tag in a tag": b"\xd8\x2a" + link,
        "nested one too deep": b"\x81" * 17 + b"\xf6",
        "nested ten thousand deep": b"\x81" * 10_000 + b"\xf6",
        "an array that claims four billion": b"\x9a\xff\xff\xff\xff",
        "a text that claims an exabyte": b"\x7b\x10" + bytes(7),
    }
    return [{"fault": fault, "hex": data.hex()} for fault, data in faulty.items()]


# --- manifests ------------------------------------------------------------------------------------


def tensor(name: str, size: int = 128) -> TensorEntry:
    blocks = tuple(Block.raw(f"{name}/{n}".encode()).cid for n in range(-(-size // (1 << 20))))
    return TensorEntry(name, "F32", (size // 4,), size, blocks)


def model() -> tuple[Manifest, dict[PartKey, HeaderPart | TensorPart]]:
    header = HeaderPart(
        PartKey("header"),
        64,
        (Block.raw(b"header").cid,),
        (PaddingEntry(4096, 32, (Block.raw(b"pad").cid,)),),
    )
    parts: dict[PartKey, HeaderPart | TensorPart] = {
        part.key: part
        for part in (
            header,
            TensorPart(PartKey("shared"), (tensor("rope_freqs.weight"),)),
            TensorPart(PartKey("embed"), (tensor("token_embd.weight", (2 << 20) + 4),)),
            TensorPart(PartKey("layer", 0), (tensor("blk.0.attn_q.weight"), tensor("blk.0.ffn_up.weight"))),
            TensorPart(PartKey("layer", 1), (tensor("blk.1.attn_q.weight"),)),
            TensorPart(PartKey("head"), (tensor("output.weight"),)),
        )
    }
    refs = tuple(PartRef(key, part.size, part.encode().cid) for key, part in parts.items())
    manifest = Manifest(
        name="example",
        architecture="llama",
        quantisation="F32",
        layers=2,
        files=(FileEntry("example.gguf", 3 << 20, bytes(range(32))),),
        parts=refs,
        facts={"context_length": 512, "license": "apache-2.0", "parameters": 525_000},
        base=NODE_LINK,
    )
    return manifest, parts


def plain(block: Block) -> Node:
    """A node as Python values with links as `CID`, to alter."""

    def link(tag: Any, _immutable: bool) -> CID:
        return CID(tag.value[1:])

    node: Node = cbor2.loads(bytes(block.data), tag_hook=link)
    return node


def altered(node: Node, change: Callable[[Node], object]) -> str:
    changed = copy.deepcopy(node)
    change(changed)
    return encode(changed).hex()


def manifests() -> dict[str, Any]:
    manifest, parts = model()
    bare = manifest.encode()
    signed = SignedManifest.sign(bare.cid, KEY)
    return {
        "valid": {
            "seed": SEED.hex(),
            "peer_id": KEY.public.peer_id,
            "domain": SIGNATURE_DOMAIN,
            "payload_type": SIGNATURE_PAYLOAD_TYPE.decode(),
            "signed": {"cid": str(signed.encode().cid), "hex": bytes(signed.encode().data).hex()},
            "manifest": {"cid": str(bare.cid), "hex": bytes(bare.data).hex()},
            "parts": [
                {
                    "part": str(key),
                    "size": part.size,
                    "cid": str(part.encode().cid),
                    "hex": bytes(part.encode().data).hex(),
                }
                for key, part in parts.items()
            ],
        },
        "bad_signed": bad_signed(plain(signed.encode())),
        "bad_manifests": bad_manifests(plain(bare)),
        "bad_parts": bad_parts({key: plain(part.encode()) for key, part in parts.items()}),
    }


def bad_signed(node: Node) -> list[dict[str, str]]:
    signature = node["signature"]
    other = PrivateKey(bytes(32))
    cases: dict[str, tuple[str, Callable[[Node], object]]] = {
        "one bit of the signature": (
            "BadSignature",
            lambda n: n.update(signature=signature[:-1] + bytes([signature[-1] ^ 1])),
        ),
        "a signature of another manifest": ("BadSignature", lambda n: n.update(manifest=NODE_LINK)),
        "another publisher's key": ("BadSignature", lambda n: n.update(publisher=other.public.protobuf)),
        "a short signature": ("BadSignature", lambda n: n.update(signature=signature[:63])),
        "an empty signature": ("BadSignature", lambda n: n.update(signature=b"")),
        "no envelope around the payload": (
            "BadSignature",
            lambda n: n.update(signature=KEY._key.sign(n["manifest"].binary)),
        ),
        "another domain": (
            "BadSignature",
            lambda n: n.update(
                signature=KEY.sign(
                    domain="libp2p-peer-record",
                    payload_type=SIGNATURE_PAYLOAD_TYPE,
                    payload=n["manifest"].binary,
                )
            ),
        ),
        "a secp256k1 key": (
            "BadSignature",
            lambda n: n.update(publisher=bytes((8, 2, 0x12, 0x21, 2)) + bytes(32)),
        ),
        "an RSA key": ("BadSignature", lambda n: n.update(publisher=bytes((8, 0, 0x12, 0x20)) + bytes(32))),
        "a key without its protobuf": ("BadSignature", lambda n: n.update(publisher=KEY.public.raw)),
        "a key that is no point": (
            "BadSignature",
            lambda n: n.update(publisher=PUBLIC_KEY_PREFIX + b"\xff" * 32),
        ),
        "a key of small order": (
            "BadSignature",
            lambda n: n.update(publisher=PUBLIC_KEY_PREFIX + bytes(32), signature=bytes(64)),
        ),
        "a raw link": ("MalformedManifest", lambda n: n.update(manifest=LINK)),
        "a link that is text": ("MalformedManifest", lambda n: n.update(manifest=str(NODE_LINK))),
        "a key that is text": ("MalformedManifest", lambda n: n.update(publisher="key")),
        "no publisher": ("MalformedManifest", lambda n: n.pop("publisher")),
        "no signature": ("MalformedManifest", lambda n: n.pop("signature")),
        "an unknown field": ("MalformedManifest", lambda n: n.update(time=0)),
    }
    return [
        {"fault": fault, "error": error, "hex": altered(node, change)}
        for fault, (error, change) in cases.items()
    ]


def bad_manifests(node: Node) -> list[dict[str, str]]:
    cases: dict[str, Callable[[Node], object]] = {
        "version 2": lambda n: n.update(omni=2),
        "version true": lambda n: n.update(omni=True),
        "version as text": lambda n: n.update(omni="1"),
        "no version": lambda n: n.pop("omni"),
        "no name": lambda n: n.pop("name"),
        "an empty name": lambda n: n.update(name=""),
        "a name of 257 characters": lambda n: n.update(name="a" * 257),
        "a name that moves the cursor": lambda n: n.update(name="a\x1b[2J"),
        "an unknown field": lambda n: n.update(created=1),
        "layers as text": lambda n: n.update(layers="2"),
        "negative layers": lambda n: n.update(layers=-1),
        "layers true": lambda n: n.update(layers=True),
        "4097 layers": lambda n: n.update(layers=4097),
        "no files": lambda n: n.update(files=[]),
        "files as a map": lambda n: n.update(files={}),
        "a file in a directory": lambda n: n["files"][0].update(name="a/b.gguf"),
        "a file in the parent": lambda n: n["files"][0].update(name=".."),
        "a file with a backslash": lambda n: n["files"][0].update(name="a\\b.gguf"),
        "a file with a NUL": lambda n: n["files"][0].update(name="a\x00.gguf"),
        "a file with a new line": lambda n: n["files"][0].update(name="a\n.gguf"),
        "a file without a name": lambda n: n["files"][0].update(name=""),
        "a hidden file": lambda n: n["files"][0].update(name=".bashrc"),
        "a file named as a device": lambda n: n["files"][0].update(name="NUL.gguf"),
        "a file whose name turns right to left": lambda n: n["files"][0].update(name="a\u202egguf.exe"),
        "a file of no bytes": lambda n: n["files"][0].update(size=0),
        "a file of an exabyte": lambda n: n["files"][0].update(size=1 << 60),
        "a sha256 of 31 bytes": lambda n: n["files"][0].update(sha256=bytes(31)),
        "a file with an unknown field": lambda n: n["files"][0].update(mode=0o4755),
        "two files of one name": lambda n: n.update(files=n["files"] * 2),
        "no parts": lambda n: n.update(parts=[]),
        "no header part": lambda n: n["parts"].pop(0),
        "a header of a file that is not there": lambda n: n["parts"][0].update(index=1),
        "parts in the wrong order": lambda n: n["parts"].reverse(),
        "a part twice": lambda n: n["parts"].insert(1, n["parts"][1]),
        "an unknown kind of part": lambda n: n["parts"][1].update(kind="tail"),
        "a kind that is a list": lambda n: n["parts"][1].update(kind=[]),
        "a layer beyond the last": lambda n: n["parts"][4].update(index=2),
        "an embed part with an index": lambda n: n["parts"][2].update(index=1),
        "a negative index": lambda n: n["parts"][3].update(index=-1),
        "a part of no bytes": lambda n: n["parts"][1].update(size=0),
        "a part larger than the files": lambda n: n["parts"][1].update(size=1 << 40),
        "a part that is a raw block": lambda n: n["parts"][1].update(link=LINK),
        "a part without a link": lambda n: n["parts"][1].pop("link"),
        "an unknown fact": lambda n: n["facts"].update(stars=5),
        "a number for a licence": lambda n: n["facts"].update(license=1),
        "a fact that is a list": lambda n: n["facts"].update(parameters=[]),
        "a fact of 4097 characters": lambda n: n["facts"].update(license="a" * 4097),
        "a base that is a raw block": lambda n: n.update(base=LINK),
        "a base that is null": lambda n: n.update(base=None),
    }
    return [{"fault": fault, "hex": altered(node, change)} for fault, change in cases.items()]


def bad_parts(nodes: dict[PartKey, Node]) -> list[dict[str, Any]]:
    header, embed, layer = PartKey("header"), PartKey("embed"), PartKey("layer", 0)
    cases: dict[str, tuple[PartKey, Callable[[Node], object]]] = {
        "a header named shared": (header, lambda n: n.update(kind="shared")),
        "a header too long for its blocks": (header, lambda n: n.update(size=(1 << 20) + 1)),
        "a header without blocks": (header, lambda n: n.update(blocks=[])),
        "a header of no bytes": (header, lambda n: n.update(size=0, blocks=[])),
        "padding inside the header": (header, lambda n: n["padding"][0].update(offset=63)),
        "padding of no bytes": (header, lambda n: n["padding"][0].update(size=0)),
        "padding twice": (header, lambda n: n.update(padding=n["padding"] * 2)),
        "padding with an unknown field": (header, lambda n: n["padding"][0].update(fill=0)),
        "a header without padding's list": (header, lambda n: n.pop("padding")),
        "a layer with another number": (layer, lambda n: n.update(index=1)),
        "a layer without its number": (layer, lambda n: n.pop("index")),
        "a layer numbered true": (layer, lambda n: n.update(index=True)),
        "an embed part with a number": (embed, lambda n: n.update(index=0)),
        "no tensors": (embed, lambda n: n.update(tensors=[])),
        "tensors in the wrong order": (layer, lambda n: n["tensors"].reverse()),
        "a tensor twice": (layer, lambda n: n.update(tensors=[n["tensors"][0]] * 2)),
        "a block too few": (embed, lambda n: n["tensors"][0]["blocks"].pop()),
        "a block too many": (embed, lambda n: n["tensors"][0]["blocks"].append(LINK)),
        "a block that is a node": (embed, lambda n: n["tensors"][0]["blocks"].__setitem__(0, NODE_LINK)),
        "a block that is bytes": (embed, lambda n: n["tensors"][0]["blocks"].__setitem__(0, LINK.binary)),
        "a size that is not the manifest's": (embed, lambda n: n["tensors"][0].update(size=(2 << 20) + 8)),
        "a tensor of no bytes": (layer, lambda n: n["tensors"][0].update(size=0, blocks=[])),
        "five dimensions": (layer, lambda n: n["tensors"][0].update(shape=[1] * 5)),
        "a dimension of nothing": (layer, lambda n: n["tensors"][0].update(shape=[0])),
        "a tensor without a type": (layer, lambda n: n["tensors"][0].pop("type")),
        "an unknown field": (layer, lambda n: n.update(offset=0)),
    }
    return [
        {"fault": fault, "part": str(key), "hex": altered(nodes[key], change)}
        for fault, (key, change) in cases.items()
    ]


def write(name: str, content: object) -> None:
    (VECTORS / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write("cid.json", cids())
    write("dagcbor.json", good_items())
    write("dagcbor-bad.json", bad_items())
    write("manifest.json", manifests())

"""spec/vectors/cid.json, dagcbor*.json, manifest.json: what must be accepted, what must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from multiformats import CID as AnyCID

from omnistore import errors
from omnistore.block import Block
from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.dagcbor import decode_untrusted, encode
from omnistore.errors import DigestMismatch, MalformedCID, MalformedManifest, RemoteProtocolError
from omnistore.keys import PrivateKey
from omnistore.manifest import (
    MAX_NODE_SIZE,
    Manifest,
    SignedManifest,
    manifest_untrusted,
    open_untrusted,
    part_untrusted,
    signed_untrusted,
)

VECTORS = Path(__file__).resolve().parent.parent.parent / "spec" / "vectors"
CIDS = json.loads((VECTORS / "cid.json").read_text())
ITEMS = json.loads((VECTORS / "dagcbor.json").read_text())
BAD_ITEMS = json.loads((VECTORS / "dagcbor-bad.json").read_text())
MANIFESTS = json.loads((VECTORS / "manifest.json").read_text())
VALID = MANIFESTS["valid"]
CODECS = {"raw": RAW, "dag-cbor": DAG_CBOR}


def fault(vector: dict[str, Any]) -> str:
    return str(vector.get("fault") or vector.get("name") or vector.get("text", "")[:20])


def node(vector: dict[str, Any]) -> Block:
    return Block.node(bytes.fromhex(vector["hex"]))


def manifest() -> Manifest:
    return manifest_untrusted(node(VALID["manifest"]))


@pytest.mark.parametrize("vector", CIDS["valid"], ids=fault)
def test_payloads_have_these_cids(vector: dict[str, Any]) -> None:
    payload = vector["payload"]
    data = bytes.fromhex(payload["hex"]) if "hex" in payload else bytes(payload["zeros"])
    cid = CID.of_digest(CODECS[vector["codec"]], blake3(data).digest())
    assert cid.binary.hex() == vector["binary"]
    assert str(cid) == vector["text"]
    assert CID.parse_untrusted(vector["text"]) == CID.from_bytes_untrusted(cid.binary) == cid
    assert Block.verify_untrusted(cid, data).cid == cid
    # An independent implementation agrees.
    other = AnyCID.decode(vector["text"])
    assert (other.version, other.codec.name, other.hashfun.name) == (1, vector["codec"], "blake3")
    assert bytes(other) == cid.binary


@pytest.mark.parametrize("vector", CIDS["accepted_texts"], ids=fault)
def test_forms_that_people_paste(vector: dict[str, Any]) -> None:
    assert CID.parse_untrusted(vector["text"]).binary.hex() == vector["binary"]


@pytest.mark.parametrize("vector", CIDS["invalid_texts"], ids=fault)
def test_texts_that_are_no_cids(vector: dict[str, Any]) -> None:
    with pytest.raises(MalformedCID):
        CID.parse_untrusted(vector["text"])


@pytest.mark.parametrize("vector", ITEMS, ids=fault)
def test_canonical_items_survive(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    assert encode(decode_untrusted(data, limit=len(data))) == data
    with pytest.raises(RemoteProtocolError, match="at most"):
        decode_untrusted(data, limit=len(data) - 1)


@pytest.mark.parametrize("vector", BAD_ITEMS, ids=fault)
def test_bad_items_raise_one_class(vector: dict[str, Any]) -> None:
    for error in (RemoteProtocolError, MalformedManifest):
        with pytest.raises(error) as caught:
            decode_untrusted(bytes.fromhex(vector["hex"]), limit=MAX_NODE_SIZE, error=error, what="the input")
        assert "the input" in caught.value.message
        assert len(caught.value.message) < 600


def test_the_valid_model_is_read() -> None:
    signed = node(VALID["signed"])
    assert str(signed.cid) == VALID["signed"]["cid"]
    opened = open_untrusted(signed)
    assert isinstance(opened, SignedManifest)
    assert opened.publisher.peer_id == VALID["peer_id"]
    assert str(opened.manifest) == VALID["manifest"]["cid"]
    bare = open_untrusted(node(VALID["manifest"]))
    assert isinstance(bare, Manifest)
    assert bare.encode().cid == node(VALID["manifest"]).cid == opened.manifest
    for vector, ref in zip(VALID["parts"], bare.parts, strict=True):
        part = part_untrusted(node(vector), ref)
        assert (str(ref.key), part.size, str(ref.cid)) == (vector["part"], vector["size"], vector["cid"])
        assert part.encode().data == node(vector).data


def test_signing_is_deterministic() -> None:
    key = PrivateKey(bytes.fromhex(VALID["seed"]))
    assert key.public.peer_id == VALID["peer_id"]
    again = SignedManifest.sign(manifest().encode().cid, key).encode()
    assert bytes(again.data).hex() == VALID["signed"]["hex"]


@pytest.mark.parametrize("vector", MANIFESTS["bad_signed"], ids=fault)
def test_bad_signed_manifests(vector: dict[str, Any]) -> None:
    for read in (signed_untrusted, open_untrusted):
        with pytest.raises(getattr(errors, vector["error"])):
            read(node(vector))


@pytest.mark.parametrize("vector", MANIFESTS["bad_manifests"], ids=fault)
def test_bad_manifests(vector: dict[str, Any]) -> None:
    for read in (manifest_untrusted, open_untrusted):
        with pytest.raises(MalformedManifest):
            read(node(vector))


@pytest.mark.parametrize("vector", MANIFESTS["bad_parts"], ids=fault)
def test_bad_parts(vector: dict[str, Any]) -> None:
    ref = next(ref for ref in manifest().parts if str(ref.key) == vector["part"])
    with pytest.raises(MalformedManifest):
        part_untrusted(node(vector), ref)


@pytest.mark.parametrize("vector", BAD_ITEMS, ids=fault)
def test_bad_encodings_are_no_manifests(vector: dict[str, Any]) -> None:
    for read in (manifest_untrusted, signed_untrusted, open_untrusted):
        with pytest.raises(MalformedManifest):
            read(node(vector))


def test_a_manifest_is_a_node_of_one_block() -> None:
    data = bytes.fromhex(VALID["manifest"]["hex"])
    with pytest.raises(MalformedManifest, match="raw block"):
        open_untrusted(Block.raw(data))
    with pytest.raises(MalformedManifest, match="at most"):
        open_untrusted(Block.node(bytes(MAX_NODE_SIZE + 1)))
    for other in (b"\x80", b"\x01", b"\xf6"):
        with pytest.raises(MalformedManifest, match="not a map"):
            open_untrusted(Block.node(other))


def test_a_changed_byte_is_another_block() -> None:
    data = bytes.fromhex(VALID["manifest"]["hex"])
    cid = CID.parse_untrusted(VALID["manifest"]["cid"])
    assert Block.verify_untrusted(cid, data).data == data
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        with pytest.raises(DigestMismatch):
            Block.verify_untrusted(cid, bytes(changed))

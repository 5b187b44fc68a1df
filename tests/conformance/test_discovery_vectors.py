"""spec/vectors/discovery.json, run against this implementation and, where it can, against libp2p's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omnistore.cid import CID
from omnistore.dht.records import distance, peer_id_bytes_untrusted, peer_untrusted, provider_key
from omnistore.errors import RemoteProtocolError
from omnistore.keys import PrivateKey

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "spec" / "vectors" / "discovery.json").read_text()
)


@pytest.mark.parametrize("vector", VECTORS["keys"], ids=lambda vector: vector["cid"][:12])
def test_keys(vector: dict[str, str]) -> None:
    assert provider_key(CID.parse_untrusted(vector["cid"])).hex() == vector["key"]


@pytest.mark.parametrize("vector", VECTORS["peers"], ids=lambda vector: vector["seed"][:2])
def test_peer_ids(vector: dict[str, str]) -> None:
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    seed = bytes.fromhex(vector["seed"])
    assert PrivateKey(seed).public.peer_id == vector["peer_id"]
    assert peer_id_bytes_untrusted(vector["peer_id"]).hex() == vector["binary"]
    assert ID.from_pubkey(create_new_key_pair(seed).public_key).to_bytes().hex() == vector["binary"]


@pytest.mark.parametrize("vector", VECTORS["distances"], ids=lambda vector: vector["peer_id"][-6:])
def test_distances(vector: dict[str, str]) -> None:
    peer = peer_id_bytes_untrusted(vector["peer_id"])
    assert distance(bytes.fromhex(vector["key"]), peer).to_bytes(32, "big").hex() == vector["distance"]


@pytest.mark.parametrize("vector", VECTORS["addresses"], ids=lambda vector: vector["text"] or "ignored")
def test_addresses(vector: dict[str, str | None]) -> None:
    peer = bytes.fromhex(VECTORS["peers"][0]["binary"])
    found = peer_untrusted(peer, [bytes.fromhex(vector["binary"] or "")])
    assert found.addrs == (() if vector["text"] is None else (vector["text"],))


@pytest.mark.parametrize("binary", VECTORS["bad_peer_ids"], ids=lambda binary: f"{len(binary) // 2}-bytes")
def test_bad_peer_ids(binary: str) -> None:
    with pytest.raises(RemoteProtocolError):
        peer_untrusted(bytes.fromhex(binary))

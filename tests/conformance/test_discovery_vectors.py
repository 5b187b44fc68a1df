"""spec/vectors/discovery.json, run against this implementation and, where it can, against libp2p's."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from libp2p.host.autonat.pb import autonat_pb2
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb import circuit_pb2
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from omnistore.cid import CID
from omnistore.dht.records import distance, peer_id_bytes_untrusted, peer_untrusted, provider_key
from omnistore.errors import PeerUnreachable, RemoteProtocolError
from omnistore.keys import PrivateKey
from omnistore.net import delimited
from omnistore.net.dialback import Declined, DialBacks
from omnistore.net.interface import Provider
from omnistore.net.kad_protocol import PROTOCOL
from omnistore.net.kademlia import KademliaNode
from omnistore.net.mdns import SERVICE, parse_record_untrusted

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


@pytest.mark.parametrize("vector", VECTORS["dial_backs"], ids=lambda vector: vector["seen_at"])
def test_what_is_dialled_back(vector: dict[str, Any]) -> None:
    targets = DialBacks().ask("anybody", vector["seen_at"], vector["named"], now=0)
    assert ([] if isinstance(targets, Declined) else targets) == vector["dialled"]


@pytest.mark.trio
@pytest.mark.parametrize("vector", VECTORS["small_messages"], ids=lambda v: f"{v['protocol']} {v['name']}")
async def test_messages_of_relays_autonat_and_hole_punching(vector: dict[str, Any]) -> None:
    """Read from the bytes, each says what the vector says; and nothing more is read."""

    class Read:
        peer = "somebody"
        rest = bytes.fromhex(vector["framed"]) + b"next"

        async def receive_exactly(self, count: int) -> bytes:
            data, self.rest = self.rest[:count], self.rest[count:]
            return data

    read: Any = Read()
    peer = peer_id_bytes_untrusted(vector["peer"]) if "peer" in vector else b""
    addrs: list[bytes] = []
    match vector["protocol"].split("/")[-1]:
        case "hop":
            found = await delimited.receive_untrusted(read, circuit_pb2.HopMessage)
            assert circuit_pb2.HopMessage.Type.Name(found.type) == vector["name"]
            assert found.peer.id == peer
        case "stop":
            found = await delimited.receive_untrusted(read, circuit_pb2.StopMessage)
            assert circuit_pb2.StopMessage.Type.Name(found.type) == vector["name"]
            assert (found.peer.id, found.limit.duration, found.limit.data) == (
                peer, vector["seconds"], vector["bytes"],
            )  # fmt: skip
        case "1.0.0":
            found = await delimited.receive_untrusted(read, autonat_pb2.Message)
            addrs = [*found.dial.peer.addrs, *filter(None, [found.dialResponse.addr])]
            assert found.dial.peer.id == peer
            status = autonat_pb2.Message.ResponseStatus.Name(found.dialResponse.status)
            assert ("DIAL" if found.type == autonat_pb2.Message.DIAL else status) == vector["name"]
        case "dcutr":
            found = await delimited.receive_untrusted(read, HolePunch)
            assert HolePunch.Type.Name(found.type) == vector["name"]
            addrs = list(found.ObsAddrs)
    assert [str(Multiaddr(addr)) for addr in addrs] == vector.get("addrs", [])
    assert read.rest == b"next"


@pytest.mark.parametrize("binary", VECTORS["bad_peer_ids"], ids=lambda binary: f"{len(binary) // 2}-bytes")
def test_bad_peer_ids(binary: str) -> None:
    with pytest.raises(RemoteProtocolError):
        peer_untrusted(bytes.fromhex(binary))


@pytest.mark.parametrize("vector", VECTORS["lan_records"], ids=lambda vector: vector["name"])
def test_records_of_the_local_network(vector: dict[str, Any]) -> None:
    found = parse_record_untrusted(bytes.fromhex(vector["record"]))
    assert (found.peer if found else None) == vector["peer"]
    assert list(found.addrs if found else ()) == vector["addrs"]


def test_names_on_the_wire() -> None:
    assert VECTORS["dht_protocol"] == PROTOCOL
    assert VECTORS["mdns_service"] + "." == SERVICE


class Wire:
    """A network whose one peer notes what it is sent, and ends the stream."""

    def __init__(self) -> None:
        self.sent = b""
        self.host = SimpleNamespace(
            get_id=lambda: ID.from_base58(VECTORS["peers"][0]["peer_id"]),
            get_addrs=lambda: [Multiaddr(VECTORS["addresses"][0]["text"])],
        )

    async def open_stream(self, provider: Provider, protocol: str) -> Any:
        assert protocol == VECTORS["dht_protocol"]
        return self

    async def send_all(self, data: bytes) -> None:
        self.sent += data

    async def receive_some(self, max_bytes: int) -> bytes:
        return b""

    async def receive_exactly(self, count: int) -> bytes:
        raise PeerUnreachable("the stream ended")

    async def aclose(self) -> None:
        """Nothing to close."""


@pytest.mark.trio
@pytest.mark.parametrize("vector", VECTORS["messages"], ids=lambda vector: vector["type"])
async def test_messages(vector: dict[str, str]) -> None:
    wire: Any = Wire()
    node = KademliaNode(wire, None)
    peer, key = Provider(VECTORS["peers"][1]["peer_id"]), bytes.fromhex(vector["key"])
    with suppress(PeerUnreachable):
        match vector["type"]:
            case "GET_PROVIDERS":
                await node.ask_providers(peer, key)
            case "ADD_PROVIDER":
                await node.add_provider(peer, key)
            case "GET_VALUE":
                await node.ask_value(peer, key)
            case "PUT_VALUE":
                await node.put_value(peer, key, bytes.fromhex(vector["value"]))
    assert wire.sent.hex() == vector["frame"]

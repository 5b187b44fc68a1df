"""Provider records: what is believed of what strangers send."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.dht.records import (
    MAX_ADDRS,
    MAX_PEERS,
    distance,
    merge,
    peer_id_bytes_untrusted,
    peer_untrusted,
    peers_untrusted,
    provider_key,
)
from omnistore.errors import RemoteProtocolError
from omnistore.keys import PrivateKey, base58
from omnistore.net.interface import Provider

PEER = bytes((0x00, 36)) + PrivateKey(bytes(32)).public.protobuf
IP4 = bytes((4, 127, 0, 0, 1, 6, 0x10, 0x2D))


def test_the_key_is_the_multihash_whatever_the_codec() -> None:
    digest = bytes(range(32))
    assert provider_key(CID.of_digest(RAW, digest)) == provider_key(CID.of_digest(DAG_CBOR, digest))
    assert provider_key(CID.of_digest(RAW, digest)) == b"\x1e\x20" + digest


def test_distance_is_the_xor_of_sha256() -> None:
    one, other = (int.from_bytes(hashlib.sha256(data).digest(), "big") for data in (b"key", b"peer"))
    assert distance(b"key", b"peer") == one ^ other


def test_a_peer_with_its_addresses() -> None:
    found = peer_untrusted(PEER, [IP4, IP4])
    assert found == Provider(PrivateKey(bytes(32)).public.peer_id, ("/ip4/127.0.0.1/tcp/4141",))


@pytest.mark.parametrize(
    ("binary", "text"),
    [
        (IP4, "/ip4/127.0.0.1/tcp/4141"),
        (b"\x29" + bytes(15) + b"\1\6\0\1", "/ip6/::1/tcp/1"),
        (b"\x36\x0bexample.org\6\0\1", "/dns4/example.org/tcp/1"),
        (IP4 + b"\xa5\x03" + bytes((len(PEER),)) + PEER, "/ip4/127.0.0.1/tcp/4141"),
        (bytes((4, 127, 0, 0, 1, 6, 0, 0)), None),
        (IP4[:-1], None),
        (IP4[:4], None),
        (IP4 + b"\xdd\x03", None),
        (IP4 + b"\xa5\x03\x7f" + PEER, None),
        (b"\x04\x7f\0\0\1\x91\x02\x10\x2d\xcd\x03", None),
        (b"\x36\x05a/b/c\6\0\1", None),
        (b"\x36\xff" + b"a" * 255, None),
        (b"\x36\0\6\0\1", None),
        (b"", None),
        (b"\xff" * 300, None),
    ],
    ids=[
        "ip4",
        "ip6",
        "dns4",
        "with-peer",
        "port-0",
        "short-port",
        "short-ip",
        "websocket",
        "long-peer",
        "quic",
        "slashes",
        "long-name",
        "no-name",
        "empty",
        "garbage",
    ],
)
def test_addresses_are_tcp_or_left_out(binary: bytes, text: str | None) -> None:
    assert peer_untrusted(PEER, [binary]).addrs == (() if text is None else (text,))


@pytest.mark.parametrize(
    "peer_id",
    [
        b"",
        b"\0",
        b"\0\0",
        PEER[:-1],
        PEER + b"\0",
        b"\x12\x20" + bytes(31),
        b"\x1e\x20" + bytes(32),
        bytes(100),
        b"\0\xff" + bytes(255),
    ],
    ids=["empty", "one-byte", "empty-hash", "short", "long", "short-sha256", "blake3", "zeros", "huge"],
)
def test_what_is_no_peer_id_is_refused(peer_id: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        peer_untrusted(peer_id)


def test_an_answer_lists_a_bounded_number_of_peers_and_addresses() -> None:
    entries = [(b"\x12\x20" + n.to_bytes(32, "big"), [IP4]) for n in range(MAX_PEERS + 1)]
    assert len(peers_untrusted(entries[:-1])) == MAX_PEERS
    with pytest.raises(RemoteProtocolError, match=str(MAX_PEERS)):
        peers_untrusted(entries)
    many = [bytes((4, 10, 0, n, 1, 6, 0, 1)) for n in range(200)]
    assert len(peer_untrusted(PEER, many).addrs) == MAX_ADDRS


@given(st.binary(max_size=100), st.lists(st.binary(max_size=60), max_size=5))
def test_any_bytes_end_in_a_peer_or_the_one_error(peer_id: bytes, addrs: list[bytes]) -> None:
    try:
        found = peer_untrusted(peer_id, addrs)
    except RemoteProtocolError:
        return
    assert peer_id_bytes_untrusted(found.peer) == peer_id


@given(st.text(max_size=80))
def test_any_text_is_a_peer_id_or_the_one_error(text: str) -> None:
    try:
        assert base58(peer_id_bytes_untrusted(text)) == text
    except RemoteProtocolError:
        return


def test_merge_lists_each_peer_once_without_us() -> None:
    one, two, us = Provider("A", ("/a",)), Provider("B", ()), Provider("U", ("/u",))
    merged = merge([one, us, two, Provider("A", ("/b", "/a"))], without="U", limit=20)
    assert merged == [Provider("A", ("/a", "/b")), two]
    assert merge([one, two], without="U", limit=1) == [one]
    crowd = [Provider("A", tuple(f"/{n}" for n in range(start, start + 10))) for start in range(0, 100, 10)]
    assert len(merge(crowd, without="U", limit=5)[0].addrs) == MAX_ADDRS

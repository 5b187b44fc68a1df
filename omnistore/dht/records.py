"""Provider records: what the DHT stores, and how much of a stranger's is believed (pure; spec/04 §3).

A record says "this peer holds the content of this key". It is never proof: whoever asks a provider
verifies what it sends. Addresses in it are hints, authenticated by the handshake with the peer.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Sequence
from typing import Final

from omnistore.cid import CID
from omnistore.errors import RemoteProtocolError
from omnistore.keys import base58
from omnistore.net.interface import Provider

MAX_PEERS: Final = 64
"""Peers read from one answer; the protocol's bucket size, and what answers hold, is 20."""
MAX_ADDRS: Final = 16
"""Addresses kept of one peer."""
MAX_PEER_ID: Final = 42
"""Bytes of the longest peer ID used: an inlined secp256k1 key; Ed25519's have 38."""

_BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_DNS_BYTES: Final = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._")
_IP4: Final = 4
_TCP: Final = 6
_IP6: Final = 41
_DNS: Final = {53: "dns", 54: "dns4", 55: "dns6"}
_P2P: Final = 421
_CIRCUIT: Final = 290


def provider_key(cid: CID) -> bytes:
    """The DHT key of a CID: its multihash, so that codec and CID version do not matter."""
    return cid.multihash


def distance(key: bytes, peer_id: bytes) -> int:
    """Kademlia's distance between a key and a peer: XOR of their SHA-256."""
    near, far = hashlib.sha256(key).digest(), hashlib.sha256(peer_id).digest()
    return int.from_bytes(near, "big") ^ int.from_bytes(far, "big")


def peer_id_bytes_untrusted(text: str) -> bytes:
    """The binary form of a base58 peer ID. Raises `RemoteProtocolError`."""
    number = 0
    for char in text[:64]:
        digit = _BASE58.find(char)
        if digit < 0:
            raise RemoteProtocolError(f"{text[:64]!r} is not a peer ID")
        number = number * 58 + digit
    body = number.to_bytes((number.bit_length() + 7) // 8, "big")
    data = bytes(len(text) - len(text.lstrip("1"))) + body
    if len(text) > 64 or not _is_peer_id(data):
        raise RemoteProtocolError(f"{text[:64]!r} is not a peer ID")
    return data


def peer_untrusted(peer_id: bytes, addrs: Iterable[bytes] = ()) -> Provider:
    """A peer of an answer. Raises `RemoteProtocolError` when its ID is none.

    Addresses over other transports than ours, and more than `MAX_ADDRS`, are left out.
    """
    if not _is_peer_id(peer_id):
        raise RemoteProtocolError(f"a DHT answer lists {peer_id[:50].hex()!r} as a peer ID")
    kept: dict[str, None] = {}
    for binary in addrs:
        text = _tcp_multiaddr(binary)
        if text is not None:
            kept[text] = None
        if len(kept) == MAX_ADDRS:
            break
    return Provider(base58(peer_id), tuple(kept))


def peers_untrusted(entries: Iterable[tuple[bytes, Sequence[bytes]]]) -> list[Provider]:
    """The peers of an answer, in its order. Raises `RemoteProtocolError`."""
    found: list[Provider] = []
    for peer_id, addrs in entries:
        if len(found) == MAX_PEERS:
            raise RemoteProtocolError(f"a DHT answer lists more than {MAX_PEERS} peers")
        found.append(peer_untrusted(peer_id, addrs))
    return found


def merge(providers: Iterable[Provider], *, without: str, limit: int) -> list[Provider]:
    """Each peer once, with all its addresses, in order of first mention; `without` is ourselves."""
    addrs: dict[str, dict[str, None]] = {}
    for provider in providers:
        if provider.peer != without and (provider.peer in addrs or len(addrs) < limit):
            known = addrs.setdefault(provider.peer, {})
            known.update(dict.fromkeys(provider.addrs[: MAX_ADDRS - len(known)]))
    return [Provider(peer, tuple(known)) for peer, known in addrs.items()]


def _is_peer_id(data: bytes) -> bool:
    """An identity multihash of a public key, or the SHA-256 of one (RSA)."""
    if len(data) < 3 or len(data) > MAX_PEER_ID or data[1] != len(data) - 2:
        return False
    return data[0] == 0x00 or (data[0] == 0x12 and data[1] == 32)


def _tcp_multiaddr(data: bytes) -> str | None:
    """A binary multiaddr as text, if it is TCP over IP or DNS, be it through a relay; None otherwise."""
    host, rest = _host(data)
    if host is None or len(rest) < 3 or rest[0] != _TCP:
        return None
    port, rest = int.from_bytes(rest[1:3], "big"), rest[3:]
    where = f"{host}/tcp/{port}" if port else None
    if not rest or where is None:
        return where
    relay, rest = _p2p(rest)
    if relay is None or not rest:
        return where if relay is not None else None
    code, rest = _uvarint(rest)
    target, rest = _p2p(rest) if rest else (b"", b"")
    if code != _CIRCUIT or target is None or rest or not _is_peer_id(relay):
        return None
    return f"{where}/p2p/{base58(relay)}/p2p-circuit"


def _p2p(data: bytes) -> tuple[bytes | None, bytes]:
    """The peer ID that a binary multiaddr goes on with, and what follows."""
    code, tail = _uvarint(data)
    length, rest = _uvarint(tail)
    if code != _P2P or length is None or length > len(rest):
        return None, data
    return rest[:length], rest[length:]


def _host(data: bytes) -> tuple[str | None, bytes]:
    code = data[0] if data else None
    if code == _IP4 and len(data) >= 5:
        return f"/ip4/{ipaddress.IPv4Address(data[1:5])}", data[5:]
    if code == _IP6 and len(data) >= 17:
        return f"/ip6/{ipaddress.IPv6Address(data[1:17])}", data[17:]
    if code in _DNS and len(data) >= 2 and 0 < data[1] < 0x80:
        name = data[2 : 2 + data[1]]
        if len(name) == data[1] and all(byte in _DNS_BYTES for byte in name):
            return f"/{_DNS[code]}/{name.decode('ascii')}", data[2 + len(name) :]
    return None, data


def _uvarint(data: bytes) -> tuple[int | None, bytes]:
    value = 0
    for index, byte in enumerate(data[:4]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, data[index + 1 :]
    return None, b""

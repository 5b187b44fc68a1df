"""How a peer sees us: the address it names in libp2p's identify protocol.

Says from where our connection arrives, nothing about who can connect to us. For diagnosis only: a
peer may say anything.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.message import DecodeError
from libp2p.identity.identify.pb.identify_pb2 import Identify

from omnistore.dht.records import peer_id_bytes_untrusted, peer_untrusted
from omnistore.errors import RemoteProtocolError
from omnistore.net.addresses import CIRCUIT, Address, parse_any_untrusted
from omnistore.net.interface import Network, Provider, Stream

PROTOCOL: Final = "/ipfs/id/1.0.0"
MAX_ANSWER: Final = 1 << 16
"""Bytes of an answer; ours has some 600."""


async def observed_host(network: Network, peer: str) -> str | None:
    """The IP address from which `peer` sees us; None if it does not say.

    Raises `PeerUnreachable` or `RemoteProtocolError`.
    """
    address = await observed_untrusted(await network.open_stream(Provider(peer), PROTOCOL), network.peer_id)
    return address.host if address is not None else None


async def agent_of(network: Network, peer: str) -> str:
    """What program `peer` says it is; nothing if it does not say.

    Raises `PeerUnreachable` or `RemoteProtocolError`.
    """
    stream = await network.open_stream(Provider(peer), PROTOCOL)
    try:
        answer = await _receive_untrusted(stream)
    finally:
        await stream.aclose()
    return str(answer.agent_version)


async def observed_untrusted(stream: Stream, own: str) -> Address | None:
    """From where the peer of an identify stream sees its connection; None if it does not say.

    `own`: our peer ID. Raises `PeerUnreachable` or `RemoteProtocolError`.
    """
    try:
        answer = await _receive_untrusted(stream)
    finally:
        await stream.aclose()
    addrs = peer_untrusted(peer_id_bytes_untrusted(own), [answer.observed_addr]).addrs
    return parse_any_untrusted(addrs[0]) if addrs and CIRCUIT not in addrs[0] else None


async def _receive_untrusted(stream: Stream) -> Identify:
    """The one message that the peer sends, behind its length. Raises `RemoteProtocolError`."""
    data = b""
    while piece := await stream.receive_some(MAX_ANSWER):
        data += piece
        if len(data) > MAX_ANSWER:
            raise RemoteProtocolError(f"{stream.peer} sends an endless identify message")
    end = next((index for index, byte in enumerate(data[:4]) if byte < 0x80), -1) + 1
    try:
        return Identify.FromString(data[end:])
    except DecodeError as error:
        raise RemoteProtocolError(f"{stream.peer} sent a malformed identify message: {error}") from None

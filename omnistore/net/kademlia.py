"""A Kademlia node: py-libp2p 0.8.1's `KadDHT` answers others; the questions are our own.

Faults mended:
- it takes 10 announcements per peer in 10 seconds and 12 streams at once, and drops the rest while
  their sender believes them kept: the bounds are raised, and bounded in memory instead;
- its own finds cache what they found for 48 hours, list peers twice, and skip a peer whose signed
  record is older than one known: our questions carry no such records and cache nothing;
- its own provides report success without a copy: `dht.service` confirms each;
- its own values are cached, and a value renewed as it is counts as refused: see `_Rules`;
- it speaks the public network's protocol ID whatever it is told: see `kad_protocol`;
- client-mode peers enter its routing table, and server-mode ones that just connected do not: here
  identify decides, when it has run.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import trio
from google.protobuf.message import DecodeError
from libp2p.kad_dht.common import format_time_rfc3339
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.pb.kademlia_pb2 import Message, Record
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.records.validator import NamespacedValidator
from libp2p.tools.anyio_service import background_trio_service
from libp2p.utils import encode_uvarint

from omnistore.dht.interface import Answer
from omnistore.dht.records import MAX_ADDRS, peers_untrusted
from omnistore.dht.values import Namespaces, best_index, check_value_untrusted, sorted_values
from omnistore.errors import PeerUnreachable, RemoteProtocolError
from omnistore.net.addresses import CIRCUIT
from omnistore.net.arrivals import watching_arrivals
from omnistore.net.interface import Provider, Stream
from omnistore.net.kad_protocol import PROTOCOL, OwnProtocolHost, admit_own, protocols
from omnistore.net.libp2p import Libp2pNetwork

logger = logging.getLogger(__name__)

MAX_ANSWER: Final = 1 << 20
"""Bytes of an answer: twenty peers with sixteen addresses each have under 40 KiB."""
MAX_KEYS: Final = 50_000
"""Keys that others may leave records for at this node, at about 1 KiB each; as many of values."""
ANNOUNCEMENTS: Final = 2_000
"""Accepted from one peer in ten seconds: what a node with 25 large models announces."""
STREAMS: Final = 128
"""Questions answered at once."""
ECHO_PATIENCE: Final = 2.0
"""Seconds that a peer has to take an announcement in."""
IDENTIFY_PATIENCE: Final = 10.0
"""Seconds that a new peer has to say which protocols it speaks."""


@dataclass(slots=True)
class KademliaNode:
    """One node of the DHT. Made by `open_kademlia`."""

    network: Libp2pNetwork
    dht: Any
    namespaces: Namespaces = field(default_factory=dict)
    """The rules for values, by the first component of their key."""
    _callbacks: list[Callable[[], None]] = field(default_factory=list)

    @property
    def peer_id(self) -> str:
        """Our own peer ID."""
        return self.network.peer_id

    def on_peer(self, callback: Callable[[], None]) -> None:
        """Call back whenever a peer that keeps records connects."""
        self._callbacks.append(callback)

    def start_peers(self, key: bytes) -> Sequence[Provider]:
        """The closest of the routing table; a client's table is what it connected to."""
        table = self.dht.routing_table
        return [self._provider(peer) for peer in table.find_local_closest_peers(key, 20)]

    def servers(self) -> Sequence[Provider]:
        """The DHT servers that we are connected to, with the addresses they gave."""
        connected = set(self.network.peers())
        table = self.dht.routing_table.get_peer_ids()
        return [self._provider(peer) for peer in table if str(peer) in connected]

    def own_records(self, key: bytes) -> Sequence[Provider]:
        """The records that others (and we) left with this node."""
        infos = self.dht.provider_store.get_providers(key)
        return [Provider(str(info.peer_id), _texts(info.addrs)) for info in infos]

    def keep_own(self, key: bytes) -> None:
        """Answer whoever asks this node that we hold `key`."""
        host = self.network.host
        self.dht.provider_store.add_provider(key, PeerInfo(host.get_id(), list(host.get_addrs())))

    def forget_own(self, key: bytes) -> None:
        """Undo `keep_own`."""
        self.dht.provider_store.providers.get(key, {}).pop(self.peer_id, None)

    def drop_peer(self, peer: str) -> None:
        """A peer did not answer: begin no lookup with it, unless it is still connected."""
        if peer not in self.network.peers():
            self.dht.routing_table.remove_peer(ID.from_base58(peer))

    async def refresh(self) -> None:
        """Fill the routing table from what those in it know; upstream does so every ten minutes."""
        await self.dht.refresh_routing_table()

    async def ask_providers(self, peer: Provider, key: bytes) -> Answer:
        """GET_PROVIDERS. Raises `PeerUnreachable` or `RemoteProtocolError`."""
        answer = await self._ask(peer, Message(type=Message.MessageType.GET_PROVIDERS, key=key))
        return Answer(
            providers=peers_untrusted((entry.id, entry.addrs) for entry in answer.providerPeers),
            closer=peers_untrusted((entry.id, entry.addrs) for entry in answer.closerPeers),
        )

    async def ask_value(self, peer: Provider, key: bytes) -> Answer:
        """GET_VALUE. Raises `PeerUnreachable` or `RemoteProtocolError`."""
        answer = await self._ask(peer, Message(type=Message.MessageType.GET_VALUE, key=key))
        there = answer.HasField("record") and answer.record.key == key and answer.record.value
        return Answer(
            providers=(),
            closer=peers_untrusted((entry.id, entry.addrs) for entry in answer.closerPeers),
            value=bytes(answer.record.value) if there else None,
        )

    async def put_value(self, peer: Provider, key: bytes, value: bytes) -> None:
        """PUT_VALUE; whether it was kept, `ask_value` tells. Raises `PeerUnreachable`."""
        message = Message(type=Message.MessageType.PUT_VALUE, key=key, record=Record(key=key, value=value))
        await self._tell(peer, message)

    def own_value(self, key: bytes) -> bytes | None:
        """The value that others (or we) left with this node."""
        record = self.dht.value_store.get(key)
        return bytes(record.value) if record is not None else None

    def keep_value(self, key: bytes, value: bytes) -> None:
        """Keep a value here too, unless a better one is kept. Raises `RemoteProtocolError`."""
        check_value_untrusted(self.namespaces, key, value)
        own = self.own_value(key)
        if own is None or best_index(self.namespaces, key, [own, value]) == 1:
            received = Record(key=key, value=value, timeReceived=format_time_rfc3339())
            self.dht.value_store.put_record(key, received)

    def sort_values(self, key: bytes, values: Iterable[bytes]) -> Sequence[bytes]:
        """The different ones that the rules of the key let pass, the right one first."""
        return sorted_values(self.namespaces, key, values)

    async def add_provider(self, peer: Provider, key: bytes) -> None:
        """ADD_PROVIDER for ourselves. Raises `PeerUnreachable`."""
        message = Message(type=Message.MessageType.ADD_PROVIDER, key=key)
        entry = message.providerPeers.add()
        entry.id = self.network.host.get_id().to_bytes()
        entry.addrs.extend(addr.to_bytes() for addr in self.network.host.get_addrs()[:MAX_ADDRS])
        await self._tell(peer, message)

    async def meet(self, peer: str) -> bool:
        """Take a peer that connected into the routing table, once it said that it is a DHT server.

        Whether it is one.
        """
        host = self.network.host
        peer_id = ID.from_base58(peer)
        with trio.move_on_after(IDENTIFY_PATIENCE):
            # Identify runs in a task of the library's that tells nobody when it is done.
            while peer in self.network.peers() and not protocols(host, peer_id):  # noqa: ASYNC110
                await trio.sleep(0.02)
        if peer not in self.network.peers() or PROTOCOL not in protocols(host, peer_id):
            return False
        await self.dht.routing_table.add_peer(peer_id)
        for callback in self._callbacks:
            callback()
        return True

    async def _ask(self, peer: Provider, question: Any) -> Any:
        stream = await self.network.open_stream(peer, PROTOCOL)
        try:
            await _send(stream, question)
            answer = await _receive_untrusted(stream)
        finally:
            await stream.aclose()
        if answer.type != question.type:
            raise RemoteProtocolError(f"{peer.peer} answered another question than the one asked")
        return answer

    async def _tell(self, peer: Provider, message: Any) -> None:
        """Send what needs no answer.

        Some peers echo the message, others say nothing, py-libp2p's reset the stream when we close
        our side: either way they have read it by the time it ends.
        """
        stream = await self.network.open_stream(peer, PROTOCOL)
        try:
            await _send(stream, message)
        finally:
            await stream.aclose()
        with trio.move_on_after(ECHO_PATIENCE), suppress(PeerUnreachable):
            while await stream.receive_some(MAX_ANSWER):
                pass

    def _provider(self, peer: Any) -> Provider:
        info = self.dht.routing_table.get_peer_info(peer)
        return Provider(str(peer), _texts(info.addrs) if info is not None else ())


@asynccontextmanager
async def open_kademlia(
    network: Libp2pNetwork, *, server: bool, namespaces: Namespaces | None = None, keys: int = MAX_KEYS
) -> AsyncIterator[KademliaNode]:
    """Join the DHT until the block ends; a `server` keeps records for others and answers them.

    `namespaces` are the rules for values; those of others are refused. `keys`: that others may leave
    provider records for.
    """
    host = network.host
    rules = namespaces or {}
    dht = KadDHT(
        OwnProtocolHost(host),
        DHTMode.SERVER if server else DHTMode.CLIENT,
        validator=_Rules(rules),
        validator_changed=True,
        strict_validation=True,
    )
    dht._provider_rate_max = ANNOUNCEMENTS
    dht._inbound_limiter = trio.CapacityLimiter(STREAMS)
    admit_own(dht.routing_table, host)
    dht.add_peer = _add_known_server(host, dht.routing_table)
    _bound_keys(dht.provider_store, keys)
    node = KademliaNode(network, dht, rules)
    async with background_trio_service(dht), trio.open_nursery() as nursery:

        def arrived(conn: Any) -> None:
            nursery.start_soon(node.meet, str(conn.muxed_conn.peer_id))

        with watching_arrivals(host.get_network(), arrived):
            for peer in host.get_connected_peers():
                nursery.start_soon(node.meet, str(peer))
            yield node
        nursery.cancel_scope.cancel()


class _Rules(NamespacedValidator):  # type: ignore[misc]  # libp2p is untyped to us
    """Our rules where the library asks for its own; the last of equals wins, so that one is renewed."""

    def __init__(self, namespaces: Namespaces) -> None:
        super().__init__({}, strict_validation=True)
        self._namespaces = namespaces

    def validate(self, key: str, value: bytes) -> None:
        """Raise for what is no value of `key`."""
        check_value_untrusted(self._namespaces, key.encode(), value)

    def select(self, key: str, values: list[bytes]) -> int:
        """Which of several is right."""
        return best_index(self._namespaces, key.encode(), values)


def _add_known_server(host: Any, table: Any) -> Any:
    """In place of the DHT's `add_peer`, which takes whoever asks for a DHT server."""

    async def add_peer(peer: Any, *, skip_server_mode_check: bool = False) -> bool:
        if PROTOCOL not in protocols(host, peer):
            return False
        return bool(await table.add_peer(peer))

    return add_peer


def _bound_keys(store: Any, most: int) -> None:
    """Take no new keys beyond `most`; upstream would take any number."""
    add: Callable[[bytes, Any], None] = store.add_provider

    def add_bounded(key: bytes, provider: Any) -> None:
        if key in store.providers or len(store.providers) < most:
            add(key, provider)

    store.add_provider = add_bounded


def _texts(addrs: Sequence[Any]) -> tuple[str, ...]:
    """Multiaddrs without the peer that they end in; a relay's, before it, stays."""
    cut = []
    for addr in addrs:
        where, circuit, _ = str(addr).partition(CIRCUIT)
        cut.append(where + circuit if circuit else where.partition("/p2p/")[0])
    return tuple(cut)


async def _send(stream: Stream, message: Any) -> None:
    body = message.SerializeToString()
    await stream.send_all(encode_uvarint(len(body)) + body)


async def _receive_untrusted(stream: Stream) -> Any:
    """One length-prefixed message. Raises `RemoteProtocolError`, or `PeerUnreachable` when cut short."""
    length = 0
    for shift in range(0, 28, 7):
        byte = (await stream.receive_exactly(1))[0]
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    else:
        raise RemoteProtocolError(f"{stream.peer} announces an endless DHT message")
    if length > MAX_ANSWER:
        raise RemoteProtocolError(f"{stream.peer} announces a DHT message of {length} bytes")
    body = await stream.receive_exactly(length) if length else b""
    try:
        return Message.FromString(body)
    except DecodeError as error:
        raise RemoteProtocolError(f"{stream.peer} sent a malformed DHT message: {error}") from None

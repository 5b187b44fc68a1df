"""The real network: one py-libp2p host over TCP, Noise and Yamux (spec/04-discovery §1-§2).

Importing this module imports libp2p (0.5 s, 69 MiB): do so where a node starts, not before.

Only the package `omnistore.net` knows libp2p, and each of its faults is mended in a module named
after it: `yamux`, `dialing`, `isolation`, `addresses`, `quiet`, `kademlia`. Deliberately off: mDNS,
UPnP, relays, QUIC, address discovery, and dialling anybody on the library's own account.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import AsyncIterator, Callable, Container, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import trio
from libp2p import new_host
from libp2p.connection_types import ConnectionType
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_x25519_key_pair
from libp2p.network.config import ConnectionConfig
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from omnistore.errors import BadConfig, LocalProtocolError, OmniError, PeerUnreachable
from omnistore.keys import PrivateKey
from omnistore.net import dialing, negotiation, private
from omnistore.net.addresses import (
    Address,
    check_listenable,
    expand,
    interface_addresses,
    parse_any_untrusted,
    parse_dialable_untrusted,
    parse_untrusted,
)
from omnistore.net.admission import PENDING
from omnistore.net.dialing import MAX_ADDRESSES, Dialer
from omnistore.net.interface import NextRoom, Provider, Stream, StreamServer
from omnistore.net.isolation import abort, guard_inbound, isolate_streams
from omnistore.net.quiet import quieten
from omnistore.net.yamux import Liveness

logger = logging.getLogger(__name__)

ADDRESS_TTL: Final = 3600
"""Seconds that an address we were given is remembered."""
RECEIVE_SIZE: Final = 1 << 20
"""Most bytes asked from the muxer at once: a block's worth."""
CLOSE_PATIENCE: Final = 0.5
"""Seconds for closing connections in good order; then they are cut."""


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """Deadlines and addresses of one node's network."""

    announce: tuple[str, ...] = ()
    """Multiaddrs to hand out first, as seen from outside (a forwarded port, a DNS name)."""
    connections: int = 512
    """Connections at once; each costs two sockets' buffers and three tasks."""
    dial_deadline: float = 10.0
    """Seconds to connect to a peer, all its addresses together."""
    open_deadline: float = 10.0
    """Seconds to agree on a stream's protocol."""
    liveness: Liveness = field(default_factory=Liveness)
    psk: bytes | None = field(default=None, repr=False)
    """The pre-shared key of a private swarm, 32 bytes: nobody without it is spoken to."""


@dataclass(slots=True)
class Libp2pStream:
    """A stream of the host, with `PeerUnreachable` as its only failure.

    A receive or send that was cancelled leaves the stream in doubt: reset it.
    """

    raw: Any
    """The library's `NetStream`."""
    peer: str
    """The authenticated peer ID at the other end."""
    swarm: Any
    """The library's connections."""
    _closed: bool = False

    async def send_all(self, *data: bytes | bytearray | memoryview) -> None:
        """Send everything, in order. Raises `PeerUnreachable` when the stream or connection broke."""
        with _translated(f"the stream to {self.peer} broke while sending"):
            # The muxed stream directly: the layer above it would copy and check once more.
            await self.raw.muxed_stream.write(*data)

    async def receive_some(self, max_bytes: int) -> bytes:
        """At least one byte, or `b""` at a clean end. Raises `PeerUnreachable` on a reset."""
        with _translated(f"the stream to {self.peer} broke while receiving"):
            # The muxed stream directly: the layer above it would take a reset for an end.
            data: bytes = await self.raw.muxed_stream.receive_some(min(max_bytes, RECEIVE_SIZE))
        return data

    async def receive_into(self, room: memoryview, more: NextRoom | None = None) -> int:
        """Bytes put into rooms, one at least; 0 at a clean end. Raises `PeerUnreachable` on a reset."""
        with _translated(f"the stream to {self.peer} broke while receiving"):
            count: int = await self.raw.muxed_stream.receive_into(room, more)
        return count

    async def receive_exactly(self, count: int) -> bytes:
        """Exactly `count` bytes. Raises `PeerUnreachable` when the stream ends first."""
        with _translated(f"the stream to {self.peer} broke while receiving"):
            data: bytes = await self.raw.muxed_stream.receive_exactly(count)
        if len(data) < count:
            raise PeerUnreachable(f"{self.peer} ended the stream {count - len(data)} bytes early")
        return data

    @property
    def relayed(self) -> bool:
        """Whether its connection goes through a relay."""
        return bool(self.raw.muxed_conn.get_connection_type() != ConnectionType.DIRECT)

    @property
    def superseded(self) -> bool:
        """Whether it goes through a relay, and a direct connection stands by now."""
        return self.relayed and bool(_direct_connections(self.swarm, self.raw.muxed_conn.peer_id))

    @property
    def remote_host(self) -> str | None:
        """The IP address at the other end; None behind a relay."""
        address = self.raw.muxed_conn.get_remote_address()
        return str(address[0]) if address else None

    async def finish(self) -> None:
        """End our direction alone. Raises `PeerUnreachable`."""
        with _translated(f"the stream to {self.peer} broke at its end"):
            await self.raw.muxed_stream.close()

    async def aclose(self) -> None:
        """Close cleanly; never raises, safe to call twice."""
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(deadline=trio.current_time() + CLOSE_PATIENCE, shield=True):
            try:
                await self.raw.close()
            except Exception as error:  # noqa: BLE001  # upstream raises anything from a broken stream
                logger.debug("closing a stream to %s failed: %r", self.peer, error)

    async def reset(self) -> None:
        """Abort; never raises, safe to call twice."""
        if self._closed:
            return
        self._closed = True
        with trio.CancelScope(shield=True):
            await abort(self.raw, CLOSE_PATIENCE)


@dataclass(slots=True)
class Libp2pNetwork:
    """A running host. Made by `open_network`."""

    host: Any
    """The library's host; for the modules of this package only."""
    peer_id: str
    options: NetworkOptions
    dialer: Dialer
    served: dict[str, StreamServer] = field(default_factory=dict)
    """What is answered, by protocol."""
    circuits: list[str] = field(default_factory=list)
    """Our addresses through relays, handed out last."""
    confirmed: list[str] = field(default_factory=list)
    """Addresses that others reached us at, whether our interfaces have them or not."""
    mapped: list[str] = field(default_factory=list)
    """Addresses that a router says it forwards to us."""
    needed: set[str] = field(default_factory=set)
    """Peers that make room for nobody, though nothing runs on their connections."""

    def addrs(self) -> Sequence[str]:
        """Our dialable multiaddrs, each ending in `/p2p/<peer_id>`; announced ones first."""
        return [str(addr) for addr in self.host.get_addrs()]

    def bound(self) -> list[Address]:
        """Where we listen: wildcards as the addresses of this machine's interfaces."""
        return _bound(self.host.get_transport_addrs())

    def claimed(self) -> frozenset[str]:
        """Our multiaddrs without relays, as we know them without anybody's word but the router's."""
        outside = [parse_untrusted(text).transport for text in (*self.options.announce, *self.mapped)]
        return frozenset((*outside, *(address.transport for address in self.bound())))

    def peers(self) -> Sequence[str]:
        """The peers we are connected to."""
        return [str(peer) for peer in self.host.get_connected_peers()]

    def is_direct(self, peer: str) -> bool:
        """Whether a connection to a peer stands that goes through no relay."""
        return bool(_direct_connections(self.host.get_network(), _peer_untrusted(peer)))

    def remote_addresses(self, peer: str, *, dialled: bool = False) -> list[tuple[str, int]]:
        """IP address and port at the other end of each direct connection to a peer.

        `dialled`: of those that we made, where the port is one that the peer listens at.
        """
        muxed = [
            conn.muxed_conn for conn in _direct_connections(self.host.get_network(), _peer_untrusted(peer))
        ]
        found = [one.get_remote_address() for one in muxed if one.is_initiator or not dialled]
        return [(str(address[0]), int(address[1])) for address in found if address is not None]

    async def connect(self, addr: str) -> str:
        """Dial a multiaddr ending in `/p2p/…`; the peer ID reached."""
        address, peer = parse_dialable_untrusted(addr)
        await self._connect(Provider(peer, (address.transport,)))
        return peer

    async def reach(self, provider: Provider) -> None:
        """Connect to a peer at any of its addresses. Raises `PeerUnreachable`."""
        await self._connect(provider)

    async def disconnect(self, peer: str) -> None:
        """Close every connection to a peer; never raises."""
        await _close_all(self.host.get_network().get_connections(_peer_untrusted(peer)))

    async def open_stream(self, provider: Provider, protocol: str) -> Stream:
        """Open a stream, dialling the provider's addresses if not connected.

        Nobody waits for the peer to agree on the protocol: if it does not, receiving fails.
        """
        await self._connect(provider)
        peer = _peer_untrusted(provider.peer)
        with (
            _translated(f"{provider.peer} did not open a stream of {protocol}"),
            trio.fail_after(self.options.open_deadline),
        ):
            raw = await self._stream(peer, protocol)
            return Libp2pStream(raw, provider.peer, self.host.get_network())

    async def open_direct(self, address: Address, protocol: str) -> Libp2pStream:
        """Open a stream over a direct connection, dialling that address if there is none."""
        peer = _peer_untrusted(address.peer or "")
        swarm = self.host.get_network()
        with (
            _translated(f"{address} did not open a stream of {protocol}"),
            trio.fail_after(self.options.open_deadline),
        ):
            if not _direct_connections(swarm, peer):
                await swarm._dial_addr_single_attempt(Multiaddr(address.transport), peer)
            # The library's choice among several connections is a direct one.
            return Libp2pStream(await self._stream(peer, protocol), str(peer), swarm)

    async def _stream(self, peer: Any, protocol: str) -> Any:
        """The library's stream, on which the protocol is taken for granted."""
        raw = await self.host.get_network().new_stream(peer)
        try:
            await raw.muxed_stream.ask(protocol)
        except BaseException:
            with trio.CancelScope(shield=True):
                await abort(raw, CLOSE_PATIENCE)
            raise
        raw.set_protocol(protocol)
        return raw

    def serve(self, protocol: str, server: StreamServer) -> None:
        """Answer inbound streams of `protocol` with `server`; its stream is closed when it returns."""

        async def run(raw: Any) -> None:
            stream = Libp2pStream(raw, str(raw.muxed_conn.peer_id), self.host.get_network())
            try:
                await server(stream)
            except BaseException as error:
                if _is_bug(error):
                    logger.warning(
                        "a bug ended a stream of %s from %s", protocol, stream.peer, exc_info=error
                    )
                await stream.reset()
                raise
            await stream.aclose()

        self.served[protocol] = server
        self.host.set_stream_handler(protocol, run)

    async def _connect(self, provider: Provider) -> None:
        peer = _peer_untrusted(provider.peer)
        if provider.peer == self.peer_id:
            raise PeerUnreachable(f"{provider.peer} is this node itself")
        known = [Multiaddr(text) for text in _usable_untrusted(provider.addrs)]
        network = self.host.get_network()
        if known:
            network.peerstore.add_addrs(peer, known, ADDRESS_TTL)
        with _translated(f"can not reach {provider.peer}"):
            await network.dial_peer(peer)


@asynccontextmanager
async def open_network(
    key: PrivateKey, listen: Sequence[str], options: NetworkOptions | None = None
) -> AsyncIterator[Libp2pNetwork]:
    """Run a host on the `listen` multiaddrs until the block ends.

    Raises `BadConfig` for an address that can not be listened on. On leaving, however it happens,
    every connection and listener is closed.
    """
    options = options or NetworkOptions()
    if not gc.get_freeze_count():
        # A hundred thousand objects of the library's modules: looking through them took a tenth of a fetch.
        gc.freeze()
    wanted = [parse_untrusted(text) for text in listen]
    outside = [parse_untrusted(text) for text in options.announce]
    check_listenable(wanted)
    quieten()
    circuits: list[str] = []
    confirmed: list[str] = []
    mapped: list[str] = []

    def dialable(bound: Sequence[Any]) -> list[Any]:
        return _dialable(bound, [*outside, *map(parse_untrusted, (*mapped, *confirmed))], circuits)

    needed: set[str] = set()
    host, dialer = _new_host(key, options, dialable, needed)
    network = Libp2pNetwork(
        host,
        key.public.peer_id,
        options,
        dialer,
        circuits=circuits,
        confirmed=confirmed,
        mapped=mapped,
        needed=needed,
    )
    try:
        async with host.run(listen_addrs=[Multiaddr(address.transport) for address in wanted]):
            try:
                _check_listening(host, wanted)
                yield network
            finally:
                with trio.CancelScope(shield=True):
                    await _close_host(host)
    except BaseExceptionGroup as group:
        # The library's nurseries wrap what the body raised, once per layer.
        alone = _only_exception(group)
        if alone is None:
            raise
        raise alone from None


def _new_host(
    key: PrivateKey,
    options: NetworkOptions,
    addrs_factory: Callable[[Sequence[Any]], list[Any]],
    needed: Container[str],
) -> tuple[Any, Dialer]:
    pair = create_new_key_pair(key.seed)
    noise = NoiseTransport(pair, noise_privkey=create_new_x25519_key_pair().private_key)
    host = new_host(
        key_pair=pair,
        sec_opt={NOISE: noise},
        muxer_opt={YAMUX: Yamux},
        enable_mDNS=False,
        enable_upnp=False,
        disable_identify_address_discovery=True,
        connection_config=ConnectionConfig(
            min_connections=0,
            low_watermark=0,
            high_watermark=options.connections + PENDING,
            # What is beyond is let go as soon as it is there: see `admission`.
            max_connections=options.connections + PENDING,
            outbound_stream_protocol_negotiation_timeout=math.ceil(options.open_deadline),
        ),
    )
    swarm = host.get_network()
    # Its circuit breaker refuses everybody after a few peers failed; our own bounds are in `isolation`.
    swarm.set_resource_manager(None)
    dialer = dialing.install(swarm, options.dial_deadline)
    negotiation.install(swarm.upgrader, options.liveness)
    if options.psk is not None:
        private.install(swarm.upgrader, options.psk)
    isolate_streams(swarm)
    guard_inbound(swarm, options.connections, needed)
    # The library's own cuts the relay out of an address through one.
    own = Multiaddr(f"/p2p/{host.get_id()}")
    host.get_addrs = lambda: [addr.encapsulate(own) for addr in addrs_factory(host.get_transport_addrs())]
    return host, dialer


def _direct_connections(swarm: Any, peer: Any) -> list[Any]:
    """The library's connections to a peer that stand and go through no relay."""
    return [
        conn
        for conn in swarm.get_connections(peer)
        if conn.get_connection_type() == ConnectionType.DIRECT and not conn.is_closed
    ]


def _dialable(bound: Sequence[Any], outside: Sequence[Address], circuits: Sequence[str]) -> list[Any]:
    direct = [address.transport for address in dict.fromkeys((*outside, *_bound(bound)))]
    return [Multiaddr(text) for text in (*direct, *circuits)]


def _bound(addrs: Sequence[Any]) -> list[Address]:
    return expand((parse_untrusted(str(addr)) for addr in addrs), interface_addresses() if addrs else ())


def _check_listening(host: Any, wanted: Sequence[Address]) -> None:
    """The library reports success when one of several addresses worked."""
    listening = host.get_network().listeners
    for address in wanted:
        if str(Multiaddr(address.transport)) not in listening:
            raise BadConfig(f"can not listen on {address}", remedy="Choose another address with --listen.")


async def _close_host(host: Any) -> None:
    """Close all connections at once (one after another each takes 0.2 s), then the listeners."""
    connections = host.get_network().get_connections()
    with trio.move_on_after(CLOSE_PATIENCE):
        await _close_all(connections)
    for conn in connections:
        await conn.muxed_conn.secured_conn.close()
    with trio.move_on_after(CLOSE_PATIENCE):
        await host.close()
    for listener in list(host.get_network().listeners.values()):
        with trio.move_on_after(CLOSE_PATIENCE):
            await listener.close()


async def _close_all(connections: Sequence[Any]) -> None:
    async def close(conn: Any) -> None:
        try:
            await conn.close()
        except Exception as error:  # noqa: BLE001  # upstream raises anything from a broken connection
            logger.debug("closing a connection failed: %r", error)

    async with trio.open_nursery() as nursery:
        for conn in connections:
            nursery.start_soon(close, conn)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn whatever the library raises into `PeerUnreachable`."""
    try:
        yield
    except OmniError:
        raise
    except trio.TooSlowError:
        raise PeerUnreachable(f"{what}: no answer in time") from None
    except Exception as error:  # upstream raises exceptions of twenty kinds, groups of them included
        # The library dumps its state over several lines.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise PeerUnreachable(f"{what}: {reason}") from error


def _is_bug(error: BaseException) -> bool:
    """Whether a server of ours should not have raised this, whatever its peer did."""
    expected = isinstance(error, OmniError) and not isinstance(error, LocalProtocolError)
    return isinstance(error, Exception) and not expected


def _peer_untrusted(text: str) -> Any:
    """The library's form of a peer ID. Raises `PeerUnreachable`: nobody answers to a malformed one."""
    try:
        return ID.from_base58(text)
    except ValueError as error:
        raise PeerUnreachable(f"{text[:80]!r} is not a peer ID: {error}") from None


def _usable_untrusted(addrs: Sequence[str]) -> list[str]:
    """Those of a stranger's addresses that we can dial; never raises."""
    usable = []
    for text in addrs[:MAX_ADDRESSES]:
        try:
            usable.append(parse_any_untrusted(text).transport)
        except BadConfig as error:
            logger.debug("ignoring an address: %s", error)
    return usable


def _only_exception(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The one exception inside nested groups, if there is just one."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        if len(found.exceptions) != 1:
            return None
        found = found.exceptions[0]
    return found

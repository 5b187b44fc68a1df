"""A direct connection in place of a relayed one (libp2p specs, relay/DCUtR; spec/04-discovery §11).

Whoever was reached through a relay first dials the other at its public addresses, which needs nothing
more where one end is public; else both dial at the same moment, each from the port that the other aims
at, so that each one's router takes the other's packets for answers. The shell around `holepunch`.

In place of py-libp2p 0.8.1's own, which dials whatever addresses it ever heard of a peer, private ones
included, and keeps those that a stranger names.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import trio
from libp2p.connection_types import ConnectionType
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from omnistore.dht.records import peer_untrusted
from omnistore.errors import NetworkError, OmniError, PeerUnreachable, ProtocolError
from omnistore.net import delimited
from omnistore.net.addresses import CIRCUIT, parse_untrusted
from omnistore.net.arrivals import watching_arrivals
from omnistore.net.holepunch import (
    AT_ONCE,
    Command,
    Dial,
    GiveUp,
    Kind,
    Punch,
    Send,
    Throttle,
    targets_untrusted,
)
from omnistore.net.interface import Provider, Stream
from omnistore.net.kad_protocol import protocols
from omnistore.net.libp2p import Libp2pNetwork, Libp2pStream
from omnistore.net.observed import observed_host
from omnistore.net.outside import outside_address
from omnistore.net.reachability import scope
from omnistore.net.sockets import FreePort, Source

logger = logging.getLogger(__name__)

PROTOCOL: Final = "/libp2p/dcutr"
MAX_MESSAGE: Final = 4096
"""Bytes, as the protocol says."""
IDENTIFY_SECONDS: Final = 10.0
"""For the other end to say, over the relay, who it is and what it speaks."""
REVERSAL_SECONDS: Final = 3.0
"""For a dial of the other end's public addresses: one behind a firewall never answers."""
DIAL_SECONDS: Final = 5.0
"""For both ends' dials to meet: a first SYN that was dropped is sent again after 1 and 3 s."""
DIAL_AGAIN: Final = 1.0
"""Seconds between two dials of an address that refuses, within that time."""
LAST_TOUCH: Final = 2.0
"""Seconds for other dials of the same round to end, once there is a connection."""
MESSAGE_SECONDS: Final = 15.0
"""For the other end to say something."""
SEEN_SECONDS: Final = 60.0
"""Seconds that a relay's word where it sees us is good for."""
LOOK_AHEAD: Final = 60.0
"""Seconds that a port is kept ready for the other end to begin."""
GRACE: Final = 60.0
"""Seconds that the relayed connection stays beside a direct one, should that break."""
GRACE_AGAIN: Final = 10.0
"""Seconds between looks whether anything still runs on it: a generation under way is not cut."""


@dataclass(frozen=True, slots=True)
class Ours:
    """What we tell a peer to dial, and from where we dial it."""

    host: str
    """Where the relay sees us."""
    addrs: tuple[str, ...]
    sources: dict[str, Source]
    """By family, `ip4` or `ip6`."""


@dataclass(slots=True, eq=False)
class HolePunching:
    """Makes relayed connections direct where that works. `run` it beside the network."""

    network: Libp2pNetwork
    on_direct: Callable[[str, str], None] = lambda peer, how: None
    """Called with a peer that is connected directly now, and how: `reversal` or `punch`."""
    outcomes: Counter[str] = field(default_factory=lambda: Counter(reversal=0, punch=0, failed=0))
    """Attempts that this node began, by how they ended."""
    punched: set[str] = field(default_factory=set)
    """Peers that our router may let in, since we sent to them from the port that we listen at: what they
    reach, others may not."""
    _seen: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Where a relay sees us, and when it said so."""
    _ready: dict[str, Ours] = field(default_factory=dict)
    """For peers that we reached through relays: what to say when they begin."""
    _throttle: Throttle = field(default_factory=Throttle)
    _slots: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(AT_ONCE))
    _nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Look after every relayed connection, for ever."""
        self.network.serve(PROTOCOL, self._serve)
        async with trio.open_nursery() as self._nursery:
            with watching_arrivals(self.network.host.get_network(), self._arrived):
                await trio.sleep_forever()

    # --- who begins -------------------------------------------------------------------------

    def _arrived(self, conn: Any) -> None:
        """A connection was made; one that came through a relay is worth a try."""
        if conn.get_connection_type() == ConnectionType.DIRECT or self._nursery is None:
            return
        if conn.muxed_conn.is_initiator:
            # Known when it is asked for, it takes nothing of the time that the other end measures.
            self._nursery.start_soon(self._look_ahead, conn)
        else:
            self._nursery.start_soon(self._improve, conn)

    async def _look_ahead(self, conn: Any) -> None:
        peer = str(conn.muxed_conn.peer_id)
        with suppress(NetworkError, ProtocolError, OSError), trio.move_on_after(LOOK_AHEAD):
            async with self._ours(conn) as ours:
                self._ready[peer] = ours
                try:
                    await trio.sleep_forever()
                finally:
                    self._ready.pop(peer, None)

    async def _improve(self, conn: Any) -> None:
        """Have a direct connection beside a relayed one that reached us."""
        peer = str(conn.muxed_conn.peer_id)
        if self.network.is_direct(peer) or not self._throttle.may(peer, trio.current_time()):
            return
        try:
            async with self._slots:
                how = await self._reverse(conn, peer) or await self._punch(conn, peer)
        except (NetworkError, ProtocolError, trio.TooSlowError, OSError) as error:
            logger.info("making the connection to %s direct: %s", peer, error or type(error).__name__)
            # The other end may have ended the talk because it was through already.
            how = "punch" if self.network.is_direct(peer) else None
        self.outcomes[how or "failed"] += 1
        if how is not None:
            logger.info("connected directly to %s, by %s", peer, how)
            self.on_direct(peer, how)
            await self._retire(conn, peer)

    async def _reverse(self, conn: Any, peer: str) -> str | None:
        """Dial the other end where it says it can be reached."""
        host, peer_id = self.network.host, conn.muxed_conn.peer_id
        with trio.move_on_after(IDENTIFY_SECONDS):
            while not protocols(host, peer_id) and not conn.is_closed:  # noqa: ASYNC110  # no event for it
                await trio.sleep(0.02)
        seen_at = scope(await self._seen_at(conn))
        try:
            known = [str(addr).partition("/p2p/")[0] for addr in host.get_peerstore().addrs(peer_id)]
        except PeerStoreError:
            known = []
        targets = targets_untrusted([addr for addr in known if _is_plain(addr)], seen_at)

        async def attempt(addr: str) -> None:
            await host.get_network()._dial_addr_single_attempt(Multiaddr(addr), peer_id)

        return "reversal" if await self._race(peer, targets, attempt, REVERSAL_SECONDS) else None

    async def _punch(self, conn: Any, peer: str) -> str | None:
        """Dial at the same moment as the other end."""
        if PROTOCOL not in protocols(self.network.host, conn.muxed_conn.peer_id):
            return None
        async with self._ours(conn) as ours:
            stream = await self.network.open_stream(Provider(peer), PROTOCOL)
            try:
                punch = Punch(begins=True, seen_at=scope(ours.host))
                commands = punch.begin(trio.current_time())
                while True:
                    dial = await self._say(stream, commands, ours)
                    if isinstance(dial, GiveUp):
                        raise PeerUnreachable(dial.why)
                    if dial is None:
                        commands = await self._hear_untrusted(stream, punch)
                    elif await self._dial(peer, dial, ours, client=False):
                        return "punch"
                    else:
                        commands = punch.begin(trio.current_time())
            finally:
                await stream.aclose()

    async def _retire(self, conn: Any, peer: str) -> None:
        """Let go of the relayed connection once nothing runs on it, unless it became the only one."""
        await trio.sleep(GRACE)
        while self.network.is_direct(peer) and not conn.is_closed:
            if not conn.get_streams():
                with trio.move_on_after(5):
                    await conn.close()
                return
            await trio.sleep(GRACE_AGAIN)

    # --- who answers ------------------------------------------------------------------------

    async def _serve(self, stream: Stream) -> None:
        assert isinstance(stream, Libp2pStream)
        try:
            await self._answer(stream)
        except (trio.TooSlowError, OSError) as error:
            logger.info("%s asked for a direct connection: %r", stream.peer, error)
            await stream.reset()

    async def _answer(self, stream: Libp2pStream) -> None:
        if not stream.relayed or self.network.is_direct(stream.peer):
            return
        conn = stream.raw.muxed_conn
        with trio.move_on_after(IDENTIFY_SECONDS if conn.is_initiator else 0):
            while stream.peer not in self._ready:  # noqa: ASYNC110  # a task of ours is at it
                await trio.sleep(0.02)
        ready = self._ready.get(stream.peer)
        async with self._ours(conn) if ready is None else nullcontext(ready) as ours:
            punch = Punch(begins=False, seen_at=scope(ours.host))
            while not self.network.is_direct(stream.peer):
                dial = await self._say(stream, await self._hear_untrusted(stream, punch), ours)
                if isinstance(dial, Dial) and await self._dial(stream.peer, dial, ours, client=True):
                    self.on_direct(stream.peer, "punch")

    # --- both -------------------------------------------------------------------------------

    async def _say(self, stream: Stream, commands: Sequence[Command], ours: Ours) -> Dial | GiveUp | None:
        """Send what is to be sent; what remains to be done."""
        for command in commands:
            if not isinstance(command, Send):
                return command
            message = HolePunch(type=HolePunch.Type.Value(command.kind))
            if command.kind == "CONNECT":
                message.ObsAddrs.extend(Multiaddr(addr).to_bytes() for addr in ours.addrs)
            await delimited.send(stream, message)
        return None

    async def _hear_untrusted(self, stream: Stream, punch: Punch) -> list[Command]:
        """What to do about the next message. Raises `ProtocolError`, `PeerUnreachable`, `TooSlowError`."""
        with trio.fail_after(MESSAGE_SECONDS):
            said = await delimited.receive_untrusted(stream, HolePunch, most=MAX_MESSAGE)
        kinds: dict[int, Kind] = {HolePunch.CONNECT: "CONNECT", HolePunch.SYNC: "SYNC"}
        addrs = peer_untrusted(ID.from_base58(stream.peer).to_bytes(), said.ObsAddrs[:16]).addrs
        return punch.received_untrusted(kinds.get(said.type), addrs, trio.current_time())

    async def _dial(self, peer: str, dial: Dial, ours: Ours, *, client: bool) -> bool:
        """Dial all at once when it is time; whether there is a direct connection.

        Both ends' dials make one connection, on which who answered is the client (DCUtR, step 5).
        """
        await trio.sleep_until(dial.at)
        swarm, peer_id = self.network.host.get_network(), ID.from_base58(peer)

        async def attempt(addr: str) -> None:
            address = parse_untrusted(addr)
            source = ours.sources.get(address.kind)
            if source is None:
                return
            while True:
                try:
                    stream = await source.connect(address.host, address.port)
                    break
                except OSError as error:
                    # Some routers refuse what comes before their own end has dialled.
                    logger.debug("dialling %s directly at %s: %r", peer, addr, error)
                    await trio.sleep(DIAL_AGAIN)
                    if self.network.is_direct(peer):
                        return
            raw = RawConnection(TrioTCPStream(stream), client)
            if client:
                await swarm.upgrade_outbound_raw_conn(raw, peer_id)
            else:
                assert self._nursery is not None
                # It lasts as long as the connection.
                self._nursery.start_soon(self._take, raw, Multiaddr(addr))

        reached = await self._race(peer, dial.addrs, attempt, DIAL_SECONDS)
        if reached:
            self.punched.add(peer)
        return reached

    async def _take(self, raw: Any, addr: Any) -> None:
        try:
            await self.network.host.get_network().upgrade_inbound_raw_conn(raw, addr)
        except Exception as error:  # noqa: BLE001  # upstream raises anything; it is one attempt that failed
            logger.debug("a connection punched through to %s ended: %r", addr, error)

    async def _race(
        self, peer: str, targets: Sequence[str], attempt: Callable[[str], Awaitable[None]], seconds: float
    ) -> bool:
        """Try all at once, until there is a direct connection to `peer`, whoever's dial made it."""
        trying, failed = len(targets), 0

        async def one(addr: str) -> None:
            nonlocal trying, failed
            try:
                await attempt(addr)
            except Exception as error:  # noqa: BLE001  # upstream raises anything; it is one attempt that failed
                logger.debug("dialling %s directly at %s: %r", peer, addr, error)
                failed += 1
            trying -= 1

        async with trio.open_nursery() as nursery:
            for addr in targets:
                nursery.start_soon(one, addr)
            with trio.move_on_after(seconds):
                while failed < len(targets) and not self.network.is_direct(peer):  # noqa: ASYNC110  # no event
                    await trio.sleep(0.02)
            if self.network.is_direct(peer):
                # One that is being taken in would be closed if it were cancelled now.
                with trio.move_on_after(LAST_TOUCH):
                    while trying:  # noqa: ASYNC110  # any of several tasks
                        await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
        return self.network.is_direct(peer)

    async def _seen_at(self, conn: Any) -> str:
        """The IP address at which the relay of a connection sees us. Raises `PeerUnreachable`."""
        relay, now = _relay_of(conn), trio.current_time()
        known = self._seen.get(relay)
        if known is None or known[1] < now - SEEN_SECONDS:
            host = await observed_host(self.network, relay)
            if host is None:
                raise PeerUnreachable("the relay does not say from where it sees this node")
            known = self._seen[relay] = (host, now)
        return known[0]

    @asynccontextmanager
    async def _ours(self, conn: Any) -> AsyncIterator[Ours]:
        """Addresses and ports for one attempt: those we listen at, else one of our own.

        Raises `PeerUnreachable`, `RemoteProtocolError` or `OSError`.
        """
        host, relay = await self._seen_at(conn), _relay_of(conn)
        kind = "ip6" if ":" in host else "ip4"
        listening = [parse_untrusted(str(addr)) for addr in self.network.host.get_transport_addrs()]
        sources = {address.kind: Source(address.host, address.port) for address in listening}
        named = [addr.partition("/p2p/")[0] for addr in self.network.addrs() if CIRCUIT not in addr]
        if kind in sources:
            # Its router now lets it in where it would let in nobody else, perhaps.
            self.punched.add(relay)
            outside = await outside_address(self.network, relay, sources[kind])
            yield Ours(host, _addresses(host, sources[kind].port, outside, named), sources)
            return
        with FreePort(kind) as free:
            outside = await outside_address(self.network, relay, free.source)
            yield Ours(host, _addresses(host, free.source.port, outside, ()), {kind: free.source})


def _relay_of(conn: Any) -> str:
    """The relay that a connection goes through."""
    where = str(conn.get_transport_addresses()[0]).partition(CIRCUIT)[0]
    return where.rpartition("/p2p/")[2]


def _addresses(host: str, port: int, outside: str | None, named: Sequence[str]) -> tuple[str, ...]:
    """Where we should be reached: as that port is seen, with the same port, and as we say ourselves.

    `outside`: where the relay sees that port; it may not have said, or may not be the last router.
    """
    same = f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}"
    every = (*([outside] if outside else []), same, *(addr for addr in named if _is_plain(addr)))
    return targets_untrusted(every, scope(host))


def _is_plain(addr: str) -> bool:
    """Whether it is TCP over IP and nothing more."""
    try:
        return CIRCUIT not in addr and parse_untrusted(addr).kind in ("ip4", "ip6")
    except OmniError:
        return False

"""Connections through relays: circuit relay v2's client side (libp2p specs, relay/circuit-v2; spec/04 §9).

In place of py-libp2p 0.8.1's `CircuitV2Transport`, which the library's own dialling leaves out and which
relays some 8 MB/s. A circuit is a stream at the relay; what runs over it is a whole connection of ours, Noise
and Yamux from end to end: the relay sees ciphertext, and the peer proves who it is as ever. A circuit is
never laid over another one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import trio
from libp2p.connection_types import ConnectionType
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb import circuit_pb2 as pb
from multiaddr import Multiaddr

from omnistore.errors import OmniError, PeerUnreachable, RemoteProtocolError
from omnistore.net import delimited
from omnistore.net.addresses import CIRCUIT, Address, parse_dialable_untrusted
from omnistore.net.interface import Stream
from omnistore.net.isolation import ConnectionEnded
from omnistore.net.libp2p import Libp2pNetwork, Libp2pStream
from omnistore.net.relay import ASK_SECONDS, HOP, STOP

logger = logging.getLogger(__name__)

RETRY_FIRST: Final = 1.0
RETRY_MOST: Final = 60.0
"""Seconds between two tries to reserve at a relay: doubling from the first to the most."""
LOOK_EVERY: Final = 2.0
"""Seconds between looks whether the connection to a relay is still there: a reservation ends with it."""
RENEW_AT: Final = 0.5
"""The share of a reservation's time after which it is renewed."""
SHORTEST: Final = 30.0
"""Seconds that a reservation counts for at least, whatever a relay says: no hurry may be forced on us."""


class CircuitConnection(RawConnection):  # type: ignore[misc]  # libp2p is untyped to us
    """A stream at a relay in place of a socket."""

    def __init__(self, stream: Stream, *, initiator: bool, addr: Any) -> None:
        super().__init__(stream, initiator, ConnectionType.RELAYED, [addr])
        self._circuit = stream

    async def write(self, data: bytes) -> None:
        """Send everything. Raises `RawConnError`."""
        try:
            await self._circuit.send_all(data)
        except PeerUnreachable as error:
            raise RawConnError(str(error)) from error

    async def read(self, n: int | None = None) -> bytes:
        """At most `n` bytes, none at the end. Raises `RawConnError`."""
        try:
            return await self._circuit.receive_some(1 << 18 if n is None else n)
        except PeerUnreachable as error:
            raise RawConnError(str(error)) from error

    async def close(self) -> None:
        """End the circuit."""
        await self._circuit.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        """The relay knows it; we do not."""
        return None


@dataclass(slots=True, eq=False)
class Circuits:
    """Dials through relays, takes what relays bring, keeps reservations. Made with the network."""

    network: Libp2pNetwork
    on_change: Callable[[], None] = lambda: None
    """Called when the addresses through relays that others can dial changed."""
    reserved: dict[str, str] = field(default_factory=dict)
    """Relay to the address that others reach us at through it, ending in `/p2p-circuit`."""
    _asked: set[str] = field(default_factory=set)
    """Relays whose circuits are taken: those that we asked for a reservation."""

    def install(self) -> None:
        """Dial addresses through relays, from now on."""
        self.network.dialer.circuit = self.dial

    async def dial(self, through: Address, peer_id: Any) -> Any:
        """A connection to a peer through a relay. Raises `SwarmException` or `PeerUnreachable`."""
        assert through.relay is not None
        stream = await self._open_hop(Address(through.kind, through.host, through.port, through.relay))
        try:
            asked = pb.HopMessage(type=pb.HopMessage.CONNECT)
            asked.peer.id = peer_id.to_bytes()
            await delimited.send(stream, asked)
            answer = await delimited.receive_untrusted(stream, pb.HopMessage)
            if answer.type != pb.HopMessage.STATUS or answer.status != pb.Status.OK:
                raise SwarmException(f"the relay {through.relay} says {_name(answer.status)}")
            raw = CircuitConnection(stream, initiator=True, addr=Multiaddr(through.transport))
            return await self.network.host.get_network().upgrade_outbound_raw_conn(raw, peer_id)
        except BaseException:
            await stream.reset()
            raise

    async def keep_reserved(self, addr: str, tries: float = math.inf) -> None:
        """Be reachable through the relay at `addr`; needed only by who can not be dialled.

        For ever, or until `tries` reservations have failed one after another.
        """
        address, relay = parse_dialable_untrusted(addr)
        self._asked.add(relay)
        if STOP not in self.network.served:
            self.network.serve(STOP, self._take)
        wait, failures = RETRY_FIRST, 0
        while failures < tries:
            try:
                valid = await self._reserve(address)
            except (OmniError, SwarmException, trio.TooSlowError) as error:
                logger.info("no reservation at the relay %s: %s", addr, error)
                self._set(relay, None)
                failures += 1
                await trio.sleep(wait)
                wait = min(2 * wait, RETRY_MOST)
                continue
            wait, failures = RETRY_FIRST, 0
            self._set(relay, f"{address.transport}/p2p/{relay}{CIRCUIT}")
            with trio.move_on_after(valid * RENEW_AT):
                while relay in self.network.peers():  # noqa: ASYNC110  # the library has no event for it
                    await trio.sleep(LOOK_EVERY)

    def release(self, relay: str) -> None:
        """Be reached through a relay no longer; what it refuses itself, it may keep until it expires."""
        self._asked.discard(relay)
        self._set(relay, None)

    async def _reserve(self, relay: Address) -> float:
        """Ask for a reservation; for how many seconds it is."""
        with trio.fail_after(ASK_SECONDS):
            stream = await self._open_hop(relay)
            try:
                await delimited.send(stream, pb.HopMessage(type=pb.HopMessage.RESERVE))
                answer = await delimited.receive_untrusted(stream, pb.HopMessage)
            finally:
                await stream.aclose()
        if answer.type != pb.HopMessage.STATUS or answer.status != pb.Status.OK:
            raise PeerUnreachable(f"{relay.peer} refuses: {_name(answer.status)}")
        return max(SHORTEST, min(float(answer.reservation.expire) - time.time(), 86400.0))

    async def _open_hop(self, relay: Address) -> Libp2pStream:
        """A stream at the relay itself, over a direct connection. Raises `PeerUnreachable`."""
        assert relay.peer is not None
        if relay.peer == self.network.peer_id:
            raise PeerUnreachable("this node is that relay itself")
        return await self.network.open_direct(relay, HOP)

    async def _take(self, stream: Stream) -> None:
        """A relay brings a connection: it lasts as long as this does."""
        try:
            with trio.fail_after(ASK_SECONDS):
                asked = await delimited.receive_untrusted(stream, pb.StopMessage)
        except (RemoteProtocolError, trio.TooSlowError) as error:
            logger.info("the relay %s makes no sense: %s", stream.peer, error)
            return
        if stream.peer not in self._asked or asked.type != pb.StopMessage.CONNECT:
            refusal = pb.StopMessage(type=pb.StopMessage.STATUS, status=pb.Status.PERMISSION_DENIED)
            await delimited.send(stream, refusal)
            return
        await delimited.send(stream, pb.StopMessage(type=pb.StopMessage.STATUS, status=pb.Status.OK))
        addr = Multiaddr(f"/p2p/{ID.from_base58(stream.peer)}{CIRCUIT}")
        raw = CircuitConnection(stream, initiator=False, addr=addr)
        try:
            await self.network.host.get_network().upgrade_inbound_raw_conn(raw, addr)
        except ConnectionEnded:
            return
        except Exception as error:  # noqa: BLE001  # upstream raises anything; it is one connection that ended
            logger.debug("a connection through the relay %s ended: %r", stream.peer, error)
            await stream.reset()

    def _set(self, relay: str, addr: str | None) -> None:
        before = dict(self.reserved)
        if addr is None:
            self.reserved.pop(relay, None)
        else:
            self.reserved[relay] = addr
        if self.reserved != before:
            self.network.circuits[:] = self.reserved.values()
            self.on_change()


def _name(status: Any) -> str:
    """A status for people."""
    return str(pb.Status.Name(status)) if status in pb.Status.values() else f"status {status}"

"""`VirtualNetwork`: many nodes in one process, with delay, bandwidth, loss and churn, in trio's time.

Implements `omnistore.net.interface` for tests. Run it under `trio.testing.MockClock` and hours
pass in seconds; the same seed gives the same run. Loss is what a stream sees of it: a reset. There
are no addresses to speak of: a peer is dialled by its ID.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from omnistore.cid import CID
from omnistore.errors import BadConfig, OmniError, PeerUnreachable
from omnistore.net.interface import AT_ONCE, NextRoom, Provider, Stream, StreamServer, spread

PIECE: Final = 64 << 10
"""Bytes that travel together."""


@dataclass(frozen=True, slots=True)
class LinkModel:
    """How bytes travel from one node to any other."""

    delay: float = 0.01
    """Seconds one way."""
    bandwidth: float = 100e6
    """Bytes per second that one node can send, over all its streams."""
    loss: float = 0.0
    """Chance that a piece of up to 64 KiB resets its stream."""
    buffer: int = 1 << 20
    """Bytes sent and unread after which a sender waits."""


class VirtualNetwork:
    """The nodes and what lies between them."""

    def __init__(self, nursery: trio.Nursery, rng: random.Random, link: LinkModel | None = None) -> None:
        """`nursery` runs what the nodes serve."""
        self.link = link or LinkModel()
        self.rng = rng
        self.nodes: dict[str, VirtualNode] = {}
        self.records: dict[CID, list[str]] = {}
        """Who provides what: the perfect DHT of `VirtualRouting`."""
        self._nursery = nursery

    def node(self, peer_id: str, link: LinkModel | None = None) -> VirtualNode:
        """A new node."""
        node = self.nodes[peer_id] = VirtualNode(self, peer_id, link or self.link)
        return node

    def start(self, server: StreamServer, stream: VirtualStream) -> None:
        """Run the serving side of a stream; what it raises ends that stream only."""
        self._nursery.start_soon(_serve, server, stream)


async def _serve(server: Callable[[Stream], Awaitable[None]], stream: VirtualStream) -> None:
    try:
        await server(stream)
    except OmniError:
        await stream.reset()


class VirtualNode:
    """One node's `Network`."""

    def __init__(self, network: VirtualNetwork, peer_id: str, link: LinkModel) -> None:
        self.peer_id = peer_id
        self.link = link
        self.up = True
        self.frozen = False
        """While set, nothing it sent arrives anywhere: a stopped process."""
        self.free_at = 0.0
        """When its uplink has sent everything given to it so far."""
        self.streams: set[VirtualStream] = set()
        self.network = network
        self._servers: dict[str, StreamServer] = {}

    def addrs(self) -> Sequence[str]:
        return (f"/memory/{self.peer_id}/p2p/{self.peer_id}",)

    async def connect(self, addr: str) -> str:
        _, found, peer = addr.rpartition("/p2p/")
        if not found:
            raise BadConfig(f"{addr!r} names no peer")
        self._reach(peer)
        await trio.sleep(2 * self.link.delay)
        return peer

    async def open_stream(self, provider: Provider, protocol: str) -> Stream:
        other = self._reach(provider.peer)
        await trio.sleep(2 * self.link.delay)
        server = other._servers.get(protocol)
        if server is None or not other.up:
            raise PeerUnreachable(f"{provider.peer} does not speak {protocol}")
        there, back = _Pipe(self, other), _Pipe(other, self)
        mine, theirs = VirtualStream(self, other, back, there), VirtualStream(other, self, there, back)
        self.network.start(server, theirs)
        return mine

    def serve(self, protocol: str, server: StreamServer) -> None:
        self._servers[protocol] = server

    def refuse(self, protocol: str) -> None:
        """Speak a protocol no longer."""
        self._servers.pop(protocol, None)

    def leave(self) -> None:
        """Die: every stream is reset, and nobody can dial it."""
        self.up = False
        for stream in list(self.streams):
            stream.break_()

    def come_back(self) -> None:
        """Be reachable again."""
        self.up = True

    def _reach(self, peer: str) -> VirtualNode:
        other = self.network.nodes.get(peer)
        if other is None or not other.up or not self.up:
            raise PeerUnreachable(f"{peer} can not be reached")
        return other


@dataclass(slots=True, eq=False)
class _Pipe:
    """One direction of a stream."""

    sender: VirtualNode
    receiver: VirtualNode
    pieces: deque[tuple[float, bytes]] = field(default_factory=deque)
    """(when it arrives, bytes); no bytes where the stream is reset instead."""
    unread: int = 0
    ended: bool = False
    broken: bool = False
    changed: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)


@dataclass(slots=True, eq=False)
class VirtualStream:
    """One end of a stream between two nodes."""

    local: VirtualNode
    remote: VirtualNode
    incoming: _Pipe
    outgoing: _Pipe

    def __post_init__(self) -> None:
        self.local.streams.add(self)

    @property
    def peer(self) -> str:
        return self.remote.peer_id

    async def send_all(self, *data: bytes | bytearray | memoryview) -> None:
        for one in data:
            await self._send(one)

    async def _send(self, data: bytes | bytearray | memoryview) -> None:
        pipe = self.outgoing
        network = self.local.network
        await trio.lowlevel.checkpoint()
        for start in range(0, len(data), PIECE):
            piece = bytes(data[start : start + PIECE])
            while pipe.unread >= self.local.link.buffer and not pipe.broken:
                await pipe.changed.park()
            if pipe.broken or pipe.ended:
                raise PeerUnreachable(f"the stream to {self.peer} broke while sending")
            now = trio.current_time()
            self.local.free_at = max(now, self.local.free_at) + len(piece) / self.local.link.bandwidth
            lost = network.rng.random() < self.local.link.loss
            pipe.pieces.append((self.local.free_at + self.local.link.delay, b"" if lost else piece))
            pipe.unread += len(piece)
            pipe.changed.unpark_all()

    async def receive_some(self, max_bytes: int) -> bytes:
        pipe = self.incoming
        while True:
            await trio.lowlevel.checkpoint()
            if pipe.broken:
                raise PeerUnreachable(f"the stream to {self.peer} broke while receiving")
            if pipe.pieces and not self.remote.frozen:
                arrives, data = pipe.pieces[0]
                if arrives <= trio.current_time() and not data:
                    self.break_()
                    continue
                if arrives <= trio.current_time():
                    return self._read(data, max_bytes)
                with trio.move_on_at(arrives):
                    await pipe.changed.park()
            elif pipe.ended and not pipe.pieces:
                return b""
            elif self.remote.frozen:
                await trio.sleep(0.1)
            else:
                await pipe.changed.park()

    def _read(self, data: bytes, max_bytes: int) -> bytes:
        pipe = self.incoming
        arrived, rest = data[:max_bytes], data[max_bytes:]
        when, _ = pipe.pieces.popleft()
        if rest:
            pipe.pieces.appendleft((when, rest))
        pipe.unread -= len(arrived)
        pipe.changed.unpark_all()
        return arrived

    @property
    def superseded(self) -> bool:
        """There is one connection to each peer."""
        return False

    async def receive_into(self, room: memoryview, more: NextRoom | None = None) -> int:
        data = await self.receive_some(len(room) if more is None else max(len(room), AT_ONCE))
        spread(data, room, more)
        return len(data)

    async def receive_exactly(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            data = await self.receive_some(count - len(found))
            if not data:
                raise PeerUnreachable(f"{self.peer} ended the stream early")
            found += data
        return found

    async def aclose(self) -> None:
        self.outgoing.ended = True
        self.outgoing.changed.unpark_all()
        self.local.streams.discard(self)

    async def reset(self) -> None:
        self.break_()

    def break_(self) -> None:
        """Reset both directions at once."""
        for pipe in (self.incoming, self.outgoing):
            pipe.broken = True
            pipe.changed.unpark_all()
        self.local.streams.discard(self)


@dataclass(frozen=True, slots=True)
class VirtualRouting:
    """One node's view of a DHT that knows everything and forgets nothing."""

    node: VirtualNode
    latency: float = 0.2
    """Seconds that a look-up takes."""

    async def provide(self, cid: CID) -> int:
        await trio.sleep(self.latency)
        peers = self.node.network.records.setdefault(cid, [])
        if self.node.peer_id not in peers:
            peers.append(self.node.peer_id)
        return 1

    async def find_providers(
        self, cid: CID, *, limit: int = 20, skip: Collection[str] = ()
    ) -> Sequence[Provider]:
        await trio.sleep(self.latency)
        peers = self.node.network.records.get(cid, [])
        return [Provider(peer) for peer in peers if peer != self.node.peer_id and peer not in skip][:limit]

"""A network that counts what goes through it, by peer (pure: no clock, no input or output of its own).

Wraps any `Network` and counts the bytes of the protocols that are served or spoken through it. Limits
nothing: caps are `transfer`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from omnistore.net.interface import Network, NextRoom, Provider, Stream, StreamServer

REMEMBERED: Final = 256
"""Peers without a stream whose counts are kept; the longest gone are forgotten first."""


@dataclass(slots=True)
class PeerTraffic:
    """What one peer sent and got since it was first met."""

    sent: int = 0
    """Bytes we sent it."""
    received: int = 0
    """Bytes it sent us."""
    streams: int = 0
    """Open now."""


@dataclass(slots=True)
class Traffic:
    """Everything counted; only ever grows, but for the peers."""

    sent: int = 0
    received: int = 0
    streams: int = 0
    """Open now."""
    _peers: dict[str, PeerTraffic] = field(default_factory=dict)

    def peers(self) -> Mapping[str, PeerTraffic]:
        """Peers with a stream, and those that had one last."""
        return dict(self._peers)

    def opened(self, peer: str) -> PeerTraffic:
        """A stream of this peer begins."""
        # Put at the end: the beginning is who was met longest ago.
        counts = self._peers[peer] = self._peers.pop(peer, PeerTraffic())
        counts.streams += 1
        self.streams += 1
        return counts

    def closed(self, counts: PeerTraffic) -> None:
        """A stream ends."""
        counts.streams -= 1
        self.streams -= 1
        gone = [peer for peer, one in self._peers.items() if not one.streams]
        for peer in gone[: max(0, len(gone) - REMEMBERED)]:
            del self._peers[peer]


@dataclass(slots=True, eq=False)
class MeteredStream:
    """A stream that is counted."""

    inner: Stream
    traffic: Traffic
    counts: PeerTraffic
    _open: bool = True

    @property
    def peer(self) -> str:
        return self.inner.peer

    @property
    def superseded(self) -> bool:
        return self.inner.superseded

    async def send_all(self, *data: bytes | bytearray | memoryview) -> None:
        await self.inner.send_all(*data)
        count = sum(map(len, data))
        self.traffic.sent += count
        self.counts.sent += count

    async def receive_some(self, max_bytes: int) -> bytes:
        data = await self.inner.receive_some(max_bytes)
        self._received(len(data))
        return data

    async def receive_into(self, room: memoryview, more: NextRoom | None = None) -> int:
        count = await self.inner.receive_into(room, more)
        self._received(count)
        return count

    async def receive_exactly(self, count: int) -> bytes:
        data = await self.inner.receive_exactly(count)
        self._received(len(data))
        return data

    async def aclose(self) -> None:
        self.end()
        await self.inner.aclose()

    async def reset(self) -> None:
        self.end()
        await self.inner.reset()

    def end(self) -> None:
        """Count the stream as gone; safe to call twice."""
        if self._open:
            self._open = False
            self.traffic.closed(self.counts)

    def _received(self, count: int) -> None:
        self.traffic.received += count
        self.counts.received += count


@dataclass(frozen=True, slots=True)
class MeteredNetwork:
    """`inner`, counted in `traffic`."""

    inner: Network
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def peer_id(self) -> str:
        return self.inner.peer_id

    def addrs(self) -> Sequence[str]:
        return self.inner.addrs()

    async def connect(self, addr: str) -> str:
        return await self.inner.connect(addr)

    async def open_stream(self, provider: Provider, protocol: str) -> Stream:
        return self._metered(await self.inner.open_stream(provider, protocol))

    def serve(self, protocol: str, server: StreamServer) -> None:
        async def serve(stream: Stream) -> None:
            metered = self._metered(stream)
            try:
                await server(metered)
            finally:
                metered.end()

        self.inner.serve(protocol, serve)

    def _metered(self, stream: Stream) -> MeteredStream:
        return MeteredStream(stream, self.traffic, self.traffic.opened(stream.peer))

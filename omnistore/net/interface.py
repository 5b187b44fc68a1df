"""What the rest of the program knows of a network (pure: types only).

Implementations: `omnistore.net.libp2p` (the real one) and `omnistore.testing.network`
(`VirtualNetwork`, in memory, with delay, loss and virtual time).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from omnistore.cid import CID


@dataclass(frozen=True, slots=True)
class Provider:
    """A peer that claims to hold a CID."""

    peer: str
    """libp2p peer ID, base58."""
    addrs: tuple[str, ...] = ()
    """Multiaddrs without the trailing `/p2p/…`; empty when the network knows how to reach it."""


class Stream(Protocol):
    """One bidirectional, reliable byte stream to a peer. One reader task and one writer task at a time."""

    @property
    def peer(self) -> str:
        """The authenticated peer ID at the other end."""
        ...

    @property
    def superseded(self) -> bool:
        """Whether a better connection to the peer stands by now, which a new stream would take."""
        ...

    async def send_all(self, *data: bytes | bytearray | memoryview) -> None:
        """Send everything, in order. Raises `PeerUnreachable` when the stream or connection broke."""
        ...

    async def receive_some(self, max_bytes: int) -> bytes:
        """At least one byte, or `b""` at a clean end. Raises `PeerUnreachable` on a reset."""
        ...

    async def receive_into(self, room: memoryview) -> int:
        """Fill `room`, which is not empty, or as much of it as comes without a pause: the bytes put there.

        0 at a clean end. Raises `PeerUnreachable` on a reset.
        """
        ...

    async def receive_exactly(self, count: int) -> bytes:
        """Exactly `count` bytes. Raises `PeerUnreachable` when the stream ends first."""
        ...

    async def aclose(self) -> None:
        """Close cleanly; never raises, safe to call twice."""
        ...

    async def reset(self) -> None:
        """Abort; never raises, safe to call twice."""
        ...


StreamServer: TypeAlias = Callable[[Stream], Awaitable[None]]
"""Runs one inbound stream. What it raises ends that stream only, never the node."""


class Network(Protocol):
    """A node's view of its peers."""

    @property
    def peer_id(self) -> str:
        """Our own peer ID, base58."""
        ...

    def addrs(self) -> Sequence[str]:
        """Our dialable multiaddrs, each ending in `/p2p/<peer_id>`."""
        ...

    async def connect(self, addr: str) -> str:
        """Dial a multiaddr ending in `/p2p/…`; the peer ID reached.

        Raises `BadConfig` for an address that can not be parsed, `PeerUnreachable` otherwise.
        """
        ...

    async def open_stream(self, provider: Provider, protocol: str) -> Stream:
        """Open a stream, dialling the provider's addresses if not connected. Raises `PeerUnreachable`.

        Of a peer that does not speak `protocol` that may show only when the stream is received from.
        """
        ...

    def serve(self, protocol: str, server: StreamServer) -> None:
        """Answer inbound streams of `protocol` with `server`."""
        ...


class ContentRouting(Protocol):
    """Who holds what: the DHT, as the rest of the program sees it."""

    async def provide(self, cid: CID) -> int:
        """Announce that we hold `cid`; the number of peers confirmed to have the record."""
        ...

    async def find_providers(
        self, cid: CID, *, limit: int = 20, skip: Collection[str] = ()
    ) -> Sequence[Provider]:
        """Peers that claim to hold `cid`, without us, each once. Empty when there are none.

        `skip` are peers that the caller knows, dead ones above all: they take none of the places.
        """
        ...

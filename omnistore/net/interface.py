"""What the rest of the program knows of a network (pure: types only).

Implementations: `omnistore.net.libp2p` (the real one) and `omnistore.testing.network`
(`VirtualNetwork`, in memory, with delay, loss and virtual time).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from omnistore.cid import CID


@dataclass(frozen=True, slots=True)
class Provider:
    """A peer that claims to hold a CID."""

    peer: str
    """libp2p peer ID, base58."""
    addrs: tuple[str, ...] = ()
    """Multiaddrs without the trailing `/p2p/…`; empty when the network knows how to reach it."""


NextRoom: TypeAlias = Callable[[], memoryview | None]
"""Told that all of the last room has its bytes: where those behind them belong, not empty; None for nowhere
yet. Raises nothing."""


AT_ONCE: Final = 64
"""Bytes worth taking where less is asked for, by whoever can `spread` them: the beginning of a message."""


def spread(data: bytes, room: memoryview, more: NextRoom | None) -> None:
    """Put `data` into one room after the other; what there is no room for is lost."""
    rest = memoryview(data)
    place: memoryview | None = room
    while rest and place is not None:
        size = min(len(rest), len(place))
        place[:size] = rest[:size]
        place, rest = place[size:], rest[size:]
        if not place:
            place = more() if more is not None else None


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

    async def receive_into(self, room: memoryview, more: NextRoom | None = None) -> int:
        """Fill `room`, which is not empty, or as much of it as comes without a pause: the bytes put there.

        With `more`, what comes behind a full room is put into the next one, as long as there is one; all of
        it counts. 0 at a clean end. Raises `PeerUnreachable` on a reset.
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

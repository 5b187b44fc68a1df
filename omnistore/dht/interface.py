"""What the DHT's service needs of a Kademlia node (pure: types only).

Implementations: `omnistore.net.kademlia` (the real one); the tests have one in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from omnistore.net.interface import Provider


@dataclass(frozen=True, slots=True)
class Answer:
    """What a peer said when asked about a key."""

    providers: Sequence[Provider]
    closer: Sequence[Provider]
    """Peers that it knows to be closer to the key."""
    value: bytes | None = None
    """What it keeps under the key, if it was asked for that."""


class Kademlia(Protocol):
    """One node of the DHT."""

    @property
    def peer_id(self) -> str:
        """Our own peer ID."""
        ...

    def start_peers(self, key: bytes) -> Sequence[Provider]:
        """Peers of ours to begin a lookup with."""
        ...

    def own_records(self, key: bytes) -> Sequence[Provider]:
        """The records that others (and we) left with this node."""
        ...

    def keep_own(self, key: bytes) -> None:
        """Answer whoever asks this node that we hold `key`."""
        ...

    def forget_own(self, key: bytes) -> None:
        """Undo `keep_own`."""
        ...

    async def ask_providers(self, peer: Provider, key: bytes) -> Answer:
        """GET_PROVIDERS. Raises `PeerUnreachable` or `RemoteProtocolError`."""
        ...

    async def add_provider(self, peer: Provider, key: bytes) -> None:
        """ADD_PROVIDER for ourselves. Raises `PeerUnreachable` or `RemoteProtocolError`."""
        ...

    def own_value(self, key: bytes) -> bytes | None:
        """The value that others (or we) left with this node."""
        ...

    def keep_value(self, key: bytes, value: bytes) -> None:
        """Keep a value here too, unless a better one is kept. Raises `RemoteProtocolError`."""
        ...

    def sort_values(self, key: bytes, values: Iterable[bytes]) -> Sequence[bytes]:
        """The different ones that the rules of the key let pass, the right one first."""
        ...

    async def ask_value(self, peer: Provider, key: bytes) -> Answer:
        """GET_VALUE. Raises `PeerUnreachable` or `RemoteProtocolError`."""
        ...

    async def put_value(self, peer: Provider, key: bytes, value: bytes) -> None:
        """PUT_VALUE. Raises `PeerUnreachable`."""
        ...

    def drop_peer(self, peer: str) -> None:
        """A peer did not answer: begin no lookup with it, unless it is still connected."""
        ...

    def on_peer(self, callback: Callable[[], None]) -> None:
        """Call back whenever a peer that keeps records connects."""
        ...

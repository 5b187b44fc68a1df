"""What the DHT's service needs of a Kademlia node (pure: types only).

Implementations: `omnistore.net.kademlia` (the real one); the tests have one in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from omnistore.net.interface import Provider


@dataclass(frozen=True, slots=True)
class Answer:
    """What a peer said when asked for the providers of a key."""

    providers: Sequence[Provider]
    closer: Sequence[Provider]
    """Peers that it knows to be closer to the key."""


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

    def drop_peer(self, peer: str) -> None:
        """A peer did not answer: begin no lookup with it, unless it is still connected."""
        ...

    def on_peer(self, callback: Callable[[], None]) -> None:
        """Call back whenever a peer that keeps records connects."""
        ...

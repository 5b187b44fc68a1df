"""Kademlia's iterative lookup as a state machine (pure; spec/04-discovery §4).

The shell asks whom `next_peers` names and reports each answer or failure; nothing waits here, so
one dead peer delays only itself. Ends when the closest peers known have all answered or failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from omnistore.dht.records import distance, peer_id_bytes_untrusted
from omnistore.net.interface import Provider

WIDTH: Final = 20
"""Kademlia's k: how many of the closest peers keep a record."""
PARALLEL: Final = 10
"""Kademlia's alpha: questions under way at once."""
MAX_KNOWN: Final = 1000
"""Peers remembered in one lookup: liars may not fill the memory."""


@dataclass(slots=True)
class Lookup:
    """One walk towards a key."""

    key: bytes
    us: str
    """Our own peer ID, never asked."""
    _distance: dict[str, int] = field(default_factory=dict)
    _known: dict[str, Provider] = field(default_factory=dict)
    _asked: set[str] = field(default_factory=set)
    _answered: set[str] = field(default_factory=set)
    _failed: set[str] = field(default_factory=set)

    def learn(self, peers: Iterable[Provider]) -> None:
        """Add candidates. Raises `RemoteProtocolError` for a peer ID that is none."""
        for peer in peers:
            if peer.peer == self.us:
                continue
            if peer.peer not in self._known or not self._known[peer.peer].addrs:
                self._known[peer.peer] = peer
            if peer.peer not in self._distance:
                self._distance[peer.peer] = distance(self.key, peer_id_bytes_untrusted(peer.peer))
            if len(self._known) > MAX_KNOWN:
                self._forget_farthest()

    def next_peers(self) -> Sequence[Provider]:
        """Whom to ask now; they count as asked from here on."""
        room = PARALLEL - len(self._asked - self._answered - self._failed)
        wanted = [peer for peer in self._frontier() if peer not in self._asked][: max(room, 0)]
        self._asked.update(wanted)
        return [self._known[peer] for peer in wanted]

    def answered(self, peer: str, closer: Iterable[Provider]) -> None:
        """A peer answered, naming others."""
        self._answered.add(peer)
        self.learn(closer)

    def failed(self, peer: str) -> None:
        """A peer did not answer, or not sensibly."""
        self._failed.add(peer)

    @property
    def done(self) -> bool:
        """Whether every peer worth asking has answered or failed."""
        return all(peer in self._answered for peer in self._frontier())

    def closest(self) -> Sequence[Provider]:
        """The closest peers that answered, closest first."""
        order = sorted(self._answered, key=self._distance.__getitem__)
        return [self._known[peer] for peer in order[:WIDTH]]

    def _forget_farthest(self) -> None:
        """Halve what was never asked."""
        unasked = sorted(self._known.keys() - self._asked, key=self._distance.__getitem__)
        for peer in unasked[len(unasked) // 2 :]:
            del self._known[peer], self._distance[peer]

    def _frontier(self) -> list[str]:
        """The closest peers known that have not failed."""
        order = sorted(self._known.keys() - self._failed, key=self._distance.__getitem__)
        return order[:WIDTH]

"""One joined peer, as a session sees it: what it was asked, what it holds, how fast it is.

And what follows from comparing peers: whose asks another could answer sooner, and who can be spared.
Pure; the deciding is `session`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from omnistore.block import BLOCK_SIZE
from omnistore.cid import CID
from omnistore.transfer.demand import Demand, Group, Holdings, Wanted
from omnistore.transfer.window import PeerFlow

EARLY_MOST: Final = 256
"""Parts that a peer is asked about before their blocks are known: 2 MiB of bitmaps at most."""


@dataclass(slots=True)
class Ask:
    """One block asked of one peer and not answered."""

    size: int
    at: float
    given_up: bool = False
    """Not hoped for any more: the block came, or is asked of somebody else."""
    cancelled: bool = False
    """A `cancel` was sent: it is answered by `missing` or by its block."""


@dataclass(slots=True, eq=False)
class Source:
    """A joined peer."""

    id: str
    max_asks: int
    max_queries: int
    flow: PeerFlow
    holdings: Holdings = field(default_factory=Holdings)
    asks: dict[CID, Ask] = field(default_factory=dict)
    outstanding: int = 0
    queries: dict[CID, float] = field(default_factory=dict)
    """Parts asked about and unanswered, and since when."""
    told_at: dict[CID, float] = field(default_factory=dict)
    """When it last said what it holds of a part."""
    early: dict[CID, bytes] = field(default_factory=dict)
    """What it said of parts whose blocks are not known yet."""
    answered_at: float = 0.0
    """When it last answered an ask, or was asked while it owed nothing."""
    suspect: bool = False
    """It stalled before, and has delivered nothing since it came back."""

    @property
    def silent_since(self) -> float | None:
        """When it was first asked about a part of which it never said anything; None when there is none.

        Asked about a part again, a peer answers when it holds more of it: that may take long.
        """
        return min((at for part, at in self.queries.items() if part not in self.told_at), default=None)

    def due(self, groups: Sequence[Group], now: float, refresh: float) -> tuple[CID, ...]:
        """Parts to ask about now: those never asked about, then those of which it may hold more by now.

        Half of the queries that the peer takes are kept for the former.
        """
        found = []
        for group in groups:
            part = group.part
            if part is None or part in self.queries:
                continue
            told = self.told_at.get(part)
            lacks = group.unfinished & ~self.holdings.told(group)
            if told is not None and (now - told < refresh or not lacks):
                continue
            if len(self.queries) >= (self.max_queries if told is None else self.max_queries // 2):
                continue
            self.queries[part] = now
            found.append(part)
        return tuple(found)

    def named(self, parts: Iterable[CID], now: float) -> tuple[CID, ...]:
        """Of parts whose blocks are not known yet, those to ask about now."""
        room = min(self.max_queries, EARLY_MOST - len(self.early)) - len(self.queries)
        if room <= 0:
            return ()
        found = [part for part in parts if part not in self.queries and part not in self.told_at][:room]
        self.queries.update(dict.fromkeys(found, now))
        return tuple(found)

    def told_early(self, part: CID, bitmap: bytes | None, now: float, refresh: float) -> None:
        """It said what it holds of a part whose blocks are not known yet."""
        self.queries.pop(part, None)
        self.flow.progressed(now)
        if bitmap is None:
            # It is fetching the part's node as we are: asked again once we have it.
            self.told_at[part] = now - refresh
        else:
            self.early[part] = bitmap
            self.told_at[part] = now

    def seconds_for(self, size: int, now: float) -> float:
        """How long `size` bytes should take it; no less than its present answer took already."""
        rate = self.flow.rate or float(BLOCK_SIZE)
        waited = now - self.answered_at if self.asks else 0.0
        return max(size / max(rate, 1.0), waited)


def late_asks(
    source: Source, everybody: Collection[Source], demand: Demand, now: float
) -> list[tuple[Wanted, Source]]:
    """Asks of others that `source` could answer in half the time, the latest first."""
    least = 2 * (source.seconds_for(source.outstanding, now) + (source.flow.delay or 0.05))
    # Whoever is done with all it owes by then has nothing to be taken over.
    others = [
        other
        for other in everybody
        if other is not source and other.asks and other.seconds_for(other.outstanding, now) > least
    ]
    if not others:
        return []
    asked_twice = set(source.asks)
    seen: set[CID] = set()
    for other in everybody:
        asked_twice |= seen & other.asks.keys()
        seen |= other.asks.keys()
    found: list[tuple[float, Wanted, Source]] = []
    for other in others:
        ahead = 0
        for cid, ask in other.asks.items():
            ahead += ask.size
            if cid in asked_twice or ask.given_up:
                continue
            theirs = other.seconds_for(ahead, now)
            ours = source.seconds_for(source.outstanding + ask.size, now) + (source.flow.delay or 0.05)
            block = demand.wanted(cid)
            if theirs > 2 * ours and block and source.holdings.holds(demand.places(cid)):
                found.append((theirs, block, other))
    found.sort(key=lambda item: -item[0])
    return [(block, other) for _, block, other in found]


def replaceable(source: Source, everybody: Collection[Source], demand: Demand) -> bool:
    """Whether somebody else holds everything asked of this peer."""
    others = [other for other in everybody if other is not source]
    return all(
        any(other.holdings.holds(demand.places(cid)) for other in others)
        for cid, ask in source.asks.items()
        if not ask.given_up
    )

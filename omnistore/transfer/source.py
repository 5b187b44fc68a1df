"""One joined peer, as a session sees it: what it was asked, what it holds, how fast it is. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from omnistore.block import BLOCK_SIZE
from omnistore.cid import CID
from omnistore.transfer.demand import Holdings
from omnistore.transfer.window import PeerFlow


@dataclass(slots=True)
class Ask:
    """One block asked of one peer and not answered."""

    size: int
    at: float
    given_up: bool = False


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
    queries: set[CID] = field(default_factory=set)
    """Parts asked about and unanswered."""
    queried_at: dict[CID, float] = field(default_factory=dict)
    answered_at: float = 0.0
    """When it last answered an ask, or was asked while it owed nothing."""
    suspect: bool = False
    """It stalled before, and has delivered nothing since it came back."""

    def seconds_for(self, size: int, now: float) -> float:
        """How long `size` bytes should take it; no less than its present answer took already."""
        rate = self.flow.rate or float(BLOCK_SIZE)
        waited = now - self.answered_at if self.asks else 0.0
        return max(size / max(rate, 1.0), waited)

"""Which relays a node that nobody can connect to is reached through (pure; spec/04-discovery §9).

    what others found        relays
    private                  up to `MOST` of those known, in the order given; those that failed wait
    public, lan              none
    unknown                  as they are: too few answers are no reason to move

Knows no messages and no sockets: `relay_use` is the shell.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from omnistore.net.pauses import Pauses
from omnistore.net.reachability import State

MOST: Final = 2
"""Relays at once: one may go away. Each keeps a place that others could have."""
AGAIN: Final = 300.0
"""Seconds before a relay that refused or went away is asked again."""


@dataclass(frozen=True, slots=True)
class Change:
    """What to do."""

    take: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


@dataclass(slots=True)
class RelayChoice:
    """Remembers who failed."""

    _failed: Pauses = field(default_factory=Pauses)

    def failed(self, relay: str, now: float) -> None:
        """A relay refused, or its connection was lost for good."""
        self._failed.pause(relay, AGAIN, now)

    def change(self, state: State, held: Collection[str], known: Sequence[str], now: float) -> Change:
        """What to take and drop; `held` are those in use, `known` those that could be."""
        if state in ("public", "lan"):
            return Change(drop=tuple(held))
        if state == "unknown":
            return Change()
        free = [relay for relay in dict.fromkeys(known) if relay not in held and self._failed.may(relay, now)]
        return Change(take=tuple(free[: max(0, MOST - len(held))]))

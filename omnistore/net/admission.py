"""Who is let in where places are few, and who is let go for it (pure; spec/04-discovery §2).

Anybody may open connections by the hundred, and say nothing on them. Those that have not proved who they are
have few places of their own; where all are taken, the address with the most of them loses its oldest. A full
house makes room for a newcomer by one connection that nothing runs on, again of the address with the most; if
there is none, the newcomer goes. So a flood from one place is its own rival, and others come in. Knows no
sockets: `isolation` is the shell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

PENDING: Final = 64
"""Connections in the handshake at once: it takes milliseconds, over a slow link a second or two."""
LEFT_ALONE: Final = 3.0
"""Seconds for which a connection is kept though nothing runs on it, unless its address has more than that of
the newcomer: its first stream may be on its way."""

T = TypeVar("T")


@dataclass(slots=True)
class Doorway(Generic[T]):
    """Those who connected and have not proved yet who they are."""

    most: int = PENDING
    _waiting: dict[int, tuple[T, str]] = field(default_factory=dict)
    """By identity, in the order of coming; each with its IP address."""

    def came(self, who: T, host: str) -> T | None:
        """Somebody connected from `host`; who is to be turned away, perhaps the very same."""
        self._waiting[id(who)] = (who, host)
        if len(self._waiting) <= self.most:
            return None
        counts = Counter(host for _, host in self._waiting.values())
        busiest = max(counts.values())
        turned, _ = next(one for one in self._waiting.values() if counts[one[1]] == busiest)
        self.left(turned)
        return turned

    def left(self, who: T) -> None:
        """It proved who it is, or went away."""
        self._waiting.pop(id(who), None)


def crowds(mine: int, left: int) -> bool:
    """Whether an address that has `mine` connections may have no more where places for `left` are left: the
    last ones are for others, or whoever connects fastest would have them all."""
    return left <= PENDING and mine >= PENDING // 2


@dataclass(frozen=True, slots=True)
class Guest(Generic[T]):
    """A connection that somebody made to us."""

    connection: T
    host: str
    since: float
    """When it was there, in the clock of `now`."""
    busy: bool
    """Whether anything runs on it."""


def to_let_go(guests: Iterable[Guest[T]], newest: T, now: float) -> T:
    """Which of too many connections is ended, the newest one among them.

    One that something runs on is, if there is no other, where it is young and its address has most of the
    house: what runs then is what every connection begins with.
    """
    everybody = list(guests)
    counts = Counter(guest.host for guest in everybody)
    own = next(counts[guest.host] for guest in everybody if guest.connection is newest)

    def may_go(guest: Guest[T]) -> bool:
        young, others = now - guest.since < LEFT_ALONE, counts[guest.host]
        if guest.connection is newest:
            return False
        return young and others > max(own, len(everybody) // 2) if guest.busy else others > own or not young

    found = [guest for guest in everybody if may_go(guest)]
    first = min(found, key=lambda guest: (guest.busy, -counts[guest.host], guest.since), default=None)
    return newest if first is None else first.connection

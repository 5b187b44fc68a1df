"""Prompts that a lender keeps for coordinators whose streams ended: a table. Pure.

Each entry is a slot of a stage that nobody has leased, and the labels under which its peer may ask for it
again. A label is a peer's own secret word for a beginning; nobody else's are ever compared with it, so no
other peer can hit a kept prompt or learn that there is one. A peer keeps up to `per_peer` bytes, its own
least recently used going first; all of it is the first thing to go where memory is wanted. Implements
spec/06-pipeline, section "Kept prompts"; the slots themselves are `omninfer.warm`'s.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from omninfer.prefixes import common_prefix

KEPT_SECONDS: Final = 600.0
"""How long a prompt is kept that nobody asks for: a person's pause between two commands."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, eq=False)
class Kept(Generic[Key]):
    """One kept slot."""

    peer: str
    stage: Key
    slot: int
    labels: tuple[bytes, ...]
    bytes: int
    """Memory of its keys and values."""


class KeptPrompts(Generic[Key]):
    """All kept slots of a lender."""

    def __init__(self, per_peer: int) -> None:
        """`per_peer`: bytes that one peer's prompts may take; 0 keeps nothing."""
        self.per_peer = per_peer
        self._used: dict[Kept[Key], float] = {}

    def held(self, stage: Key) -> int:
        """Bytes that are kept in one stage."""
        return sum(kept.bytes for kept in self._used if kept.stage == stage)

    def add(self, new: Kept[Key], now: float) -> list[Kept[Key]]:
        """Keep a slot; answers those that are no longer kept by that, perhaps the new one itself.

        They are what the new one says already, then the peer's own, least recently used first.
        """
        gone = [
            old
            for old in self._used
            if (old.peer, old.stage) == (new.peer, new.stage) and old.labels == new.labels[: len(old.labels)]
        ]
        if new.bytes > self.per_peer:
            return [new]
        for old in gone:
            del self._used[old]
        self._used[new] = now
        own = sorted((kept for kept in self._used if kept.peer == new.peer), key=self._used.__getitem__)
        while sum(kept.bytes for kept in own) > self.per_peer:
            gone.append(own.pop(0))
            del self._used[gone[-1]]
        return gone

    def recall(
        self, peer: str, stage: Key, labels: Sequence[bytes], now: float
    ) -> tuple[Kept[Key], int] | None:
        """The peer's own slot of that stage with the longest beginning in common, and its labels' number."""
        found = [
            (common_prefix(kept.labels, labels), used, kept)
            for kept, used in self._used.items()
            if (kept.peer, kept.stage) == (peer, stage)
        ]
        if not found:
            return None
        count, _, kept = max(found, key=lambda one: one[:2])
        if not count:
            return None
        self._used[kept] = now
        return kept, count

    def drop(self, kept: Kept[Key]) -> None:
        """It is kept no longer."""
        self._used.pop(kept, None)

    def by_age(self) -> Iterable[tuple[float, Kept[Key]]]:
        """When each was used last, the longest ago first."""
        return [(used, kept) for kept, used in sorted(self._used.items(), key=lambda item: item[1])]

    def expired(self, now: float) -> list[Kept[Key]]:
        """Those that nobody asked for in `KEPT_SECONDS`, which are kept no longer."""
        gone = [kept for kept, used in self._used.items() if now - used > KEPT_SECONDS]
        for kept in gone:
            del self._used[kept]
        return gone

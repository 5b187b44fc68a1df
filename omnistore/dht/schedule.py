"""When to announce what (pure; spec/04-discovery §5).

    event                          commands
    Held(keys)      new keys       Provide at once, `parallel` at a time
                    keys gone      Forget
    Provided(n>0)                  Provide again after `interval`, spread over its last fifth
    Provided(0)                    Provide again after `retry_first`, twice that, … `retry_most`
    PeerAppeared                   keys with too few copies: Provide soon
    Tick                           whatever is due

`step` returns what to do now; `wake_at` says when to call it again without an event.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from omnistore.cid import CID


@dataclass(frozen=True, slots=True)
class Pace:
    """How often, in seconds."""

    interval: float = 22 * 3600
    """Between announcements of a key; peers drop a record after 48 hours."""
    parallel: int = 8
    """Announcements under way at once; each asks some twenty peers."""
    retry_first: float = 5
    retry_most: float = 900
    copies: int = 20
    """Below this many confirmed copies, a new peer is reason to announce again."""
    settle: float = 0.5
    """After a new peer, for others that appear at the same time."""
    gap: float = 60
    """Least time between two announcements of a key that has a copy already."""


@dataclass(frozen=True, slots=True)
class Held:
    """The complete set of what is held now."""

    keys: frozenset[CID]


@dataclass(frozen=True, slots=True)
class Provided:
    """An announcement ended."""

    key: CID
    copies: int
    """Peers confirmed to have the record; 0 is a failure."""


@dataclass(frozen=True, slots=True)
class PeerAppeared:
    """A peer that may keep records connected."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, slots=True)
class Provide:
    """Announce this key, and report with `Provided`."""

    key: CID


@dataclass(frozen=True, slots=True)
class Forget:
    """Stop saying that we hold this key."""

    key: CID


Event: TypeAlias = Held | Provided | PeerAppeared | Tick
Command: TypeAlias = Provide | Forget


@dataclass(slots=True)
class _Key:
    due: float
    under_way: bool = False
    again: bool = False
    """Let go and taken back while under way: what is under way may have been undone."""
    copies: int = 0
    failures: int = 0
    tried: float = float("-inf")


@dataclass(slots=True)
class ReprovideSchedule:
    """The keys of one node and when each is due."""

    pace: Pace = field(default_factory=Pace)
    _keys: dict[CID, _Key] = field(default_factory=dict)
    _leaving: set[CID] = field(default_factory=set)
    """Let go while their announcement was under way."""
    _queue: list[tuple[float, CID]] = field(default_factory=list)
    """Due times, some of them outdated: `_keys` is what counts."""
    _under_way: int = 0

    def step(self, event: Event, now: float) -> Sequence[Command]:
        """Take an event in; what to do about it."""
        commands: list[Command] = []
        match event:
            case Held(keys):
                commands += self._hold(keys, now)
            case Provided(key, copies):
                commands += self._provided(key, copies, now)
            case PeerAppeared():
                self._hurry(now)
            case Tick():
                pass
        return commands + self._start_due(now)

    def wake_at(self) -> float:
        """When something becomes due (infinity if only an event can change that)."""
        if self._under_way >= self.pace.parallel:
            return float("inf")
        self._drop_outdated()
        return self._queue[0][0] if self._queue else float("inf")

    @property
    def pending(self) -> int:
        """Keys without a confirmed copy."""
        return sum(not key.copies for key in self._keys.values())

    def _hold(self, keys: frozenset[CID], now: float) -> list[Command]:
        gone = sorted(self._keys.keys() - keys)
        for cid in gone:
            if self._keys.pop(cid).under_way:
                self._leaving.add(cid)
        for cid in sorted(keys - self._keys.keys()):
            # One still leaving is announced again when its announcement has ended.
            returning = cid in self._leaving
            self._keys[cid] = key = _Key(now, under_way=returning, again=returning)
            self._leaving.discard(cid)
            if not key.under_way:
                heapq.heappush(self._queue, (now, cid))
        return [Forget(cid) for cid in gone]

    def _provided(self, cid: CID, copies: int, now: float) -> list[Command]:
        self._under_way -= 1
        if cid in self._leaving:
            self._leaving.discard(cid)
            return [Forget(cid)]
        key = self._keys[cid]
        key.under_way, key.copies = False, copies
        if key.again:
            key.again = False
            self._set_due(cid, now)
        elif copies:
            key.failures = 0
            self._set_due(cid, now + self.pace.interval * (0.8 + 0.2 * _fraction(cid)))
        else:
            wait = min(self.pace.retry_most, self.pace.retry_first * 2 ** min(key.failures, 20))
            key.failures += 1
            self._set_due(cid, now + wait * (0.8 + 0.2 * _fraction(cid)))
        return []

    def _hurry(self, now: float) -> None:
        for cid, key in self._keys.items():
            if key.under_way or key.copies >= self.pace.copies:
                continue
            key.failures = 0
            soon = now + self.pace.settle
            if key.copies:
                soon = max(soon, key.tried + self.pace.gap)
            if soon < key.due:
                self._set_due(cid, soon)

    def _start_due(self, now: float) -> list[Command]:
        commands: list[Command] = []
        while self._under_way < self.pace.parallel:
            self._drop_outdated()
            if not self._queue or self._queue[0][0] > now:
                break
            _, cid = heapq.heappop(self._queue)
            key = self._keys[cid]
            key.under_way, key.tried = True, now
            self._under_way += 1
            commands.append(Provide(cid))
        return commands

    def _set_due(self, cid: CID, due: float) -> None:
        self._keys[cid].due = due
        heapq.heappush(self._queue, (due, cid))

    def _drop_outdated(self) -> None:
        while self._queue:
            due, cid = self._queue[0]
            key = self._keys.get(cid)
            if key is not None and not key.under_way and key.due == due:
                return
            heapq.heappop(self._queue)


def _fraction(cid: CID) -> float:
    """A fixed number in [0, 1) for each key: spreads what was added together, without randomness."""
    return int.from_bytes(cid.digest[:4], "big") / 2**32

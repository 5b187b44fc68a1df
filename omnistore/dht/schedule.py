"""When to announce what (pure; spec/04-discovery §5).

    event                          commands
    Held(keys)      new keys       Provide at once, before all others, `parallel` at a time
                    keys gone      Forget
    Provided(n>0)                  Provide again after `interval`, spread over its last fifth
    Provided(0)                    Provide again after `retry_first`, twice that, … `retry_most`
    Moved                          everything: Provide soon
    PeerAppeared                   keys with too few copies: Provide soon
    Tick                           whatever is due

Never more than `burst` announcements at once and `rate` a second after that: each asks some twenty
peers two or three questions, and a node with 10,000 keys is to work on them at leisure.

`step` returns what to do now; `wake_at` says when to call it again without an event.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from omnistore.cid import CID


@dataclass(frozen=True, slots=True)
class Pace:
    """How often, in seconds."""

    interval: float = 22 * 3600
    """Between announcements of a key; peers drop a record after 48 hours."""
    parallel: int = 8
    """Announcements under way at once; each asks some twenty peers."""
    rate: float = 5
    """Announcements a second when there are many: 10,000 keys take 34 minutes, of the 48 hours that
    a record lasts."""
    burst: int = 200
    """Announcements that need not wait for that: two large models."""
    retry_first: float = 5
    retry_most: float = 900
    copies: int = 20
    """Below this many confirmed copies, a new peer is reason to announce again."""
    settle: float = 0.5
    """After a new peer, for others that appear at the same time."""
    gap: float = 60
    """Least time between two announcements of a key that has a copy already; more with so many keys
    that `rate` would not let all of them through."""


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
class Moved:
    """Our addresses changed: every record that others keep says the old ones."""


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


Event: TypeAlias = Held | Provided | PeerAppeared | Moved | Tick
Command: TypeAlias = Provide | Forget


_OUTDATED: Final = 64
"""Outdated due times that are not worth clearing up."""
_ROUNDING: Final = 1e-6
"""Of an announcement: sums of fractions that should come to one may be a little less."""


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
    _fresh: dict[CID, None] = field(default_factory=dict)
    """Never announced yet, in the order in which they came."""
    _under_way: int = 0
    _allowance: float = 0.0
    """Announcements that may start now, by the rate."""
    _counted: float = float("-inf")
    """When `_allowance` was last brought up to date."""

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
            case Moved():
                self._announce_again(now)
            case Tick():
                pass
        return commands + self._start_due(now)

    def wake_at(self) -> float:
        """When something becomes due (infinity if only an event can change that)."""
        if self._under_way >= self.pace.parallel:
            return float("inf")
        self._drop_outdated()
        if not self._fresh and not self._queue:
            return float("inf")
        due = float("-inf") if self._fresh else self._queue[0][0]
        return max(due, self._counted + max(0.0, 1 - self._allowance) / self.pace.rate)

    @property
    def pending(self) -> int:
        """Keys without a confirmed copy."""
        return sum(not key.copies for key in self._keys.values())

    def _hold(self, keys: frozenset[CID], now: float) -> list[Command]:
        gone = sorted(self._keys.keys() - keys)
        for cid in gone:
            self._fresh.pop(cid, None)
            if self._keys.pop(cid).under_way:
                self._leaving.add(cid)
        for cid in sorted(keys - self._keys.keys()):
            # One still leaving is announced again when its announcement has ended.
            returning = cid in self._leaving
            self._keys[cid] = key = _Key(now, under_way=returning, again=returning)
            self._leaving.discard(cid)
            if not key.under_way:
                self._fresh[cid] = None
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
        # Spread over what the rate lets through, or they would all be due before what is urgent.
        spread = max(0.0, len(self._keys) - self.pace.burst) / self.pace.rate
        for cid, key in self._keys.items():
            if key.under_way or cid in self._fresh or key.copies >= self.pace.copies:
                continue
            key.failures = 0
            soon = now + self.pace.settle
            if key.copies:
                soon = max(soon, key.tried + max(self.pace.gap, 4 * spread)) + spread * _fraction(cid)
            if soon < key.due:
                self._set_due(cid, soon)

    def _announce_again(self, now: float) -> None:
        for cid, key in self._keys.items():
            key.failures = 0
            if key.under_way:
                key.again = True
            elif cid not in self._fresh:
                self._set_due(cid, now + self.pace.settle)

    def _start_due(self, now: float) -> list[Command]:
        self._refill(now)
        commands: list[Command] = []
        while self._under_way < self.pace.parallel and self._allowance >= 1 - _ROUNDING:
            cid = self._next(now)
            if cid is None:
                break
            key = self._keys[cid]
            key.under_way, key.tried = True, now
            self._under_way += 1
            self._allowance -= 1
            commands.append(Provide(cid))
        return commands

    def _next(self, now: float) -> CID | None:
        """Take what is to be announced next, if anything is due."""
        if self._fresh:
            cid = next(iter(self._fresh))
            del self._fresh[cid]
            return cid
        self._drop_outdated()
        if not self._queue or self._queue[0][0] > now:
            return None
        return heapq.heappop(self._queue)[1]

    def _refill(self, now: float) -> None:
        self._allowance = min(self.pace.burst, self._allowance + (now - self._counted) * self.pace.rate)
        self._counted = now

    def _set_due(self, cid: CID, due: float) -> None:
        self._keys[cid].due = due
        heapq.heappush(self._queue, (due, cid))
        if len(self._queue) > 2 * len(self._keys) + _OUTDATED:
            # Keys that come and go would leave theirs here for a day.
            waiting = ((key, cid) for cid, key in self._keys.items() if cid not in self._fresh)
            self._queue = [(key.due, cid) for key, cid in waiting if not key.under_way]
            heapq.heapify(self._queue)

    def _drop_outdated(self) -> None:
        while self._queue:
            due, cid = self._queue[0]
            key = self._keys.get(cid)
            if key is not None and not key.under_way and cid not in self._fresh and key.due == due:
                return
            heapq.heappop(self._queue)


def _fraction(cid: CID) -> float:
    """A fixed number in [0, 1) for each key: spreads what was added together, without randomness."""
    return int.from_bytes(cid.digest[:4], "big") / 2**32

"""The announcement schedule under every order of events, in virtual time."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from omnistore.cid import CID, RAW
from omnistore.dht.schedule import (
    Forget,
    Held,
    Pace,
    PeerAppeared,
    Provide,
    Provided,
    ReprovideSchedule,
    Tick,
)

KEYS = [CID.of_digest(RAW, bytes([n * 37 % 256]) * 32) for n in range(12)]
PACE = Pace(parallel=3)


@dataclass
class Simulated:
    """Runs a schedule against a network that answers `copies` after `delay`, and checks it at each step."""

    copies: int
    delay: float = 1.0
    now: float = 0.0
    schedule: ReprovideSchedule = field(default_factory=lambda: ReprovideSchedule(PACE))
    held: frozenset[CID] = frozenset()
    under_way: list[tuple[float, CID]] = field(default_factory=list)
    said: set[CID] = field(default_factory=set)
    """What the node itself answers for, as the service would do it."""
    announced: list[tuple[float, CID]] = field(default_factory=list)

    def step(self, event: Held | Provided | PeerAppeared | Tick) -> None:
        if isinstance(event, Held):
            self.held = event.keys
        for command in self.schedule.step(event, self.now):
            match command:
                case Provide(key):
                    assert key in self.held
                    assert key not in {other for _, other in self.under_way}
                    self.said.add(key)
                    self.announced.append((self.now, key))
                    heapq.heappush(self.under_way, (self.now + self.delay, key))
                case Forget(key):
                    self.said.discard(key)
        assert len(self.under_way) <= self.schedule.pace.parallel

    def advance(self, seconds: float) -> None:
        """Let time pass, waking the schedule as its shell would."""
        end = self.now + seconds
        for _ in range(100_000):
            ending = self.under_way[0][0] if self.under_way else float("inf")
            self.now = max(self.now, min(end, ending, self.schedule.wake_at()))
            if self.under_way and ending <= self.now:
                _, key = heapq.heappop(self.under_way)
                self.step(Provided(key, self.copies))
            elif self.schedule.wake_at() <= self.now:
                self.step(Tick())
            elif self.now >= end:
                return
        raise AssertionError("the schedule is busy without end")


held = st.frozensets(st.sampled_from(KEYS))
actions = st.lists(
    st.one_of(
        held.map(Held),
        st.just(PeerAppeared()),
        st.floats(0.01, 100_000).map(lambda seconds: seconds),
        st.integers(0, 20),
    ),
    max_size=30,
)


@given(actions)
@settings(max_examples=300, deadline=None)
def test_whatever_happens_what_is_held_ends_up_announced_and_nothing_else(
    events: list[Held | PeerAppeared | float | int],
) -> None:
    world = Simulated(copies=0)
    for event in events:
        if isinstance(event, Held | PeerAppeared):
            world.step(event)
        elif isinstance(event, int):
            world.copies = event
        else:
            world.advance(event)
    world.copies = 3
    world.advance(PACE.retry_most + 100)
    assert world.schedule.pending == 0
    assert world.said == world.held
    assert not world.under_way


@given(held)
def test_every_key_is_announced_again_before_it_expires_and_not_more_often(keys: frozenset[CID]) -> None:
    world = Simulated(copies=20)
    world.step(Held(keys))
    days = 10
    world.advance(days * 86400)
    for key in keys:
        times = [when for when, which in world.announced if which == key]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert times[0] <= len(KEYS) * world.delay
        assert all(0.7 * PACE.interval < gap <= PACE.interval + len(KEYS) * world.delay for gap in gaps)
        assert len(gaps) >= days * 86400 // (PACE.interval + 100) - 1


def test_announcements_spread_over_time() -> None:
    world = Simulated(copies=20)
    world.step(Held(frozenset(KEYS)))
    world.advance(PACE.interval + 100)
    again = [when for when, _ in world.announced[len(KEYS) :]]
    assert max(again) - min(again) > 0.1 * PACE.interval


def test_failures_are_retried_ever_more_rarely() -> None:
    world = Simulated(copies=0)
    world.step(Held(frozenset(KEYS[:1])))
    world.advance(4 * 3600)
    times = [when for when, _ in world.announced]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps[0] <= PACE.retry_first + world.delay
    assert max(gaps) <= PACE.retry_most + world.delay
    assert len(times) < 30


def test_a_new_peer_is_told_at_once_what_nobody_has() -> None:
    world = Simulated(copies=0)
    world.step(Held(frozenset(KEYS)))
    world.advance(3600)
    world.copies = 1
    before = len(world.announced)
    world.step(PeerAppeared())
    world.advance(PACE.settle + len(KEYS) * world.delay)
    assert len(world.announced) == before + len(KEYS)
    assert world.schedule.pending == 0


def test_many_new_peers_do_not_cause_a_storm() -> None:
    world = Simulated(copies=2)
    world.step(Held(frozenset(KEYS)))
    world.advance(10)
    for _ in range(100):
        world.step(PeerAppeared())
        world.advance(3)
    each = len(world.announced) / len(KEYS)
    assert 2 <= each <= 2 + 300 / PACE.gap


def test_enough_copies_are_left_alone() -> None:
    world = Simulated(copies=PACE.copies)
    world.step(Held(frozenset(KEYS)))
    world.advance(100)
    world.step(PeerAppeared())
    world.advance(1000)
    assert len(world.announced) == len(KEYS)


MANY = [CID.of_digest(RAW, hashlib.sha256(str(n).encode()).digest()) for n in range(10_000)]
EXPIRY = 48 * 3600


def busiest(times: list[float], seconds: float) -> int:
    """The most announcements in any window of so many seconds."""
    start, most = 0, 0
    for index, when in enumerate(times):
        while times[start] < when - seconds:
            start += 1
        most = max(most, index + 1 - start)
    return most


def test_ten_thousand_keys_are_renewed_well_inside_expiry_at_a_bounded_rate() -> None:
    pace = Pace()
    world = Simulated(copies=20, schedule=ReprovideSchedule(pace))
    world.step(Held(frozenset(MANY)))
    days = 4
    world.advance(days * 86400)
    first = [when for when, _ in world.announced[: len(MANY)]]
    assert {key for _, key in world.announced[: len(MANY)]} == set(MANY)
    assert first[-1] <= len(MANY) / pace.rate  # 33 minutes
    times: dict[CID, list[float]] = {key: [] for key in MANY}
    for when, key in world.announced:
        times[key].append(when)
    gaps = [later - earlier for each in times.values() for earlier, later in itertools.pairwise(each)]
    assert max(gaps) < pace.interval + 60 < EXPIRY / 2
    assert min(gaps) > 0.75 * pace.interval
    assert all(each[-1] > days * 86400 - EXPIRY / 2 for each in times.values())
    again = [when for when, _ in world.announced[len(MANY) :]]
    assert busiest(first, 60) <= pace.burst + 60 * pace.rate + 1
    # Later rounds are spread over hours: under one a second at any time.
    assert busiest(again, 60) <= 60
    assert len(world.announced) <= len(MANY) * (days * 86400 / (0.75 * pace.interval) + 1)


def test_newcomers_to_a_small_network_cause_no_storm_and_delay_nothing_new() -> None:
    """Three peers keep everything, which is less than wished: each newcomer is a reason to announce."""
    pace = Pace()
    world = Simulated(copies=3, schedule=ReprovideSchedule(pace))
    world.step(Held(frozenset(MANY)))
    world.advance(3600)
    before = len(world.announced)
    for _ in range(60):
        world.step(PeerAppeared())
        world.advance(60)
    times = [when for when, _ in world.announced[before:]]
    assert busiest(times, 60) <= pace.burst + 60 * pace.rate + 1
    assert len(times) <= 1.5 * len(MANY)
    late = CID.of_digest(RAW, bytes(32))
    world.step(PeerAppeared())
    world.step(Held(frozenset([*MANY, late])))
    world.advance(3 + pace.settle)
    assert late in {key for _, key in world.announced[-50:]}


def test_after_hours_alone_everything_is_announced_at_the_rate() -> None:
    pace = Pace()
    world = Simulated(copies=0, delay=0.01, schedule=ReprovideSchedule(pace))
    world.step(Held(frozenset(MANY[:500])))
    world.advance(4 * 3600)
    world.copies = 20
    before = len(world.announced)
    world.step(PeerAppeared())
    world.advance(500 / pace.rate + 60)
    assert world.schedule.pending == 0
    assert busiest([when for when, _ in world.announced[before:]], 10) <= pace.burst + 10 * pace.rate + 1


def test_keys_that_come_and_go_leave_nothing_behind() -> None:
    """A seed whose pins are evicted: each was to be announced again in a day."""
    simulated = Simulated(copies=20, delay=0.1)
    for number in range(500):
        simulated.step(
            Held(frozenset(CID.of_digest(RAW, bytes(30) + (number * 4 + n).to_bytes(2)) for n in range(4)))
        )
        simulated.advance(60)
    assert len(simulated.announced) == 2000
    assert len(simulated.schedule._queue) < 100
    simulated.advance(2 * PACE.interval)
    assert simulated.said == simulated.held
    assert len(simulated.announced) > 2004

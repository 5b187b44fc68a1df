"""Thousands of seeded swarms: `Session` and `Serving` under loss, delay, liars, stalls and churn.

The simulation itself asserts, at every step, that the window holds and that no block is verified
twice; here is what must be true at the end of a run.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from omnistore.testing.simulation import (
    HARMFUL,
    PeerModel,
    Scenario,
    Simulation,
    random_scenario,
    with_honest_peer,
)
from omnistore.transfer.window import FlowLimits, SessionLimits

MIB = 1 << 20
RUNS, BATCH = 1000, 100
NARROW = SessionLimits(flow=FlowLimits(ceiling=4 * MIB))
"""A window that two stalled peers can fill."""


def scenario_of(seed: int) -> Scenario:
    scenario = random_scenario(random.Random(seed))
    if seed % 2:
        scenario = with_honest_peer(scenario)
    return replace(scenario, limits=NARROW) if seed % 3 == 0 else scenario


@pytest.mark.parametrize("first", range(0, RUNS, BATCH))
def test_random_swarms(first: int) -> None:
    for seed in range(first, first + BATCH):
        simulation = Simulation(scenario_of(seed), seed)
        outcome = simulation.run()
        told = f"seed {seed}: {outcome}"
        assert outcome.done != (outcome.failed is not None), told
        if simulation.obtainable():
            assert outcome.done, told
        assert outcome.duplicate_bytes <= simulation.session.duplicates_allowed, told
        for name in outcome.banned:
            assert simulation.peers[name].model.behaviour in HARMFUL, told
        if outcome.failed:
            assert set(outcome.failed.missing) == set(simulation.session.missing()) != set(), told


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_very_many_random_swarms() -> None:
    for seed in range(RUNS, RUNS + 20_000):
        simulation = Simulation(scenario_of(seed), seed)
        outcome = simulation.run()
        assert outcome.done or not simulation.obtainable(), f"seed {seed}: {outcome}"
        assert outcome.duplicate_bytes <= simulation.session.duplicates_allowed, f"seed {seed}: {outcome}"


def blocks(count: int) -> tuple[int, ...]:
    return (MIB,) * count


def test_the_same_seed_gives_the_same_run() -> None:
    first, second = (Simulation(scenario_of(7), 7).run() for _ in range(2))
    assert first == second


def test_two_equal_seeders_share_the_work_and_double_the_rate() -> None:
    one = PeerModel(bandwidth=20e6, delay=0.01)
    alone = Simulation(Scenario((blocks(400),), 1, (one,)), 1).run()
    both = Simulation(Scenario((blocks(400),), 1, (one, one)), 1).run()
    assert both.seconds < 0.55 * alone.seconds
    assert min(both.delivered.values()) > 0.45 * sum(both.delivered.values())
    assert sum(both.uploaded.values()) < 1.02 * sum(both.delivered.values())


@pytest.mark.parametrize("delay", [0.0005, 0.01, 0.05, 0.15])
def test_the_window_grows_to_fill_a_link(delay: float) -> None:
    peer = PeerModel(bandwidth=100e6, delay=delay)
    outcome = Simulation(Scenario((blocks(1500),), 1, (peer,)), 1).run()
    ideal = 1500 * MIB / 100e6
    assert outcome.seconds < 1.15 * ideal + 20 * delay


def test_a_fast_link_of_long_delay_is_limited_by_the_ceiling_only() -> None:
    limits = SessionLimits(flow=FlowLimits(ceiling=16 * MIB))
    peer = PeerModel(bandwidth=1e9, delay=0.1)
    outcome = Simulation(Scenario((blocks(1000),), 0, (peer,), limits), 1).run()
    assert outcome.most_outstanding <= 16 * MIB
    assert outcome.seconds < 1.6 * 1000 / 16 * 0.2


def test_a_slow_peer_does_not_hold_up_the_tail() -> None:
    fast, slow = PeerModel(bandwidth=50e6), PeerModel(bandwidth=0.2e6)
    alone = Simulation(Scenario((blocks(300),), 0, (fast,)), 1).run()
    both = Simulation(Scenario((blocks(300),), 0, (fast, slow)), 1).run()
    assert both.seconds < alone.seconds + 1.0
    assert both.duplicate_bytes <= 4 * MIB


def test_a_liar_beside_an_honest_peer_is_banned_and_costs_little() -> None:
    honest, liar = PeerModel(), PeerModel(behaviour="liar", after=1)
    outcome = Simulation(Scenario((blocks(100),), 0, (honest, liar)), 1).run()
    assert outcome.done
    assert list(outcome.banned) == ["peer1"]
    assert outcome.delivered["peer0"] == 100 * MIB


def test_rare_parts_come_first() -> None:
    # The second peer holds only some blocks, so what only the first has is rarer.
    everything, some = PeerModel(bandwidth=10e6), PeerModel(bandwidth=10e6, share=0.5)
    simulation = Simulation(Scenario((blocks(10),) * 6, 0, (everything, some)), 3)
    outcome = simulation.run()
    assert outcome.done
    assert outcome.delivered["peer1"] > 0.3 * 60 * MIB


def test_nobody_at_all_ends_in_no_providers() -> None:
    outcome = Simulation(Scenario((blocks(3),), 1, ()), 1).run()
    assert outcome.failed is not None
    assert outcome.failed.kind == "no-providers"
    assert len(outcome.failed.missing) == 1


def test_a_newcomer_saves_a_fetch_that_all_others_left() -> None:
    peers = (PeerModel(behaviour="dies", after=5), PeerModel(joins_at=20.0))
    outcome = Simulation(Scenario((blocks(20),), 1, peers), 1).run()
    assert outcome.done
    assert outcome.seconds > 20


def test_a_peer_that_only_stalls_ends_in_an_error_that_names_what_is_missing() -> None:
    outcome = Simulation(Scenario((blocks(5),), 0, (PeerModel(behaviour="trickler", after=2),)), 1).run()
    assert outcome.failed is not None
    assert outcome.failed.kind == "timed-out"
    assert len(outcome.failed.missing) == 3

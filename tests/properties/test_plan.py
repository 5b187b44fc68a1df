"""Plans against brute force: every ordered subset of machines, every way to cut the layers."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, pairwise, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omninfer.plan import TOLERANCE, Machine, ModelCosts, Plan, make_plan
from omnistore.errors import PlanInfeasible

Ranges = tuple[tuple[int, int], ...]
Fixed = tuple[str, int, int] | None


@st.composite
def models(draw: st.DrawFn) -> ModelCosts:
    small = st.integers(1, 50)
    return ModelCosts(
        layers=tuple(draw(st.lists(small, min_size=1, max_size=5))),
        embed=draw(small),
        head=draw(small),
        tied=draw(st.booleans()),
        shared=draw(st.integers(0, 3)),
        kv=draw(st.integers(0, 5)),
        hidden=draw(small),
        logits=draw(small),
        active=draw(st.sampled_from([0.25, 1.0])),
    )


@st.composite
def clusters(draw: st.DrawFn) -> list[Machine]:
    count = draw(st.integers(1, 4))
    return [
        Machine(
            peer=f"m{n}",
            memory=draw(st.integers(0, 300)),
            speed=draw(st.sampled_from([1.0, 2.0, 10.0])),
            rtt=0.0 if n == 0 else draw(st.sampled_from([0.0, 0.5, 20.0])),
            bandwidth=math.inf if n == 0 else draw(st.sampled_from([1.0, 100.0])),
            footprint=draw(st.sampled_from([1.0, 1.5])),
        )
        for n in range(count)
    ]


def cuts(total: int, count: int) -> list[Ranges]:
    """Every way to cut `total` layers into `count` ranges of at least one."""
    inner = combinations(range(1, total), count - 1)
    return [tuple(zip((0, *c), (*c, total), strict=True)) for c in inner]


def feasible(costs: ModelCosts, machines: tuple[Machine, ...], ranges: Ranges, fixed: Fixed) -> bool:
    for machine, (first, last) in zip(machines, ranges, strict=True):
        if machine.needs(costs, first, last) > machine.memory:
            return False
        if fixed and machine.peer == fixed[0] and (first, last) != fixed[1:]:
            return False
    return not fixed or any(m.peer == fixed[0] for m in machines)


def latency(costs: ModelCosts, machines: tuple[Machine, ...], ranges: Ranges) -> float:
    return sum(m.latency(costs, *r) for m, r in zip(machines, ranges, strict=True))


def slowest(costs: ModelCosts, machines: tuple[Machine, ...], ranges: Ranges) -> float:
    return max(m.compute(costs, *r) for m, r in zip(machines, ranges, strict=True))


def brute_force(
    costs: ModelCosts, machines: list[Machine], required: frozenset[str], fixed: Fixed
) -> float | None:
    """The least latency of all feasible plans."""
    total = len(costs.layers)
    found = [
        latency(costs, order, ranges)
        for count in range(1, min(len(machines), total) + 1)
        for order in permutations(machines, count)
        if required <= {m.peer for m in order}
        for ranges in cuts(total, count)
        if feasible(costs, order, ranges, fixed)
    ]
    return min(found, default=None)


def ranges_of(plan: Plan, machines: list[Machine]) -> tuple[tuple[Machine, ...], Ranges]:
    by_peer = {machine.peer: machine for machine in machines}
    order = tuple(by_peer[stage.peer] for stage in plan.stages)
    return order, tuple((stage.first, stage.last) for stage in plan.stages)


@settings(max_examples=80, deadline=None)
@given(models(), clusters(), st.data())
def test_the_plan_is_as_good_as_brute_force(
    costs: ModelCosts, machines: list[Machine], data: st.DataObject
) -> None:
    total = len(costs.layers)
    required = frozenset(data.draw(st.sets(st.sampled_from([m.peer for m in machines]), max_size=2)))
    fixed: Fixed = None
    if data.draw(st.booleans()):
        first = data.draw(st.integers(0, total - 1))
        fixed = ("m0", first, data.draw(st.integers(first + 1, total)))
    best = brute_force(costs, machines, required, fixed)
    try:
        plan = make_plan(costs, machines, required=required, fixed=fixed)
    except PlanInfeasible:
        assert best is None
        return
    assert best is not None
    order, ranges = ranges_of(plan, machines)
    assert feasible(costs, order, ranges, fixed)
    assert required <= {m.peer for m in order}
    assert ranges[0][0] == 0 and ranges[-1][1] == total
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    assert [s.embed for s in plan.stages] == [s.first == 0 for s in plan.stages]
    assert [s.head for s in plan.stages] == [s.last == total for s in plan.stages]
    assert plan.latency == pytest.approx(latency(costs, order, ranges))
    assert plan.latency <= best * (1 + TOLERANCE) * (1 + 1e-9)
    within = [
        slowest(costs, order, other)
        for other in cuts(total, len(order))
        if feasible(costs, order, other, fixed) and latency(costs, order, other) <= best * (1 + TOLERANCE)
    ]
    assert slowest(costs, order, ranges) <= min(within, default=math.inf) * (1 + 1e-9)


@settings(max_examples=80, deadline=None)
@given(models(), clusters())
def test_the_missing_memory_is_exact(costs: ModelCosts, machines: list[Machine]) -> None:
    """One further machine with what the refusal says makes a plan possible; with a byte less it does not."""
    machines = [replace(machine, memory=machine.memory // 8) for machine in machines]
    try:
        make_plan(costs, machines)
    except PlanInfeasible as refusal:
        missing = int(str(refusal).rsplit(": ", 1)[1].split()[0])
        assert make_plan(costs, [*machines, Machine("further", missing, 1.0)]).stages
        with pytest.raises(PlanInfeasible):
            make_plan(costs, [*machines, Machine("further", missing - 1, 1.0)])


def uniform(layers: int, size: int = 100, **others: int) -> ModelCosts:
    values = {"embed": 0, "head": 0, "shared": 0, "kv": 0, "hidden": 4, "logits": 4} | others
    return ModelCosts(layers=(size,) * layers, tied=False, **values)


def test_a_model_that_fits_here_stays_here_unless_a_lender_is_named() -> None:
    machines = [Machine("here", 10_000, 100.0), Machine("lender", 10_000, 100.0, rtt=0.1)]
    assert [s.peer for s in make_plan(uniform(6), machines).stages] == ["here"]
    named = make_plan(uniform(6), machines, required=frozenset({"lender"}))
    assert "lender" in {s.peer for s in named.stages}


def test_equal_machines_get_equal_shares_in_spite_of_noisy_speeds() -> None:
    speeds = (100.0, 103.0, 98.0)
    machines = [Machine(f"m{n}", 10_000, s, rtt=n * 0.1) for n, s in enumerate(speeds)]
    plan = make_plan(uniform(6), machines, required=frozenset({"m0", "m1", "m2"}))
    assert [stage.last - stage.first for stage in plan.stages] == [2, 2, 2]


def test_a_faster_lender_is_used_though_nobody_named_it() -> None:
    machines = [Machine("here", 10_000, 10.0), Machine("gpu", 10_000, 1000.0, rtt=0.01, bandwidth=1e6)]
    assert [s.peer for s in make_plan(uniform(6), machines).stages] == ["gpu"]


def test_a_tied_head_takes_the_embedding_with_it() -> None:
    costs = replace(uniform(4, embed=500, head=1), tied=True)
    assert costs.weights(0, 2) == 700 and costs.weights(2, 4) == 701 and costs.weights(0, 4) == 901
    roomy, tight = Machine("roomy", 701, 1.0), Machine("tight", 650, 1.0)
    with pytest.raises(PlanInfeasible):
        make_plan(costs, [roomy, tight])
    assert len(make_plan(costs, [roomy, replace(tight, memory=700)]).stages) == 2


def test_refusals_name_the_machine_and_what_it_lacks() -> None:
    with pytest.raises(PlanInfeasible, match=r"here has 150 bytes for layers 0-1 of 200 bytes: 50 bytes is"):
        make_plan(uniform(4), [Machine("here", 150, 1.0)], fixed=("here", 0, 2))
    with pytest.raises(PlanInfeasible, match=r"small has 99 bytes for even one layer"):
        make_plan(
            uniform(4),
            [Machine("here", 1000, 1.0), Machine("small", 99, 1.0)],
            required=frozenset({"small"}),
        )
    with pytest.raises(PlanInfeasible, match=r"can not all get a layer|at most 2"):
        named = [Machine(f"m{n}", 1000, 1.0) for n in range(3)]
        make_plan(uniform(2), named, required=frozenset({"m0", "m1", "m2"}))
    with pytest.raises(PlanInfeasible, match="no profile of gone"):
        make_plan(uniform(2), [Machine("here", 1000, 1.0)], required=frozenset({"gone"}))


def test_many_machines_are_cut_down_to_what_can_be_searched_but_named_ones_stay() -> None:
    machines = [Machine(f"m{n:02}", 300, 1.0 + n, rtt=0.001) for n in range(30)]
    plan = make_plan(uniform(8), machines, required=frozenset({"m00"}))
    assert "m00" in {s.peer for s in plan.stages}


def test_grid_and_methods_agree() -> None:
    """The matrices of the search say what the methods say, for every range."""
    for tied, (first, last) in product((False, True), [(a, b) for a in range(4) for b in range(a + 1, 5)]):
        costs = replace(uniform(4, embed=7, head=3, kv=2, shared=1), tied=tied)
        machine = Machine("m", costs.weights(first, last) + 2 * (last - first), 1.0)
        others = [Machine(f"o{n}", 10**6, 1.0) for n in range(2)]
        assert make_plan(costs, [machine, *others], fixed=("m", first, last)).stages
        with pytest.raises(PlanInfeasible, match="1 bytes is missing"):
            make_plan(costs, [replace(machine, memory=machine.memory - 1), *others], fixed=("m", first, last))

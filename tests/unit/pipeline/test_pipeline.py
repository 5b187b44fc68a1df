"""Pipelines over machines in one process: real engines, real frames, a network in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from omninfer import frames
from omninfer.coordinator import Coordinator, RunOptions
from omninfer.frames import Progress
from omninfer.link import FrameLink
from omninfer.testing.cluster import LAYERS, Cluster, LendingMachine, cluster, greedily
from omnistore.errors import InferenceError, InputError, PeerUnreachable, PlanInfeasible, StageLost
from omnistore.manifest import PartKey
from omnistore.net.interface import Provider
from omnistore.testing.network import VirtualRouting

pytestmark = pytest.mark.trio


def with_(*names: str, **options: Any) -> RunOptions:
    addrs = tuple(f"/memory/{name}/p2p/{name}" for name in names)
    return RunOptions(**{"lenders": addrs, "engine": "numpy", "context": 256, **options})


def held(machine: LendingMachine) -> set[PartKey]:
    (status,) = machine.store.models()
    return set(status.complete)


def stages(coordinator: Coordinator) -> list[tuple[str, int, int]]:
    assert coordinator.plan is not None
    return [(stage.peer, stage.first, stage.last) for stage in coordinator.plan.stages]


async def test_alone_or_over_others_the_tokens_are_the_same(noise_file: Path, greedy: list[int]) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        one.lend("b")
        wanted = [
            (with_(), {"me"}),
            (with_("a"), {"me", "a"}),
            (with_("a", "b"), {"me", "a", "b"}),
            (with_("a", layers="none"), {"a"}),
            (with_("a", "b", layers="none"), {"a", "b"}),
            (with_(layers="all"), {"me"}),
        ]
        for options, peers in wanted:
            async with one.coordinate(options) as coordinator:
                assert await greedily(coordinator, greedy[:5], 10) == greedy[:15]
                assert {peer for peer, _, _ in stages(coordinator)} == peers


async def test_a_long_prompt_goes_through_in_pieces(
    noise_file: Path, greedy: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omninfer.pipeline.PIECE", 7)
    async with cluster(noise_file) as one:
        one.lend("a")
        one.lend("b")
        async with one.coordinate(with_("a", "b")) as coordinator:
            assert await greedily(coordinator, greedy[:30], 10) == greedy[:40]


async def test_a_beginning_that_is_still_held_is_not_computed_again(
    noise_file: Path, greedy: list[int]
) -> None:
    other = [*greedy[:7], greedy[0], greedy[1]]
    asked = [greedy[:9], greedy[:12], other, [*other, 3], greedy[:9], greedy[:9], greedy[:2], [9, 9, 9]]
    async with cluster(noise_file) as one:
        one.lend("a")
        async with one.coordinate(with_("a")) as kept:
            held: list[int] = []
            for history in asked:
                before = kept.computed
                logits = await kept.logits(history)
                shared = next(
                    (n for n, pair in enumerate(zip(held, history[:-1], strict=False)) if len(set(pair)) > 1),
                    min(len(held), len(history) - 1),
                )
                assert kept.computed - before == len(history) - shared
                async with one.coordinate(with_(layers="all")) as fresh:
                    assert np.allclose(logits, await fresh.logits(history), atol=1e-4)
                held = history


async def test_every_lender_fetches_its_own_parts_only(noise_file: Path, greedy: list[int]) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        one.lend("b")
        async with one.coordinate(with_("a", "b")) as coordinator:
            await coordinator.logits(greedy[:5])
            for peer, first, last in stages(coordinator):
                if peer == "me":
                    continue
                layers = {PartKey("layer", n) for n in range(first, last)}
                ends = {PartKey("embed")} if first == 0 or last == LAYERS else set()
                ends |= {PartKey("head")} if last == LAYERS else set()
                assert held(one.machines[peer]) == {PartKey("header", 0), *layers, *ends}


async def test_layers_say_what_this_machine_holds(noise_file: Path, greedy: list[int]) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        one.lend("b")
        async with one.coordinate(with_("a", "b", layers="2-3")) as coordinator:
            assert await greedily(coordinator, greedy[:5], 5) == greedy[:10]
            assert {peer: r for peer, *r in stages(coordinator)}["me"] == [2, 4]
            assert len(stages(coordinator)) == 3
        async with one.coordinate(with_("a", layers="0-4")) as coordinator:
            assert await greedily(coordinator, greedy[:5], 5) == greedy[:10]
            assert stages(coordinator) == [("me", 0, 5), ("a", 5, 6)]


async def test_a_range_here_and_nobody_for_the_rest_is_said(noise_file: Path) -> None:
    async with cluster(noise_file) as one, one.coordinate(with_(layers="0-1")) as coordinator:
        with pytest.raises(PlanInfeasible, match="nobody lends compute for the others"):
            await coordinator.ready()
    async with cluster(noise_file) as one, one.coordinate(with_(layers="none")) as coordinator:
        with pytest.raises(PlanInfeasible, match="no machine lends compute"):
            await coordinator.ready()


@pytest.mark.parametrize("layers", ["some", "3-", "4-2", "0-6", "embed", "-1"])
async def test_layers_that_mean_nothing_are_refused(noise_file: Path, layers: str) -> None:
    async with cluster(noise_file) as one:
        with pytest.raises(InputError, match="--layers"):
            async with one.coordinate(with_(layers=layers)):
                pass
        with pytest.raises(InputError, match="--with"):
            async with one.coordinate(with_("a", layers="all")):
                pass


async def test_a_lender_found_in_the_dht_is_used_where_memory_lacks(
    noise_file: Path, greedy: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(noise_file) as one:
        lender = one.lend("a")
        await VirtualRouting(lender.node).provide(frames.LENDERS)
        async with one.coordinate(with_()) as coordinator:
            assert await greedily(coordinator, greedy[:5], 2) == greedy[:7]
            assert stages(coordinator) == [("me", 0, LAYERS)]
        monkeypatch.setattr("omninfer.coordinator.free_memory", lambda: 700_000)
        async with one.coordinate(with_()) as coordinator:
            assert await greedily(coordinator, greedy[:5], 2) == greedy[:7]
            assert "a" in {peer for peer, _, _ in stages(coordinator)}


# --- losing stages --------------------------------------------------------------------------


async def lose(one: Cluster, greedy: list[int], options: RunOptions, how: str, victim: str) -> Coordinator:
    """Generate 20 tokens and lose a machine in the middle."""
    async with one.coordinate(options) as coordinator:
        history = await greedily(coordinator, greedy[:5], 8)
        node = one.machines[victim].node
        if how == "dies":
            node.leave()
        else:
            node.frozen = True
        assert await greedily(coordinator, history, 12) == greedy[:25]
        assert coordinator.losses == [victim]
        assert victim not in {peer for peer, _, _ in stages(coordinator)}
        return coordinator


@pytest.mark.parametrize("how", ["dies", "stops"])
async def test_a_lost_lender_costs_time_but_no_token(noise_file: Path, greedy: list[int], how: str) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        one.lend("b")
        coordinator = await lose(one, greedy, with_("a", "b", silence=2.5), how, "a")
        assert any("planning again" in note for note in one.notes)
        assert "b" in {peer for peer, _, _ in stages(coordinator)}


async def test_both_lenders_lost_one_after_the_other(noise_file: Path, greedy: list[int]) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        one.lend("b")
        async with one.coordinate(with_("a", "b")) as coordinator:
            history = await greedily(coordinator, greedy[:5], 4)
            one.machines["a"].node.leave()
            history = await greedily(coordinator, history, 4)
            one.machines["b"].node.leave()
            assert await greedily(coordinator, history, 4) == greedy[:17]
            assert stages(coordinator) == [("me", 0, LAYERS)]


async def test_without_weights_here_and_the_only_lender_gone_the_error_names_it(
    noise_file: Path, greedy: list[int]
) -> None:
    async with cluster(noise_file) as one:
        lender = one.lend("a")
        async with one.coordinate(with_("a", layers="none")) as coordinator:
            await coordinator.logits(greedy[:5])
            lender.node.leave()
            with pytest.raises(StageLost, match="lost a, and without"):
                await coordinator.logits(greedy[:6])


async def test_an_interrupted_call_leaves_nothing_behind(noise_file: Path, greedy: list[int]) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        async with one.coordinate(with_("a")) as coordinator:
            await coordinator.logits(greedy[:5])
            for delay in (0.0, 0.0004, 0.0008, 0.0012, 0.002):
                with trio.move_on_after(delay):
                    await coordinator.logits([*greedy[:20], 3, 4, 5])
            assert await greedily(coordinator, greedy[:8], 6) == greedy[:14]
            assert coordinator.losses == []


async def test_a_full_context_is_an_error_not_a_crash(noise_file: Path, greedy: list[int]) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        async with one.coordinate(with_("a", context=8)) as coordinator:
            assert await greedily(coordinator, greedy[:5], 4) == greedy[:9]
            with pytest.raises(InferenceError, match="context of 8"):
                await coordinator.logits(greedy[:9])


# --- lending --------------------------------------------------------------------------------


async def test_nobody_is_served_who_was_not_allowed(noise_file: Path) -> None:
    async with cluster(noise_file) as one:
        one.lend("a", allow=frozenset({"somebody-else"}))
        async with one.coordinate(with_("a")) as coordinator:
            with pytest.raises(PlanInfeasible, match="a does not lend compute to me") as refused:
                await coordinator.ready()
            assert refused.value.remedy == "Start it with: omni seed --compute --allow me"
        assert one.machines["a"].store.models() == []


async def test_a_named_lender_that_is_not_there_is_named(noise_file: Path) -> None:
    async with cluster(noise_file) as one, one.coordinate(with_("ghost")) as coordinator:
        with pytest.raises(PeerUnreachable, match="ghost"):
            await coordinator.ready()


async def test_a_lender_without_memory_says_how_much_is_missing(noise_file: Path) -> None:
    async with cluster(noise_file) as one:
        one.lend("a", memory=1000)
        async with one.coordinate(with_("a")) as coordinator:
            with pytest.raises(PlanInfeasible, match=r"a has 1\.00 kB for even one layer"):
                await coordinator.ready()


async def test_two_coordinators_share_a_stage_but_no_slot(noise_file: Path, greedy: list[int]) -> None:
    async with cluster(noise_file) as one:
        lender = one.lend("a")
        options = with_("a", layers="none")
        async with one.coordinate(options) as mine, one.coordinate(options, "other") as other:
            first = await greedily(mine, greedy[:5], 3)
            second = await greedily(other, [9, 9, 9], 3)
            assert await greedily(mine, first, 5) == greedy[:13]
            assert len(lender.lender.stages._stages) == 1
        async with one.coordinate(options, "third") as alone:
            assert await greedily(alone, [9, 9, 9], 3) == second


async def test_a_stage_stays_warm_for_the_next_coordinator(noise_file: Path, greedy: list[int]) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        for expected in (True, False):
            one.loads.clear()
            async with one.coordinate(with_("a", layers="none")) as coordinator:
                await coordinator.logits(greedy[:5])
                ready = [stage.ready for stage in (await coordinator.ready()).stages]  # type: ignore[attr-defined]
                assert bool(ready[0].fetched) is expected


async def test_a_lender_lets_go_of_slots_when_the_stream_ends(noise_file: Path, greedy: list[int]) -> None:
    async with cluster(noise_file) as one:
        lender = one.lend("a")
        budget = lender.lender.stages.available
        async with one.coordinate(with_("a")) as coordinator:
            await coordinator.logits(greedy[:5])
            assert lender.lender.stages.available < budget
        with trio.fail_after(5):
            while lender.lender.stages.available < budget:
                await trio.lowlevel.checkpoint()


async def open_link(one: Cluster, name: str = "stranger") -> FrameLink:
    node = one.network.nodes.get(name) or one.network.node(name)
    stream = await node.open_stream(Provider("a"), frames.PROTOCOL)
    return FrameLink(stream, "coordinator", silence=5.0)


async def answer(link: FrameLink) -> frames.Frame | None:
    frame = await link.receive()
    while isinstance(frame, Progress):
        frame = await link.receive()
    return frame


def order(one: Cluster, **changes: Any) -> frames.Load:
    fields = {"first": 0, "last": LAYERS, "embed": True, "head": True, "engine": "numpy"}
    return frames.Load(**{"model": one.cid, "context": 16, "slots": 2, "providers": (), **fields, **changes})


async def test_whoever_is_not_allowed_gets_one_answer_and_no_stream(noise_file: Path) -> None:
    async with cluster(noise_file) as one:
        one.lend("a", allow=frozenset({"friend"}))
        for frame, kind in (
            (frames.Ask("auto"), frames.Refuse),
            (order(one), frames.Refuse),
            (frames.Ping(b"12345"), frames.Error),
        ):
            link = await open_link(one)
            await link.send(frame)
            assert isinstance(await link.receive(), kind)
            assert await link.receive() is None


@pytest.mark.parametrize(
    ("fault", "send"),
    [
        ("position is not the slot's length", [frames.Forward(0, 0, 3, (1,), True)]),
        ("token outside the vocabulary", [frames.Forward(0, 0, 0, (4000,), True)]),
        ("trim to more than there is", [frames.Trim(0, 5)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_an_engine_refuses_ends_the_stream(
    noise_file: Path, fault: str, send: list[frames.FromCoordinator]
) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        link = await open_link(one)
        await link.send(order(one))
        assert isinstance(await answer(link), frames.Ready)
        for frame in send:
            await link.send(frame)
        assert isinstance(await answer(link), frames.Error)
        assert await link.receive() is None


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("engine", {"engine": "abacus"}),
        ("model", {"last": LAYERS + 1}),
        ("model", {"last": 2}),
        ("memory", {"context": 1 << 25}),
    ],
)
async def test_a_load_that_can_not_be_is_refused_and_the_stream_goes_on(
    noise_file: Path, code: str, changes: dict[str, Any]
) -> None:
    async with cluster(noise_file) as one:
        one.lend("a", memory=4 << 20)
        link = await open_link(one)
        await link.send(order(one, **changes))
        refusal = await answer(link)
        assert isinstance(refusal, frames.Refuse) and refusal.code == code
        await link.send(order(one))
        assert isinstance(await answer(link), frames.Ready)


async def test_garbage_is_answered_with_an_error_and_others_go_on(
    noise_file: Path, greedy: list[int]
) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        async with one.coordinate(with_("a")) as coordinator:
            history = await greedily(coordinator, greedy[:5], 3)
            stream = await one.network.node("stranger").open_stream(Provider("a"), frames.PROTOCOL)
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
            received = b""
            while data := await stream.receive_some(4096):
                received += data
            assert b"a frame of" in received
            assert await greedily(coordinator, history, 3) == greedy[:11]


async def test_a_lender_that_comes_back_is_used_again_but_not_a_third_time(
    noise_file: Path, greedy: list[int]
) -> None:
    async with cluster(noise_file) as one:
        lender = one.lend("a")
        async with one.coordinate(with_("a")) as coordinator:
            history = await greedily(coordinator, greedy[:5], 3)
            for expected in ({"me", "a"}, {"me"}):
                lender.node.leave()
                lender.node.come_back()
                history = await greedily(coordinator, history, 3)
                assert {peer for peer, _, _ in stages(coordinator)} == expected
            assert history == greedy[:14]
            assert coordinator.losses == ["a", "a"]

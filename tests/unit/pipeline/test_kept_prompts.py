"""Prompts that outlive their stream at a lender: found again by the same peer, unknown to every other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from omninfer import frames
from omninfer.coordinator import Coordinator, RunOptions
from omninfer.labels import Labels
from omninfer.link import FrameLink
from omninfer.testing.cluster import LAYERS, Cluster, LendingMachine, cluster, greedily
from omnistore.errors import PlanInfeasible
from omnistore.net.interface import Provider

pytestmark = pytest.mark.trio

PROMPT = [(11 * n + 5) % 96 for n in range(200)]
"""Three whole labels and a bit."""
TOKEN = 2 * 4 * 2 * 16 * LAYERS


def with_(*names: str, **options: Any) -> RunOptions:
    addrs = tuple(f"/memory/{name}/p2p/{name}" for name in names)
    return RunOptions(**{"lenders": addrs, "layers": "none", "engine": "numpy", "context": 512, **options})


async def say(
    one: Cluster, prompt: list[int], options: RunOptions, name: str = "me", count: int = 4
) -> tuple[list[int], int]:
    """What a new coordinator says, and how many tokens it had to have computed."""
    async with one.coordinate(options, name) as coordinator:
        history = await greedily(coordinator, prompt, count)
        computed = coordinator.computed
    with trio.fail_after(5):
        while any(w.leases for m in one.machines.values() for w in m.lender.stages._stages.values()):
            await trio.lowlevel.checkpoint()
    return history, computed


def forwarded(machine: LendingMachine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every forward that a machine's stages are asked for from now on."""
    rows: list[int] = []
    for warm in machine.lender.stages._stages.values():
        stage: Any = warm.stage
        whole = type(stage).forward

        def counted(self: Any, x: Any, *, _whole: Any = whole, **options: Any) -> Any:
            rows.append(len(x))
            return _whole(self, x, **options)

        monkeypatch.setattr(type(stage), "forward", counted)
    return rows


@pytest.mark.parametrize("names", ["a", "ab"])
async def test_the_next_run_does_not_prefill_again(noise_file: Path, names: str) -> None:
    async with cluster(noise_file) as one:
        for name in names:
            one.lend(name)
        first, computed = await say(one, PROMPT, with_(*names))
        assert computed == 203
        again, computed = await say(one, PROMPT, with_(*names))
        assert (again, computed) == (first, 203 - 192)
        other, computed = await say(one, [*PROMPT[:130], 1, 2, 3], with_(*names))
        assert computed == 136 - 128
        async with one.coordinate(with_(layers="all")) as alone:
            assert await greedily(alone, [*PROMPT[:130], 1, 2, 3], 4) == other


async def test_no_other_peer_hits_or_learns_of_it(noise_file: Path) -> None:
    """Not even one that uses the very same labels."""
    async with cluster(noise_file) as one:
        one.lend("a")
        await say(one, PROMPT, with_("a"))
        _, computed = await say(one, PROMPT, with_("a"), "other")
        assert computed == 203
        for name, expected in (("thief", 0), ("me", 192)):
            link = await loaded(one, name)
            await link.send(frames.Recall(0, Labels(b"me").of(PROMPT)))
            assert await answer(link) == frames.Held(0, expected)
            await link.aclose()


async def test_this_machine_computes_its_own_layers_and_lenders_are_spared(
    noise_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was held here went with the process; the lender after it still has its part of the prompt."""
    async with cluster(noise_file) as one:
        machine = one.lend("a")
        first, _ = await say(one, PROMPT, with_("a", layers="0-2"))
        rows = forwarded(machine, monkeypatch)
        again, computed = await say(one, PROMPT, with_("a", layers="0-2"))
        # This machine's stage is of the same class: 200 rows are its own, 8 are the lender's.
        assert (again, computed) == (first, 203)
        assert sorted(rows)[-2:] == [8, 200]


async def test_long_prompts_go_on_in_pieces_from_where_each_stage_is(
    noise_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omninfer.pipeline.PIECE", 50)
    async with cluster(noise_file) as one:
        one.lend("a")
        one.lend("b")
        options = with_("a", "b", layers="0-1")
        first, _ = await say(one, PROMPT, options)
        again, _ = await say(one, PROMPT, options)
        assert again == first
        # One of the lenders forgets: the others go on from what is least.
        one.machines["b"].lender.stages.expire(trio.current_time() + 601)
        assert (await say(one, PROMPT, options))[0] == first
        assert (await say(one, [*PROMPT[:190], 7], options))[0][:191] == [*PROMPT[:190], 7]


async def test_a_lender_lost_in_the_middle_of_a_kept_prompt_changes_no_token(noise_file: Path) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        one.lend("b")
        options = with_("a", "b")
        first, _ = await say(one, PROMPT, options, count=10)
        async with one.coordinate(options) as coordinator:
            history = await greedily(coordinator, PROMPT, 3)
            assert coordinator.computed == 202 - 192
            one.machines["a"].node.leave()
            assert await greedily(coordinator, history, 7) == first
            assert coordinator.losses == ["a"]


async def test_a_lender_keeps_no_more_than_it_was_told(noise_file: Path) -> None:
    other = [(13 * n + 1) % 96 for n in range(200)]
    for kept, expected in ((0, (203, 203)), (256 * TOKEN, (203, 11)), (512 * TOKEN, (11, 11))):
        async with cluster(noise_file) as one:
            one.lend("a", kept=kept)
            for prompt in (PROMPT, other):
                await say(one, prompt, with_("a"))
            # In turn, what is asked for last is kept last.
            found = [(await say(one, prompt, with_("a")))[1] for prompt in (other, PROMPT)]
            assert tuple(reversed(found)) == expected


async def test_kept_prompts_make_room_and_are_forgotten_in_time(noise_file: Path) -> None:
    async with cluster(noise_file) as one:
        machine = one.lend("a")
        stages = machine.lender.stages
        await say(one, PROMPT, with_("a"))
        (warm,) = stages._stages.values()
        assert len(warm.free) == frames.LIMITS.slots - 1
        assert stages._kept.held(warm.key) == 256 * TOKEN
        stages.expire(trio.current_time() + 601)
        assert not list(stages._kept.by_age())
        # A lease that needs the memory gets it: weights and one full context, and not a byte more.
        _, computed = await say(one, PROMPT, with_("a"))
        assert computed == 203
        (warm,) = stages._stages.values()
        stages.budget = warm.weights + 1 + 512 * TOKEN
        assert (await say(one, PROMPT, with_("a")))[1] == 203


async def test_conversations_of_one_coordinator_share_slots_of_lenders(noise_file: Path) -> None:
    """Forks at a lender, and at this machine beside it."""
    ends = [[*PROMPT[:100], *([n] * 40)] for n in (1, 2, 3)]
    options = with_("a", layers="0-2", kv_memory=4 * 512 * TOKEN)
    async with cluster(noise_file) as one:
        one.lend("a")
        async with one.coordinate(options) as coordinator:
            found = []
            for prompt in [*ends, *ends]:
                before = coordinator.computed
                logits = await coordinator.logits(prompt)
                found.append(coordinator.computed - before)
                async with one.coordinate(with_(layers="all")) as fresh:
                    np.testing.assert_allclose(logits, await fresh.logits(prompt), atol=2e-4)
            assert found == [140, 40, 40, 1, 1, 1]


async def test_a_lender_of_version_1_0_0_still_takes_part(noise_file: Path) -> None:
    async with cluster(noise_file) as one:
        one.lend("a", caching=False)
        one.lend("b")
        first, _ = await say(one, PROMPT, with_("b"))
        for _ in range(2):
            assert await say(one, PROMPT, with_("a", "b")) == (first, 203)
        async with one.coordinate(with_("a", kv="q8")) as coordinator:
            with pytest.raises(PlanInfeasible, match=r"a speaks version 1\.0\.0"):
                await coordinator.ready()


async def test_eight_bits_at_lenders_as_here(noise_file: Path) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        async with one.coordinate(with_(layers="all", kv="q8")) as alone:
            expected = await greedily(alone, PROMPT, 6)
        for layers in ("none", "0-2"):
            async with one.coordinate(with_("a", layers=layers, kv="q8")) as coordinator:
                assert await greedily(coordinator, PROMPT, 6) == expected
        (key, *_) = one.machines["a"].lender.stages._stages
        assert key.kv == "q8"


async def test_an_engine_without_eight_bits_is_refused_by_name(noise_file: Path) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        async with one.coordinate(with_("a", engine="ort", kv="q8")) as coordinator:
            with pytest.raises(PlanInfeasible, match="the engine ort does not keep keys and values as q8"):
                await coordinator.ready()


# --- what a hostile coordinator may try -----------------------------------------------------


async def open_link(one: Cluster, name: str) -> FrameLink:
    node = one.network.nodes.get(name) or one.network.node(name)
    stream = await node.open_stream(Provider("a"), frames.CACHING)
    return FrameLink(stream, "coordinator", silence=5.0, caching=True)


async def answer(link: FrameLink) -> frames.Frame | None:
    frame = await link.receive()
    while isinstance(frame, frames.Progress):
        frame = await link.receive()
    return frame


async def loaded(one: Cluster, name: str, tokens: int = 512) -> FrameLink:
    link = await open_link(one, name)
    await link.send(frames.Cache(tokens, "full"))
    await link.send(frames.Load(one.cid, 0, LAYERS, True, True, "numpy", 512, 8, ()))
    assert isinstance(await answer(link), frames.Ready)
    return link


WORD = b"w" * frames.LABEL_SIZE


@pytest.mark.parametrize(
    ("fault", "send"),
    [
        ("labels of more than is held", [frames.Forward(0, 0, 0, (1,), False), frames.Keep(0, (WORD,))]),
        ("memory that was not asked for", [frames.Forward(0, n, 0, (1,), False) for n in range(3)]),
        ("a slot into one that is not empty", [
            frames.Forward(0, 0, 0, (1, 2), False), frames.Forward(1, 1, 0, (1,), False),
            frames.Fork(0, 1, 1),
        ]),
        ("more than there is", [frames.Forward(0, 0, 0, (1, 2), False), frames.Fork(0, 1, 3)]),
        ("a recall into a slot in use", [frames.Forward(0, 0, 0, (1,), False), frames.Recall(0, (WORD,))]),
        ("a slot that was not asked for", [frames.Keep(8, (WORD,))]),
        ("how slots are kept, said too late", [frames.Cache(1, "full")]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
async def test_what_breaks_the_protocol_ends_the_stream(
    noise_file: Path, fault: str, send: list[frames.FromCoordinator], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        link = await loaded(one, "stranger")
        # Our own side would not send it.
        monkeypatch.setattr(link.conversation, "sending", lambda frame: None)
        monkeypatch.setattr(link.conversation, "received_untrusted", lambda frame: None)
        sequence = 0
        for frame in send:
            if isinstance(frame, frames.Forward):
                await link.send(replace(frame, seq=sequence))
                sequence += 1
            else:
                await link.send(frame)
        found = await answer(link)
        while isinstance(found, frames.Output):
            found = await answer(link)
        assert isinstance(found, frames.Error)
        assert await link.receive() is None
        one.machines["a"].lender.stages.close()


async def test_frames_of_1_1_0_are_unknown_to_1_0_0(noise_file: Path) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        node = one.network.node("stranger")
        link = FrameLink(
            await node.open_stream(Provider("a"), frames.PROTOCOL), "coordinator", silence=5.0, caching=True
        )
        await link.send(frames.Cache(1, "full"))
        assert isinstance(await answer(link), frames.Error)


async def test_a_trimmed_slot_is_kept_as_far_as_it_goes(noise_file: Path) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        words = Labels(b"x").of(PROMPT)
        link = await loaded(one, "me")
        await link.send(frames.Forward(0, 0, 0, tuple(PROMPT), False))
        assert isinstance(await answer(link), frames.Output)
        await link.send(frames.Keep(0, words))
        await link.send(frames.Trim(0, 100))
        await link.send(frames.Forward(1, 1, 0, tuple(PROMPT), False))
        assert isinstance(await answer(link), frames.Output)
        await link.send(frames.Keep(1, words))
        await link.send(frames.Drop(1))
        await link.send(frames.Bye())
        assert await answer(link) is None
        again = await loaded(one, "me")
        await again.send(frames.Recall(3, words))
        assert await answer(again) == frames.Held(3, 64)


async def greedy_of(coordinator: Coordinator, prompt: list[int]) -> int:
    return int((await coordinator.logits(prompt)).argmax())


async def test_an_interrupted_recall_is_no_fault(noise_file: Path) -> None:
    async with cluster(noise_file) as one:
        one.lend("a")
        first, _ = await say(one, PROMPT, with_("a"), count=1)
        for delay in (0.0, 0.0005, 0.001, 0.002, 0.003, 0.005):
            async with one.coordinate(with_("a")) as coordinator:
                await coordinator.ready()
                with trio.move_on_after(delay):
                    await coordinator.logits(PROMPT)
                assert await greedy_of(coordinator, PROMPT) == first[-1]
                assert coordinator.losses == []

"""Prompts that begin alike, through real engines: what is held is not computed again, and nothing else
changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from omninfer.coordinator import Coordinator, RunOptions
from omninfer.plan import Machine, ModelCosts
from omninfer.prefixes import STEP
from omninfer.profile import held
from omninfer.testing.cluster import LAYERS, cluster
from omnistore.errors import InferenceError, PlanInfeasible

pytestmark = pytest.mark.trio

TOKEN = 2 * 4 * 2 * 16 * LAYERS
"""Bytes of a token's keys and values: two heads of 16, float32."""
SYSTEM = [(7 * n + 3) % 96 for n in range(60)]


def alone(engine: str = "numpy", **options: Any) -> RunOptions:
    return RunOptions(**{"layers": "all", "engine": engine, "context": 512, **options})


async def ask(coordinator: Coordinator, prompt: list[int]) -> tuple[Any, int]:
    """The logits, and how many tokens were computed for them."""
    before = coordinator.computed
    logits = await coordinator.logits(prompt)
    assert coordinator.cached == len(prompt) - (coordinator.computed - before)
    return logits, coordinator.computed - before


def ending(number: int, length: int = 40) -> list[int]:
    return [*SYSTEM, *[(number + n * (number + 1)) % 96 for n in range(length)]]


@pytest.mark.parametrize("engine", ["numpy", "mlx", "ort"])
async def test_logits_are_those_without_a_cache(noise_file: Path, engine: str) -> None:
    """Continued, trimmed, forked and evicted slots: each answer is that of a coordinator that never saw
    another."""
    first, second, third = ending(1), ending(2), ending(3)
    asked = [
        (first, 100), (second, 40), (third, 40),  # forks of the system prompt
        ([*first, 5, 6], 2), ([*second, 9], 1),  # continued, each in its slot
        ([*first, 5, 7], 1),  # trimmed
        (SYSTEM, 1), ([9, 9, 9], 3),
    ]  # fmt: skip
    many = alone(engine, kv_memory=8 * 512 * TOKEN)
    async with cluster(noise_file) as one, one.coordinate(many) as kept:
        for prompt, computed in asked:
            logits, found = await ask(kept, prompt)
            assert found == computed, prompt
            async with one.coordinate(alone(engine)) as fresh:
                expected, _ = await ask(fresh, prompt)
            np.testing.assert_allclose(logits, expected, atol=2e-4)
            assert logits.argmax() == expected.argmax()


async def test_the_least_recently_used_goes_when_memory_is_full(noise_file: Path) -> None:
    """One full context: two prompts of up to 256 tokens."""
    async with cluster(noise_file) as one, one.coordinate(alone()) as coordinator:
        found = [(await ask(coordinator, ending(n)))[1] for n in (1, 2, 1, 3, 1, 2)]
        # 2 is forked beside 1; 3 takes the place of 2, and 2 that of 3: only the system prompt is left of it.
        assert found == [100, 40, 1, 40, 1, 40]
        pipeline = await coordinator.ready()
        assert pipeline.table.bytes == 2 * STEP * TOKEN == pipeline.table.budget


async def test_a_prompt_that_does_not_fit_says_so_and_others_go_on(noise_file: Path) -> None:
    async with (
        cluster(noise_file) as one,
        one.coordinate(alone(kv_memory=STEP * TOKEN)) as coordinator,
    ):
        await ask(coordinator, ending(1))
        with pytest.raises(InferenceError, match="kv_memory is"):
            await ask(coordinator, ending(2, 300))
        assert (await ask(coordinator, [*ending(1), 4]))[1] == 1


async def test_an_interruption_while_slots_are_prepared_leaves_nothing_wrong(noise_file: Path) -> None:
    prompts = [ending(n) for n in (1, 2, 3, 1, 2, 3)]
    async with cluster(noise_file) as one:
        async with one.coordinate(alone()) as fresh:
            expected = [(await ask(fresh, prompt))[0] for prompt in prompts]
        async with one.coordinate(alone()) as coordinator:
            await coordinator.ready()
            for delay in (0.0, 0.0002, 0.0005, 0.001, 0.002, 0.004):
                for prompt, logits in zip(prompts, expected, strict=True):
                    with trio.move_on_after(delay):
                        await coordinator.logits([*prompt, 1, 2])
                    np.testing.assert_allclose(await coordinator.logits(prompt), logits, atol=2e-4)


async def test_two_at_once_take_turns_and_share_their_beginning(noise_file: Path) -> None:
    async with (
        cluster(noise_file) as one,
        one.coordinate(alone(kv_memory=4 * 512 * TOKEN)) as coordinator,
        one.coordinate(alone()) as fresh,
    ):
        await coordinator.ready()
        said: dict[int, list[int]] = {}

        async def write(number: int) -> None:
            history = ending(number)
            for _ in range(12):
                history.append(int((await coordinator.logits(history)).argmax()))
            said[number] = history

        async with trio.open_nursery() as nursery:
            for number in (1, 2, 3):
                nursery.start_soon(write, number)
        assert coordinator.computed == len(ending(1)) + 2 * 40 + 3 * 11
        for number, history in said.items():
            for n in range(len(ending(number)), len(history)):
                assert int((await fresh.logits(history[:n])).argmax()) == history[n]


async def test_plans_count_the_memory_of_the_cache(noise_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(noise_file) as one, one.coordinate(alone()) as coordinator:
        about = coordinator.about
    small = ModelCosts.of(about.model.manifest, about.spec, tokens=512)
    assert small.kv * LAYERS == 512 * TOKEN
    machine = Machine("here", 0, 1.0, held=held(about, "numpy"))
    weights = machine.needs(small, 0, LAYERS) - 512 * TOKEN
    monkeypatch.setattr("omninfer.coordinator.free_memory", lambda: weights + 3 * 512 * TOKEN)
    async with cluster(noise_file) as one:
        async with one.coordinate(alone(kv_memory=3 * 512 * TOKEN)) as coordinator:
            await coordinator.ready()
        async with one.coordinate(alone(kv_memory=4 * 512 * TOKEN)) as coordinator:
            with pytest.raises(PlanInfeasible):
                await coordinator.ready()
        # More than all slots could hold is not planned.
        monkeypatch.setattr("omninfer.coordinator.free_memory", lambda: weights + 8 * 512 * TOKEN)
        async with one.coordinate(alone(kv_memory=1 << 40)) as coordinator:
            await coordinator.ready()


async def test_plans_know_what_each_engine_makes_of_the_weights(noise_file: Path) -> None:
    async with cluster(noise_file) as one, one.coordinate(alone()) as coordinator:
        about = coordinator.about
    costs = ModelCosts.of(about.model.manifest, about.spec, tokens=0)
    packed = costs.weights(0, LAYERS)
    # F32, and a head that is tied to the embedding.
    for engine, ratio in (("numpy", 1.1), ("mlx", 1.1), ("ort", 1.1)):
        machine = Machine("m", 0, 1.0, held=held(about, engine))
        assert machine.needs(costs, 0, LAYERS) == pytest.approx(ratio * packed, rel=0.001)
        assert machine.needs(costs, 2, 3) == pytest.approx(ratio * costs.weights(2, 3), rel=0.001)
    assert held(about, "abacus") is None

"""Sampling: parameters, each filter on small examples, distributions, and stop strings."""

from __future__ import annotations

import numpy as np
import pytest

from omninfer.sampling import MAX_STOPS, Sampler, SamplingParams, StopMatcher, candidates, logprobs
from omnistore.errors import InferenceError, InputError

ALL = SamplingParams(temperature=1, top_k=0, top_p=1, min_p=0)


def logits(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def params(**changes: float) -> SamplingParams:
    return SamplingParams(**({"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"temperature": "1"}, {"top_k": -1}, {"top_k": 1.5}, {"top_k": True}, {"top_p": 1.01},
        {"top_p": -0.1}, {"min_p": 2},
        {"typical_p": 1.5}, {"presence_penalty": 101}, {"frequency_penalty": float("nan")},
        {"logit_bias": ((-1, 0.0),)}, {"logit_bias": ((1, 1e9),)}, {"logit_bias": ((1, 0.0),) * 2000},
        {"seed": -1}, {"seed": 1 << 64}, {"seed": None}, {"repeat_penalty": 0}, {"repeat_last_n": -1},
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_temperature_zero_takes_the_likeliest_and_the_lowest_of_equals() -> None:
    sampler = Sampler(params(temperature=0))
    assert sampler.sample(logits(1, 3, 3, 2), []) == 1
    assert sampler.sample(logits(-5, -5), []) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0, 1])
def test_damaged_logits(bad: float, temperature: float) -> None:
    with pytest.raises(InferenceError, match="token 1"):
        Sampler(params(temperature=temperature)).sample(logits(0, bad, 1), [])


@pytest.mark.parametrize("shape", [(0,), (2, 3), ()])
def test_logits_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InferenceError, match="shape"):
        Sampler(ALL).sample(np.zeros(shape, dtype=np.float32), [])


def test_top_k_keeps_the_lowest_ids_of_equals() -> None:
    ids, _ = candidates(logits(1, 2, 2, 2, 0), params(top_k=2))
    assert ids.tolist() == [1, 2]
    ids, _ = candidates(logits(1, 2), params(top_k=99))
    assert ids.tolist() == [0, 1]


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    values = np.log(np.array([0.1, 0.5, 0.3, 0.1]))
    assert candidates(values, params(top_p=0.49))[0].tolist() == [1]
    assert candidates(values, params(top_p=0.51))[0].tolist() == [1, 2]
    assert candidates(values, params(top_p=0.85))[0].tolist() == [1, 2, 0]
    assert candidates(values, params(top_p=0))[0].tolist() == [1]


def test_min_p_is_relative_to_the_likeliest() -> None:
    values = np.log(np.array([0.1, 0.5, 0.3, 0.1]))
    assert candidates(values, params(min_p=0.59))[0].tolist() == [1, 2]
    assert candidates(values, params(min_p=0.61))[0].tolist() == [1]
    assert candidates(values, params(min_p=1))[0].tolist() == [1]


def test_a_high_temperature_lets_no_unlikely_token_in() -> None:
    values = np.log(np.array([0.6, 0.3, 0.1]))
    sampler = Sampler(params(temperature=100, top_p=0.8))
    assert {sampler.sample(values) for _ in range(200)} == {0, 1}


def test_the_repeat_penalty_counts_the_last_tokens_only() -> None:
    greedy = params(temperature=0, repeat_penalty=2, repeat_last_n=2)
    values = logits(3, 2, -1, -1.5)
    assert Sampler(greedy).sample(values, []) == 0
    assert Sampler(greedy).sample(values, [0]) == 1
    assert Sampler(greedy).sample(values, [0, 2, 3]) == 0
    assert Sampler(greedy).sample(logits(-1, -1.5), [0, 0]) == 1  # a negative one gets more so
    assert Sampler(greedy).sample(values, [0, 10**6]) == 1
    assert values.tolist() == [3, 2, -1, -1.5]


def test_penalties_count_what_occurred() -> None:
    once = params(temperature=0, presence_penalty=1.5)
    assert Sampler(once).sample(logits(3, 2, 1), [0, 0, 0]) == 1
    often = params(temperature=0, frequency_penalty=0.6)
    assert Sampler(often).sample(logits(3, 2, 1), [0]) == 0
    assert Sampler(often).sample(logits(3, 2, 1), [0, 0]) == 1


def test_a_bias_moves_a_token_and_must_name_one() -> None:
    assert Sampler(params(temperature=0, logit_bias=((2, 5.0),))).sample(logits(3, 2, 1)) == 2  # type: ignore[arg-type]
    assert Sampler(params(temperature=0, logit_bias=((0, -10_000.0),))).sample(logits(3, 2, 1)) == 1  # type: ignore[arg-type]
    with pytest.raises(InputError, match="token 3, and the vocabulary has 3"):
        Sampler(params(logit_bias=((3, 1.0),))).sample(logits(3, 2, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0, 1, 100])
def test_only_allowed_tokens_are_drawn(temperature: float) -> None:
    allowed = np.array([False, True, False, True])
    sampler = Sampler(params(temperature=temperature))
    drawn = {sampler.sample(logits(9, 1, 9, 1), [], allowed) for _ in range(200)}
    assert drawn == ({1} if temperature == 0 else {1, 3})
    with pytest.raises(InferenceError, match="no token"):
        sampler.sample(logits(1, 2), [], np.array([False, False]))


def test_log_probabilities_are_the_models_own() -> None:
    values = np.log(np.array([0.1, 0.6, 0.3]))
    own, top = logprobs(values + 5, 0, 2)
    assert own == pytest.approx(np.log(0.1))
    assert top == [(1, pytest.approx(np.log(0.6))), (2, pytest.approx(np.log(0.3)))]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25, 0.09, 0.0225, 0.0025]),
        ({"top_k": 2}, [0.5, 0.3, 0, 0]),
        ({"top_p": 0.9}, [0.5, 0.3, 0.15, 0]),
        ({"min_p": 0.5}, [0.5, 0.3, 0, 0]),
    ],
)
def test_frequencies_follow_probabilities(changes: dict[str, float], expected: list[float]) -> None:
    values = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    sampler = Sampler(params(seed=7, **changes))
    draws = 20_000
    counts = np.bincount([sampler.sample(values) for _ in range(draws)], minlength=4)
    probabilities = np.array(expected) / sum(expected)
    deviation = np.sqrt(draws * probabilities * (1 - probabilities))
    assert (np.abs(counts - draws * probabilities) <= 4 * deviation).all()


def test_the_seed_decides() -> None:
    values = np.zeros(1000, dtype=np.float32)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(params(seed=seed))
        return [sampler.sample(values) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)
    assert draw(0)[:5] == [636, 269, 40, 16, 813]  # PCG64(0): the same on every machine


def test_stops_across_pieces() -> None:
    matcher = StopMatcher(["<end>", "STOP"])
    assert matcher.push("a<") == ("a", False)
    assert matcher.push("en") == ("", False)
    assert matcher.push("t S") == ("<ent ", False)
    assert matcher.push("TOP b") == ("", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_what_was_held_back_comes_in_the_end() -> None:
    matcher = StopMatcher(["abc"])
    assert matcher.push("xab") == ("x", False)
    assert matcher.flush() == "ab"
    assert matcher.flush() == ""
    assert StopMatcher([]).push("abc") == ("abc", False)


def test_the_stop_that_is_complete_first_counts() -> None:
    assert StopMatcher(["abcd", "b"]).push("xabcd") == ("xa", True)
    assert StopMatcher(["c", "abc"]).push("xabc") == ("x", True)


@pytest.mark.parametrize("stops", [[""], ["a", ""], ["x" * 5000], ["a"] * (MAX_STOPS + 1), "text"])
def test_wrong_stops(stops: list[str]) -> None:
    with pytest.raises(InputError, match="stop"):
        StopMatcher(stops)

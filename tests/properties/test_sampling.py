"""Sampling against slow definitions; stop strings against the whole text at once."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from omninfer.sampling import Sampler, SamplingParams, StopMatcher, candidates, penalise

# Few distinct values, so that equal ones are common; far apart, so that rounding decides nothing.
logit_lists = st.lists(st.sampled_from([-7.0, -2.5, -1.0, 0.0, 0.5, 1.75, 3.0]), min_size=1, max_size=12)
fractions = st.sampled_from([0.0, 0.013, 0.11, 0.377, 0.5, 0.731, 0.951, 1.0])
sampling = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.integers(0, 14),
    top_p=fractions,
    min_p=fractions,
    seed=st.integers(0, 2**64 - 1),
)


def kept_slowly(logits: list[float], params: SamplingParams) -> set[int]:
    """The filters by their definitions, in pure Python."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if params.top_k:
        ranked = ranked[: params.top_k]
    weights = [math.exp(logits[i] - logits[ranked[0]]) for i in ranked]
    total = math.fsum(weights)
    if params.top_p < 1:
        count = next(n for n in range(1, len(ranked) + 1) if math.fsum(weights[:n]) >= params.top_p * total)
        ranked, weights = ranked[:count], weights[:count]
    return {i for i, weight in zip(ranked, weights, strict=True) if weight >= params.min_p * weights[0]}


@given(logits=logit_lists, params=sampling)
def test_filters_keep_what_their_definitions_keep(logits: list[float], params: SamplingParams) -> None:
    ids, kept = candidates(np.array(logits, dtype=np.float32), params)
    assert set(ids.tolist()) == kept_slowly(logits, params)
    assert kept.tolist() == [logits[i] for i in ids]


@given(logits=logit_lists, share=st.sampled_from([0.0, 0.2, 0.51, 0.83]))
def test_typical_keeps_the_fewest_that_are_nearest_to_the_entropy(logits: list[float], share: float) -> None:
    ids, _ = candidates(np.array(logits), SamplingParams(top_k=0, top_p=1, min_p=0, typical_p=share))
    weights = [math.exp(value) for value in logits]
    p = [weight / math.fsum(weights) for weight in weights]
    entropy = math.fsum(-one * math.log(one) for one in p)
    distances = [abs(-math.log(one) - entropy) for one in p]
    kept = ids.tolist()
    dropped = set(range(len(logits))) - set(kept)
    assert all(distances[a] <= distances[b] + 1e-9 for a in kept for b in dropped)
    assert not dropped or math.fsum(p[i] for i in kept) > share - 1e-9
    assert math.fsum(p[i] for i in kept[:-1]) <= share + 1e-9


@given(
    logits=logit_lists,
    history=st.lists(st.integers(0, 14), max_size=20),
    last=st.integers(0, 22),
    repeat=st.sampled_from([0.5, 1.0, 1.3]),
    presence=st.sampled_from([-1.0, 0.0, 0.5]),
    frequency=st.sampled_from([-0.25, 0.0, 2.0]),
)
def test_penalties_are_their_definition(
    logits: list[float], history: list[int], last: int, repeat: float, presence: float, frequency: float
) -> None:
    params = SamplingParams(
        repeat_penalty=repeat, repeat_last_n=last, presence_penalty=presence, frequency_penalty=frequency
    )
    recent = history[-last:] if last else []
    expected = []
    for id_, value in enumerate(logits):
        if count := recent.count(id_):
            value = (value / repeat if value > 0 else value * repeat) - count * frequency - presence
        expected.append(value)
    assert np.allclose(penalise(np.array(logits), history, params), expected)


@given(logits=logit_lists, params=sampling)
def test_samples_are_repeatable_and_among_the_kept(logits: list[float], params: SamplingParams) -> None:
    values = np.array(logits, dtype=np.float32)
    first, second = Sampler(params), Sampler(params)
    drawn = [first.sample(values) for _ in range(5)]
    assert drawn == [second.sample(values) for _ in range(5)]
    if params.temperature == 0:
        assert drawn == [logits.index(max(logits))] * 5
    else:
        assert set(drawn) <= kept_slowly(logits, params)


stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4)


@given(stops=stop_lists, pieces=st.lists(st.text(alphabet="abc", max_size=5), max_size=12))
def test_stops_do_not_depend_on_the_pieces(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    ends = [
        (end, end - len(stop)) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)
    ]
    expected = text[: min(ends)[1]] if ends else text

    matcher = StopMatcher(stops)
    shown, stopped = "", False
    for piece in pieces:
        emitted, stopped = matcher.push(piece)
        shown += emitted
        assert expected.startswith(shown)
    assert stopped == bool(ends)
    assert shown + matcher.flush() == expected

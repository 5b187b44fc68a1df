"""A token bucket against its promise: never more than its rate and a burst, never less when asked."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnistore.transfer.rate import PIECE_LEAST, PIECE_MOST, TokenBucket

rates = st.floats(1e3, 1e10)
steps = st.lists(
    st.tuples(st.floats(0, 5), st.integers(1, 2 << 20), st.sampled_from(["pass", "wait", "back"])),
    min_size=1,
    max_size=60,
)


@given(rates, steps)
def test_no_stretch_passes_more_than_rate_and_burst(
    rate: float, script: Sequence[tuple[float, int, str]]
) -> None:
    now = 100.0
    bucket = TokenBucket(rate, now)
    passed: list[tuple[float, int]] = []
    for pause, size, what in script:
        now += pause
        if what == "back" and passed:
            bucket.give_back(passed.pop()[1], now)
            continue
        if what == "wait":
            now += bucket.wait(now)
        if bucket.wait(now) == 0:
            bucket.take(size, now)
            passed.append((now, size))
    for first, (since, _) in enumerate(passed):
        total = 0
        for until, size in passed[first:]:
            # Whatever passed before the last one was paid for when that one passed.
            assert total <= bucket.burst + rate * (until - since) + 1e-6 * rate + len(passed)
            total += size


@given(rates, st.lists(st.integers(1, 2 << 20), min_size=1, max_size=50))
def test_whoever_always_waits_gets_the_whole_rate(rate: float, sizes: list[int]) -> None:
    now = 0.0
    bucket = TokenBucket(rate, now)
    for size in sizes:
        now += bucket.wait(now)
        assert bucket.wait(now) == 0
        bucket.take(size, now)
    assert now == pytest.approx(sum(sizes[:-1]) / rate, rel=1e-6, abs=1e-6 + len(sizes) / rate)


@given(rates, st.floats(0, 1e6), st.floats(0, 1e6))
def test_time_does_not_run_back(rate: float, first: float, second: float) -> None:
    bucket = TokenBucket(rate, first)
    bucket.take(1000, second)
    level = bucket.level
    bucket.wait(min(first, second))
    assert bucket.level == level


@given(rates)
def test_a_piece_is_neither_tiny_nor_unfair(rate: float) -> None:
    piece = TokenBucket(rate, 0.0).piece
    assert PIECE_LEAST <= piece <= PIECE_MOST
    assert piece / rate <= 1.1

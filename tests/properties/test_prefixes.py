"""The table of slots against a plain model: lists of tokens, and memory counted by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omninfer.prefixes import STEP, TAIL, SlotTable, common_prefix
from omnistore.errors import InferenceError, LocalProtocolError

CONTEXT = 4 * STEP
TOKEN = 10
"""Bytes of one token."""


def shared(a: list[int], b: list[int]) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count


class Slots:
    """What real slots would hold, doing what the table says."""

    def __init__(self, count: int, budget: int) -> None:
        self.table = SlotTable(count, context=CONTEXT, token_bytes=TOKEN, budget=budget)
        self.budget = budget
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.most = [0] * count
        """Tokens that a slot held at most since it was empty."""
        self.used = [-1.0] * count
        self.busy: set[int] = set()

    def bytes(self, most: list[int]) -> int:
        return TOKEN * sum(min(CONTEXT, math.ceil(one / STEP) * STEP) for one in most)

    def place(self, prompt: list[int], now: float) -> int | None:
        """Put a prompt in; None where the table says that it does not fit."""
        before = [list(one) for one in self.tokens]
        longest = max(shared(one, prompt[:-1]) for one in before)
        own = self.bytes([len(prompt)])
        taken = self.bytes([most if n in self.busy else 0 for n, most in enumerate(self.most)])
        try:
            placed = self.table.place(prompt, now)
        except InferenceError:
            assert own + taken > self.budget or len(self.busy) == len(self.tokens)
            assert [list(self.table.tokens(n)) for n in range(len(before))] == before
            return None
        assert own + taken <= self.budget and len(self.busy) < len(before)
        assert placed.start == longest, "the longest beginning is never computed again"
        assert placed.slot not in self.busy and not self.busy & {*placed.dropped}
        self._check_evictions(placed.dropped, placed.slot, placed.source is not None, len(prompt))
        for one in placed.dropped:
            self.tokens[one], self.most[one] = [], 0
        if placed.source is not None:
            assert not self.tokens[placed.slot]
            self.tokens[placed.slot] = self.tokens[placed.source][: placed.start]
        assert placed.lost == len(self.tokens[placed.slot]) - placed.start
        kept = self.tokens[placed.slot][: placed.start]
        assert kept == prompt[: placed.start] == self.table.tokens(placed.slot)
        self.tokens[placed.slot] = list(prompt)
        self.most[placed.slot] = max(self.most[placed.slot], len(prompt))
        self.table.append(placed.slot, prompt[placed.start :])
        self.used[placed.slot] = now
        self.busy.add(placed.slot)
        assert self.table.bytes == self.bytes(self.most) <= self.budget
        return placed.slot

    def _check_evictions(self, dropped: tuple[int, ...], slot: int, forked: bool, length: int) -> None:
        """The least recently used went, in order, and with one fewer it would not have fitted."""
        continued = bool(self.tokens[slot]) and slot not in dropped and not forked
        idle = [n for n, most in enumerate(self.most) if most and n not in self.busy]
        order = sorted(idle, key=lambda n: self.used[n])
        assert list(dropped) == [n for n in order if n != slot or not continued][: len(dropped)]
        if dropped:
            most = [0 if n in dropped[:-1] else one for n, one in enumerate(self.most)]
            if continued:
                most[slot] = max(most[slot], length)
                assert self.bytes(most) > self.budget
            else:
                assert self.bytes([*most, length]) > self.budget or all(most)

    def release(self, slot: int, now: float) -> None:
        self.busy.discard(slot)
        self.used[slot] = now
        self.table.release(slot, now)


stems = st.lists(st.sampled_from([0, 40, 300, 500]), min_size=1, max_size=3)


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """Few beginnings, of lengths around the steps, with ends of their own."""
    tokens: list[int] = []
    for number, length in enumerate(draw(stems)):
        tokens += [number + draw(st.integers(0, 1))] * length
    tokens += draw(st.lists(st.integers(7, 9), min_size=1, max_size=TAIL + 4))
    return tokens[:CONTEXT]


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 12),
    st.lists(st.tuples(prompts(), st.booleans(), st.integers(0, 3)), max_size=14),
)
def test_the_table_does_what_plain_lists_do(
    count: int, steps: int, asked: list[tuple[list[int], bool, int]]
) -> None:
    slots = Slots(count, steps * STEP * TOKEN)
    now = 0.0
    for prompt, released, other in asked:
        now += 1
        slot = slots.place(prompt, now)
        now += 1
        if slot is not None and released:
            slots.release(slot, now)
        elif other in slots.busy:
            slots.release(other, now)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_common_prefixes(a: list[int], b: list[int]) -> None:
    assert common_prefix(a, b) == common_prefix(b, a) == shared(a, b)


def table(slots: int = 3, tokens: int = 4 * STEP) -> SlotTable:
    return SlotTable(slots, context=CONTEXT, token_bytes=TOKEN, budget=tokens * TOKEN)


def put(table: SlotTable, prompt: list[int], now: float) -> tuple[int, int, int | None]:
    """Place, feed and release: (slot, start, source)."""
    placed = table.place(prompt, now)
    table.append(placed.slot, prompt[placed.start :])
    table.release(placed.slot, now)
    return placed.slot, placed.start, placed.source


SYSTEM = [1] * 100


def test_a_longer_prompt_continues_its_slot_and_another_end_is_forked() -> None:
    one = table()
    assert put(one, [*SYSTEM, *[2] * 50], 0) == (0, 0, None)
    assert put(one, [*SYSTEM, *[2] * 60], 1) == (0, 150, None)
    assert put(one, [*SYSTEM, *[3] * 50], 2) == (1, 100, 0)
    assert put(one, [*SYSTEM, *[2] * 60, 5], 3) == (0, 160, None)


def test_a_short_end_is_trimmed_away() -> None:
    one = table()
    put(one, [*SYSTEM, *[2] * (TAIL - 1)], 0)
    assert put(one, [*SYSTEM, 3, 3], 1) == (0, 100, None)
    assert one.tokens(0) == [*SYSTEM, 3, 3]


def test_a_slot_in_use_is_forked_and_never_emptied() -> None:
    one = table(slots=2)
    busy = one.place([*SYSTEM, 2], 0)
    one.append(busy.slot, [*SYSTEM, 2])
    other = one.place([*SYSTEM, 3], 1)
    assert (other.slot, other.start, other.source, other.dropped) == (1, 100, 0, ())
    with pytest.raises(InferenceError, match="all 2 are in use"):
        one.place([9], 2)
    one.release(other.slot, 3)
    assert one.place([9], 4).dropped == (1,)


def test_memory_that_is_in_use_is_not_given_twice() -> None:
    one = table(tokens=2 * STEP)
    one.place([1] * (STEP + 1), 0)
    with pytest.raises(InferenceError, match="in use"):
        one.place([2], 1)


def test_a_prompt_that_never_fits_says_what_it_takes() -> None:
    with pytest.raises(InferenceError, match=r"257 tokens take 5120 bytes .* kv_memory is 2560") as refused:
        table(tokens=STEP).place([1] * (STEP + 1), 0)
    assert "kv_memory" in (refused.value.remedy or "")
    with pytest.raises(InferenceError, match=f"do not fit in a context of {CONTEXT}"):
        table().place([1] * (CONTEXT + 1), 0)


def test_what_was_not_placed_can_not_be_fed() -> None:
    one = table()
    with pytest.raises(LocalProtocolError):
        one.append(0, [1])
    one.place([1], 0)
    with pytest.raises(LocalProtocolError):
        one.append(0, [1] * (STEP + 1))


def test_a_forgotten_slot_is_no_beginning_and_its_memory_still_counts() -> None:
    one = table(slots=2)
    put(one, SYSTEM, 0)
    placed = one.place([*SYSTEM, *[2] * 50], 1)
    one.forget(placed.slot)
    one.release(placed.slot, 1)
    assert one.bytes == STEP * TOKEN
    assert put(one, SYSTEM, 2) == (1, 0, None)

"""Whom to leave alone, and for how long."""

from __future__ import annotations

from omnistore.net.pauses import Pauses


def test_a_pause_ends_by_itself_and_the_last_one_counts() -> None:
    pauses = Pauses()
    assert pauses.may("a", 0)
    pauses.pause("a", 10, 0)
    assert [pauses.may("a", now) for now in (0, 9.9, 10)] == [False, False, True]
    assert pauses.may("b", 0)
    pauses.pause("a", 10, 5)
    assert [pauses.may("a", now) for now in (10, 14.9, 15)] == [False, False, True]


def test_all_end_at_once_when_they_are_cleared() -> None:
    pauses = Pauses()
    pauses.pause("a", 10, 0)
    pauses.clear()
    assert pauses.may("a", 0)


def test_what_is_over_takes_no_memory() -> None:
    pauses = Pauses()
    for number in range(1000):
        pauses.pause(str(number), 5, number)
    assert len(pauses._until) == 5

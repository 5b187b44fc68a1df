"""When a relay is needed, and which."""

from __future__ import annotations

import pytest

from omnistore.net.reachability import STATES, State
from omnistore.net.relay_choice import AGAIN, MOST, Change, RelayChoice


def test_two_of_those_known_while_private() -> None:
    choice = RelayChoice()
    assert choice.change("private", [], ["a", "b", "c", "a"], 0) == Change(take=("a", "b"))
    assert choice.change("private", ["a"], ["a", "b", "c"], 0) == Change(take=("b",))
    assert choice.change("private", ["a", "c"], ["a", "b", "c"], 0) == Change()
    assert choice.change("private", [], [], 0) == Change()


@pytest.mark.parametrize("state", STATES)
def test_what_is_held_goes_only_when_it_is_not_needed(state: State) -> None:
    change = RelayChoice().change(state, ["a"], ["a", "b"], 0)
    assert change.drop == (("a",) if state in ("public", "lan") else ())
    assert change.take == (("b",) if state == "private" else ())


def test_who_failed_waits() -> None:
    choice = RelayChoice()
    choice.failed("a", 0)
    assert choice.change("private", [], ["a"], AGAIN - 1) == Change()
    assert choice.change("private", [], ["a", *"bcd"], AGAIN - 1).take == ("b", "c")[:MOST]
    assert choice.change("private", [], ["a"], AGAIN + 1) == Change(take=("a",))

"""What a machine says of itself."""

from __future__ import annotations

import pytest

from omninfer.engines import ENGINES, get_engine
from omninfer.profile import free_memory, measure


@pytest.mark.parametrize("name", ENGINES)
def test_a_speed_is_measured_through_the_engine(name: str) -> None:
    engine = get_engine(name)
    if engine.unavailable() is not None:
        pytest.skip(f"{name}: {engine.unavailable()}")
    assert 1e6 < measure(engine) < 1e13


def test_some_memory_is_never_planned_away() -> None:
    assert free_memory() >= 0

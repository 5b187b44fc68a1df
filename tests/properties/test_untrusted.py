"""Every function that strangers' bytes reach first, on noise and on real inputs that were altered a little.

The same functions, and what must hold of them, as under `make fuzz`, where coverage leads the way.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS


@st.composite
def altered(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Some real inputs in a row, some bytes replaced, left out or put in."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(seeds), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from((0, 1, 1, 2, 8, 100)))
        data[at : at + length] = draw(st.one_of(st.binary(max_size=9), st.just(b"\xff" * length)))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_taken_in_or_refused_and_nothing_else(name: str) -> None:
    target = TARGETS[name]
    seeds = list(target.seeds())
    inputs = st.one_of(st.binary(max_size=200), altered(seeds)) if seeds else st.binary(max_size=400)

    @settings(max_examples=100, deadline=None)
    @given(inputs)
    def holds(data: bytes) -> None:
        target.run(data)

    run: Callable[[], None] = holds
    run()

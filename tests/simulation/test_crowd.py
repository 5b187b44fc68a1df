"""A flash crowd at a size that runs in seconds; `make bench-swarm` prints it for more leechers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from omnistore.testing.crowd import Crowd, CrowdModel

MODEL = CrowdModel(leechers=8, parts=10, links=7)


def test_a_crowd_finishes_within_twice_the_time_of_one_and_spares_the_seeder() -> None:
    alone = Crowd(replace(MODEL, leechers=1), 1).run()
    crowd = Crowd(MODEL, 1).run()
    assert alone.seconds[0] < 1.1 * MODEL.size / MODEL.bandwidth
    assert crowd.seconds[-1] < 2 * alone.seconds[0]
    assert crowd.copies_seeded < 3
    assert crowd.duplicates <= 0.025  # 2 %, and no less than 4 MiB of a model this small


@pytest.mark.slow
def test_a_larger_crowd() -> None:
    model = CrowdModel(leechers=16, parts=32)
    crowd = Crowd(model, 1).run()
    assert crowd.seconds[-1] < 2 * model.size / model.bandwidth
    assert crowd.copies_seeded < 3
    assert crowd.duplicates <= 0.02

"""What is measured of one peer, and what follows: its window and how long it may be silent."""

from __future__ import annotations

import pytest

from omnistore.transfer.window import FLOW, FlowLimits, PeerFlow

MIB = 1 << 20


def fed(
    rate: float, delay: float, seconds: float, start: float = 0.0, flow: PeerFlow | None = None
) -> PeerFlow:
    """What was measured of a peer that gives `rate` bytes a second, each block `delay` after its ask."""
    flow = flow or PeerFlow(start)
    flow.asked(start, idle=True)
    for number in range(int(seconds * rate / MIB)):
        now = start + delay + (number + 1) * MIB / rate
        flow.answered(MIB, now - delay, now)
    return flow


@pytest.mark.parametrize("rate", [1e6, 20e6, 500e6])
def test_the_rate_of_a_peer_is_what_it_gives(rate: float) -> None:
    flow = fed(rate, 0.02, 5)
    assert flow.rate == pytest.approx(rate, rel=0.05)
    assert flow.delay == pytest.approx(0.02)


def test_the_rate_follows_smoothly_and_each_peer_has_its_own() -> None:
    fast, slow = fed(50e6, 0.02, 3), fed(5e6, 0.02, 3)
    assert fast.rate is not None
    assert slow.rate is not None
    assert fast.rate / slow.rate == pytest.approx(10, rel=0.1)
    before = fast.rate
    fed(5e6, 0.02, 0.25, start=10.0, flow=fast)
    assert 5e6 < fast.rate < before, "one slow measurement does not make a slow peer"
    fed(5e6, 0.02, 10, start=20.0, flow=fast)
    assert fast.rate == pytest.approx(5e6, rel=0.1)


def test_a_pause_without_asks_is_no_slow_peer() -> None:
    flow = fed(50e6, 0.02, 2)
    flow.asked(1000.0, idle=True)
    for number in range(10):
        now = 1000.02 + (number + 1) * MIB / 50e6
        flow.answered(MIB, 1000.0, now)
    assert flow.rate == pytest.approx(50e6, rel=0.2)


@pytest.mark.parametrize(
    ("rate", "delay"), [(25e6, 0.05), (100e6, 0.1), (10e6, 0.3), (1e6, 0.2), (125e6, 0.02)]
)
def test_the_window_is_three_times_the_measured_bandwidth_delay_product(rate: float, delay: float) -> None:
    product = 3 * rate * (delay + FLOW.queueing)
    assert fed(rate, delay, 6).window == pytest.approx(max(FLOW.least, product), rel=0.08)


def test_the_window_grows_to_64_mib_and_no_further() -> None:
    assert FLOW.ceiling == 64 * MIB
    assert fed(500e6, 0.2, 3).window == 64 * MIB
    assert fed(200e6, 0.05, 3).window < 64 * MIB
    assert PeerFlow(0.0).window == 2 * MIB


def test_the_window_forgets_what_a_link_was_after_eight_measurements() -> None:
    flow = fed(100e6, 0.05, 3)
    wide = flow.window
    fed(10e6, 0.05, 0.45, start=10.0, flow=flow)
    assert flow.window == wide, "a pause narrows nothing"
    fed(10e6, 0.05, 3, start=20.0, flow=flow)
    assert flow.window == pytest.approx(3 * 10e6 * 0.08, rel=0.1)


def test_silence_is_judged_by_how_long_a_block_should_take() -> None:
    assert PeerFlow(0.0).silence_allowed == 15
    assert fed(100e6, 0.02, 3).silence_allowed == 3
    assert fed(1e6, 0.2, 30).silence_allowed == pytest.approx(6 * (0.2 + MIB / 1e6), rel=0.1)
    assert fed(100e3, 0.2, 100).silence_allowed == 15
    strict = PeerFlow(0.0, FlowLimits(silence_most=2, silence_least=1))
    assert strict.silence_allowed == 2

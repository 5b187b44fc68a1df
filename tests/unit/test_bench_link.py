"""The link of `make bench-wan` is what it says it is."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.bench.link import Line, Link, PathShape

PACKET = bytes(1000)


def line(path: PathShape) -> Line:
    return Line(path, random.Random(path.seed))


def test_packets_leave_at_the_rate_and_come_out_after_the_delay() -> None:
    made = line(PathShape(rate=1e6, delay=0.025))
    for _ in range(3):
        made.take_in(PACKET, now=10.0)
    assert made.due(10.0259) == []
    assert made.next_due == pytest.approx(10.026)
    assert len(made.due(10.0271)) == 2
    assert len(made.due(11.0)) == 1
    assert made.next_due is None
    # After a pause the link is free: nothing is owed for the time before.
    made.take_in(PACKET, now=20.0)
    assert made.next_due == pytest.approx(20.026)


def test_order_is_kept_and_what_is_late_is_counted() -> None:
    made = line(PathShape(rate=1e6))
    for number in range(5):
        made.take_in(bytes([number]), now=0.0)
    assert made.due(1.0) == [bytes([number]) for number in range(5)]
    assert (made.carried.packets, made.carried.late) == (5, 5)


def test_a_full_queue_drops_what_comes_and_empties_again() -> None:
    made = line(PathShape(rate=1e6, queue=0.0105))
    for _ in range(20):
        made.take_in(PACKET, now=0.0)
    # One is being sent, and ten wait at most 10.5 ms.
    assert made.carried.overflowed == 9
    assert len(made.due(1.0)) == 11
    made.take_in(PACKET, now=1.0)
    assert made.carried.overflowed == 9


def test_the_share_that_is_lost_is_the_one_asked_for_and_the_same_again() -> None:
    def lost(seed: int) -> list[bool]:
        made = line(PathShape(rate=1e9, loss=0.01, queue=1e9, seed=seed))
        found = []
        for _ in range(20_000):
            before = made.carried.lost
            made.take_in(PACKET, now=0.0)
            found.append(made.carried.lost > before)
        return found

    first = lost(1)
    assert 150 < sum(first) < 250
    assert lost(1) == first != lost(2)


CONNECT = """
import socket, sys, time
started = time.perf_counter()
try:
    socket.create_connection((sys.argv[1], 9), 5)
except ConnectionRefusedError:
    print(time.perf_counter() - started)
"""


def test_a_real_packet_takes_the_way_there_and_back_and_nothing_is_left_behind() -> None:
    before = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=False).stdout
    try:
        with Link(PathShape(rate=25e6, delay=0.025)) as link:
            command = [*link.inside(1), sys.executable, "-c", CONNECT, link.address(0)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (RuntimeError, OSError) as error:
        pytest.skip(f"no link can be made here (root, iproute2 and TUN needed): {error}")
    assert float(done.stdout) >= 0.05
    assert [way.packets > 0 for way in link.carried] == [True, True]
    after = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=False).stdout
    assert after == before

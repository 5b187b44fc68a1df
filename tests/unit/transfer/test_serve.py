"""The server's queue: fair turns, bounds, cancels, and what ends a stream."""

from __future__ import annotations

from collections import deque

import pytest

from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.errors import LocalProtocolError, RemoteProtocolError
from omnistore.transfer.messages import Cancel, Have, Hello, Missing, Want
from omnistore.transfer.serve import FindHeld, ReadBlocks, ServeLimits, Serving

MIB = 1 << 20


def cid(number: int, codec: int = RAW) -> CID:
    return CID.of_digest(codec, number.to_bytes(32, "big"))


def cids(start: int, count: int) -> tuple[CID, ...]:
    return tuple(cid(n) for n in range(start, start + count))


def opened(serving: Serving, peer: str = "p") -> int:
    found = serving.open(peer)
    assert found is not None
    return found[0]


def asks_of(serving: Serving) -> list[tuple[int, list[int]]]:
    """All jobs there are, as (stream, ask numbers)."""
    jobs = []
    while (job := serving.next(0.0)) is not None:
        assert isinstance(job, ReadBlocks)
        jobs.append((job.stream, [ask for ask, _ in job.asks]))
    return jobs


def all_sent(serving: Serving, most: int = 1000) -> list[tuple[int, list[int]]]:
    """The next jobs, as (stream, ask numbers), each sent as soon as it is read."""
    jobs = []
    while len(jobs) < most and (job := serving.next(0.0)) is not None:
        assert isinstance(job, ReadBlocks)
        jobs.append((job.stream, [ask for ask, _ in job.asks]))
        for _ in job.asks:
            serving.was_read(job.stream, MIB)
            serving.was_sent(job.stream, MIB, 0.0)
    return jobs


def test_the_hello_says_the_limits() -> None:
    assert Serving(ServeLimits(asks=7, queries=3)).open("p") == (1, Hello(7, 3))


def test_streams_take_turns() -> None:
    serving = Serving(ServeLimits(batch=2, ahead=100 * MIB, memory=100 * MIB))
    greedy, modest = opened(serving), opened(serving, "q")
    serving.receive_untrusted(greedy, Want(0, cids(0, 6)))
    serving.receive_untrusted(modest, Want(0, cids(10, 3)))
    assert all_sent(serving) == [
        (greedy, [0, 1]),
        (modest, [0, 1]),
        (greedy, [2, 3]),
        (modest, [2]),
        (greedy, [4, 5]),
    ]


def test_what_was_given_least_goes_first() -> None:
    """A block given to one can be had from that one: the uplink is for what nobody else has."""
    serving = Serving(ServeLimits(batch=1, first=0))
    streams = [opened(serving, f"p{n}") for n in range(3)]
    for stream in streams:
        serving.receive_untrusted(stream, Want(0, cids(0, 3)))
    first = all_sent(serving, 3)
    assert sorted(asks[0] for _, asks in first) == [0, 1, 2]
    assert [stream for stream, _ in first] == streams
    # All were given once: all are equally worth giving again.
    assert sorted(asks[0] for _, asks in all_sent(serving, 3)) == [0, 1, 2]


def test_who_asks_for_nothing_new_lets_others_pass_but_not_for_ever() -> None:
    serving = Serving(ServeLimits(batch=1, first=0, passes=3))
    early, late = opened(serving), opened(serving, "q")
    serving.receive_untrusted(early, Want(0, cids(0, 20)))
    all_sent(serving, 1)
    serving.receive_untrusted(late, Want(0, cids(0, 1)))
    turns = [stream for stream, _ in all_sent(serving, 9)]
    assert turns == [early] * 7 + [late, early]


def test_a_newcomer_gets_nodes_and_its_first_blocks_in_turn() -> None:
    serving = Serving(ServeLimits(batch=1, first=1))
    early, late = opened(serving), opened(serving, "q")
    node = cid(9, DAG_CBOR)
    serving.receive_untrusted(early, Want(0, (node, *cids(0, 20))))
    all_sent(serving, 3)
    serving.receive_untrusted(late, Want(0, (cid(0), node, cid(1))))
    turns = [(stream, asks) for stream, asks in all_sent(serving, 4) if stream == late]
    assert turns[:1] == [(late, [1])]


def test_no_more_is_read_than_leaves_in_half_a_second() -> None:
    serving = Serving(ServeLimits(batch=4))
    streams = [opened(serving, f"p{n}") for n in range(20)]
    for number, stream in enumerate(streams):
        serving.receive_untrusted(stream, Want(0, cids(100 * number, 20)))
    now, sending = 0.0, deque[int]()
    for _ in range(50):
        while (job := serving.next(now)) is not None:
            assert isinstance(job, ReadBlocks)
            for _ in job.asks:
                serving.was_read(job.stream, MIB)
                sending.append(job.stream)
        now += 0.2
        serving.was_sent(sending.popleft(), MIB, now)
    # 5 MB/s: the least that keeps a link busy.
    assert serving.held <= 4 * MIB
    assert serving.held == len(sending) * MIB


def test_those_who_read_nothing_take_no_turns_from_others() -> None:
    serving = Serving(ServeLimits(batch=1))
    deaf = [opened(serving, f"p{n}") for n in range(7)]
    for number, stream in enumerate(deaf):
        serving.receive_untrusted(stream, Want(0, cids(100 * number, 50)))
    while (job := serving.next(0.0)) is not None:
        serving.was_read(job.stream, MIB)
    keen = opened(serving, "keen")
    serving.receive_untrusted(keen, Want(0, cids(5000, 5)))
    assert serving.next(0.1) is None
    jobs = []
    while (job := serving.next(6.0)) is not None:
        jobs.append(job.stream)
        serving.was_read(job.stream, MIB)
        if job.stream == keen:
            serving.was_sent(keen, MIB, 6.0)
    assert jobs.count(keen) == 5


def test_a_requester_that_does_not_read_stops_getting_turns() -> None:
    serving = Serving(ServeLimits(batch=4, ahead=4 * MIB, memory=64 * MIB))
    deaf, keen = opened(serving), opened(serving, "q")
    serving.receive_untrusted(deaf, Want(0, cids(0, 100)))
    assert asks_of(serving) == [(deaf, [0, 1])]
    serving.was_read(deaf, MIB)
    serving.was_read(deaf, MIB)
    assert asks_of(serving) == [(deaf, [2])]
    serving.receive_untrusted(keen, Want(0, cids(0, 2)))
    assert asks_of(serving) == [(keen, [0, 1])]
    serving.was_sent(deaf, MIB, 0.0)
    serving.was_read(deaf, MIB)
    assert asks_of(serving) == [(deaf, [3])]


def test_memory_is_bounded_over_all_streams() -> None:
    serving = Serving(ServeLimits(batch=1, ahead=4 * MIB, memory=6 * MIB))
    streams = [opened(serving, f"p{n}") for n in range(5)]
    for number, stream in enumerate(streams):
        serving.receive_untrusted(stream, Want(0, cids(10 * number, 5)))
    assert [stream for stream, _ in asks_of(serving)] == streams[:3]
    assert serving.held == 6 * MIB
    serving.close(streams[0])
    assert serving.held == 4 * MIB
    assert asks_of(serving) == [(streams[3], [0])]


def test_memory_is_whole_again_when_all_is_sent() -> None:
    serving = Serving()
    stream = opened(serving)
    serving.receive_untrusted(stream, Want(0, cids(0, 50)))
    while (job := serving.next(0.0)) is not None:
        assert isinstance(job, ReadBlocks)
        for ask, _ in job.asks:
            serving.was_read(stream, None if ask % 3 else 1000)
            if ask % 3 == 0:
                serving.was_sent(stream, 1000, 0.0)
    assert serving.held == 0
    assert not serving.owes(stream)


def test_cancelled_asks_are_missing_once() -> None:
    serving = Serving(ServeLimits(batch=1))
    stream = opened(serving)
    serving.receive_untrusted(stream, Want(0, cids(0, 4)))
    assert asks_of(serving)[0] == (stream, [0])
    serving = Serving(ServeLimits(batch=1, ahead=2 * MIB))
    stream = opened(serving)
    serving.receive_untrusted(stream, Want(0, cids(0, 4)))
    assert asks_of(serving) == [(stream, [0])]
    # Ask 0 is being read: it will be sent. The others are answered now.
    assert serving.receive_untrusted(stream, Cancel((0, 2, 3))) == Missing((2, 3))
    serving.was_read(stream, MIB)
    serving.was_sent(stream, MIB, 0.0)
    assert asks_of(serving) == [(stream, [1])]


def test_queries_come_before_blocks() -> None:
    serving = Serving()
    stream = opened(serving)
    serving.receive_untrusted(stream, Want(0, cids(0, 1)))
    serving.receive_untrusted(stream, Have((cid(5, DAG_CBOR),)))
    assert serving.next(0.0) == FindHeld(stream, cid(5, DAG_CBOR))
    assert serving.next(0.0) == ReadBlocks(stream, ((0, cid(0)),))


PART = cid(5, DAG_CBOR)


def test_asked_again_it_answers_when_there_is_news() -> None:
    serving = Serving()
    keen, other = opened(serving), opened(serving, "q")
    for stream in (keen, other):
        serving.receive_untrusted(stream, Have((PART,)))
        assert serving.next(0.0) == FindHeld(stream, PART)
        serving.was_found(stream, PART, b"\x01")
    assert serving.polled == ()
    serving.receive_untrusted(keen, Have((PART,)))
    assert serving.next(0.0) is None
    assert serving.polled == (PART,)
    assert not serving.owes(keen)
    assert serving.news(PART, b"\x01") == []
    assert serving.news(PART, b"\x03") == [keen]
    assert serving.polled == ()
    serving.receive_untrusted(keen, Have((PART,)))
    assert serving.news(PART, b"\x03") == []
    # What was told before the news is told at the next question.
    serving.receive_untrusted(other, Have((PART,)))
    assert serving.news(PART, b"\x03") == [other]
    serving.close(keen)
    assert serving.polled == ()


def test_no_more_parts_are_watched_than_allowed() -> None:
    serving = Serving(ServeLimits(polls=1))
    stream = opened(serving)
    for part in cids(0, 2):
        serving.receive_untrusted(stream, Have((part,)))
        assert serving.next(0.0) == FindHeld(stream, part)
        serving.was_found(stream, part, None)
    serving.receive_untrusted(stream, Have(cids(0, 2)))
    assert serving.polled == cids(0, 1)
    assert serving.next(0.0) == FindHeld(stream, cid(1))


def test_what_was_told_is_remembered_of_a_bounded_number_of_parts() -> None:
    serving = Serving(ServeLimits(queries=2))
    stream = opened(serving)
    for part in cids(0, 5):
        serving.receive_untrusted(stream, Have((part,)))
        serving.next(0.0)
        serving.was_found(stream, part, None)
    assert len(serving._lines[stream].told) == 4
    serving.receive_untrusted(stream, Have(cids(0, 1)))
    assert serving.next(0.0) == FindHeld(stream, cid(0))


def test_a_greedy_requester_does_not_starve_a_modest_one() -> None:
    """A thousand asks beside one at a time: while both ask, both are read for alike."""
    serving = Serving(ServeLimits(ahead=4 * MIB, memory=64 * MIB))
    greedy, modest = opened(serving), opened(serving, "q")
    serving.receive_untrusted(greedy, Want(0, cids(0, 1000)))
    read = {greedy: 0, modest: 0}
    for number in range(100):
        serving.receive_untrusted(modest, Want(number, cids(5000 + number, 1)))
        while (job := serving.next(0.0)) is not None:
            assert isinstance(job, ReadBlocks)
            for _ in job.asks:
                serving.was_read(job.stream, MIB)
                serving.was_sent(job.stream, MIB, 0.0)
                read[job.stream] += 1
            if job.stream == modest:
                break
    assert read[modest] == 100
    assert read[greedy] <= 100 * serving.limits.batch


LIMITS = ServeLimits(asks=10, queries=2)
BROKEN = {
    "asks that do not start at nought": [Want(1, cids(0, 1))],
    "asks that do not follow on": [Want(0, cids(0, 2)), Want(3, cids(0, 1))],
    "asks numbered again": [Want(0, cids(0, 2)), Want(0, cids(0, 1))],
    "too many asks": [Want(0, cids(0, 6)), Want(6, cids(0, 5))],
    "too many queries": [Have((cid(0), cid(1))), Have((cid(2),))],
    "cancels what was never asked": [Cancel((0,))],
    "cancels the next ask": [Want(0, cids(0, 2)), Cancel((2,))],
    "cancels over and over": [Want(0, cids(0, 2)), Cancel((0, 1)), Cancel((0,))],
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_ends_a_stream(fault: str) -> None:
    serving = Serving(LIMITS)
    stream = opened(serving)
    *before, last = BROKEN[fault]
    for message in before:
        serving.receive_untrusted(stream, message)
    with pytest.raises(RemoteProtocolError):
        serving.receive_untrusted(stream, last)


def test_answered_asks_make_room_for_more() -> None:
    serving = Serving(LIMITS)
    stream = opened(serving)
    for first in range(0, 100, 10):
        serving.receive_untrusted(stream, Want(first, cids(0, 10)))
        while serving.next(0.0) is not None:
            pass
        for _ in range(10):
            serving.was_read(stream, None)


def test_streams_are_bounded_per_peer_and_in_all() -> None:
    serving = Serving(ServeLimits(streams=5, streams_per_peer=2))
    first = opened(serving, "a")
    assert serving.open("a") is not None
    assert serving.open("a") is None
    assert serving.open("b") is not None
    serving.close(first)
    assert serving.open("a") is not None
    assert serving.open("c") is not None
    assert serving.open("d") is not None
    assert serving.open("e") is None


def test_a_stream_closed_in_mid_job_is_forgotten() -> None:
    serving = Serving()
    stream = opened(serving)
    serving.receive_untrusted(stream, Want(0, cids(0, 3)))
    assert serving.next(0.0) is not None
    serving.close(stream)
    serving.was_read(stream, MIB)
    serving.was_sent(stream, MIB, 0.0)
    serving.was_found(stream, PART, None)
    assert serving.held == 0
    assert serving.next(0.0) is None
    with pytest.raises(LocalProtocolError):
        serving.receive_untrusted(stream, Want(3, cids(0, 1)))

"""The server's queue: fair turns, bounds, cancels, and what ends a stream."""

from __future__ import annotations

from collections import deque

import pytest

from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.errors import LocalProtocolError, RemoteProtocolError
from omnistore.transfer.messages import Cancel, Error, Have, Hello, Missing, Want
from omnistore.transfer.serve import FindHeld, ReadBlocks, ServeLimits, Serving

MIB = 1 << 20


def cid(number: int, codec: int = RAW) -> CID:
    return CID.of_digest(codec, number.to_bytes(32, "big"))


def cids(start: int, count: int) -> tuple[CID, ...]:
    return tuple(cid(n) for n in range(start, start + count))


def opened(serving: Serving, peer: str = "p") -> int:
    found = serving.open(peer, 0.0)
    assert found is not None
    return found[0]


def sent(serving: Serving, stream: int, size: int, now: float) -> None:
    """A block is handed to the network, in no time."""
    serving.sends(stream, now)
    serving.was_taken(stream, size, now)
    serving.was_sent(stream, size, now)


def beset(serving: Serving, count: int, now: float = 0.0) -> list[int]:
    """Streams of as many peers that ask for much and take in nothing."""
    deaf = [opened(serving, f"deaf{n}") for n in range(count)]
    for number, stream in enumerate(deaf):
        serving.receive_untrusted(stream, Want(0, cids(10_000 + 100 * number, 50)))
    read_all(serving, now)
    return deaf


def read_all(serving: Serving, now: float, reads: int | None = None, most: int = 1000) -> list[int]:
    """Read what there is to read; who took in what: only `reads`."""
    jobs: list[int] = []
    while len(jobs) < most and (job := serving.next(now)) is not None:
        jobs.append(job.stream)
        assert isinstance(job, ReadBlocks)
        for _ in job.asks:
            serving.was_read(job.stream, MIB)
            if job.stream == reads:
                sent(serving, reads, MIB, now)
            elif serving._lines[job.stream].sending_since is None:
                serving.sends(job.stream, now)
    return jobs


def proven(serving: Serving, peer: str = "p") -> int:
    """A stream that has taken in much."""
    stream = opened(serving, peer)
    serving.was_taken(stream, 64 * MIB, 0.0)
    return stream


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
            sent(serving, job.stream, MIB, 0.0)
    return jobs


def test_the_hello_says_the_limits() -> None:
    assert Serving(ServeLimits(asks=7, queries=3)).open("p", 0.0) == (1, Hello(7, 3))


def test_streams_take_turns() -> None:
    serving = Serving(ServeLimits(batch=2, ahead=100 * MIB, memory=100 * MIB))
    greedy, modest = proven(serving), proven(serving, "q")
    serving.receive_untrusted(greedy, Want(0, cids(0, 6)))
    serving.receive_untrusted(modest, Want(0, cids(10, 3)))
    assert all_sent(serving) == [
        (greedy, [0, 1]),
        (modest, [0, 1]),
        (greedy, [2, 3]),
        (modest, [2]),
        (greedy, [4, 5]),
    ]


def test_a_peer_gets_no_more_with_several_streams_than_with_one() -> None:
    serving = Serving(ServeLimits(batch=1, ahead=100 * MIB, memory=100 * MIB))
    many, one = [proven(serving) for _ in range(3)], proven(serving, "q")
    for number, stream in enumerate([*many, one]):
        serving.receive_untrusted(stream, Want(0, cids(10 * number, 4)))
    turns = [stream for stream, _ in all_sent(serving)]
    assert turns[:8] == [many[0], one, many[1], one, many[2], one, many[0], one]
    assert sorted(turns) == sorted([*many, one] * 4)


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
        sent(serving, sending.popleft(), MIB, now)
    # 5 MB/s: the least that keeps a link busy.
    assert serving.held <= 4 * MIB
    assert serving.held == len(sending) * MIB


def test_those_who_read_nothing_take_no_turns_from_others() -> None:
    serving = Serving(ServeLimits(batch=1))
    beset(serving, 7)
    keen = opened(serving, "keen")
    serving.receive_untrusted(keen, Want(0, cids(5000, 5)))
    assert serving.next(0.1) is None
    assert read_all(serving, 6.0, keen).count(keen) == 5
    assert serving.ended() == [], "there is memory for all"


def test_a_fast_server_waits_until_it_can_read_several() -> None:
    serving = Serving(ServeLimits(batch=4))
    stream = proven(serving)
    serving._outflow.sent(100 * MIB, 1.0)
    serving.receive_untrusted(stream, Want(0, cids(0, 500)))
    read_all(serving, 1.0)
    found = []
    for _ in range(40):
        sent(serving, stream, MIB, 1.0)
        while isinstance(job := serving.next(1.0), ReadBlocks):
            found.append(len(job.asks))
            for _ in job.asks:
                serving.was_read(stream, MIB)
    assert set(found) == {4}
    assert len(found) >= 8


def test_few_asks_are_read_at_once_by_a_fast_server_too() -> None:
    serving = Serving(ServeLimits(batch=4))
    stream = proven(serving)
    serving._outflow.sent(100 * MIB, 1.0)
    serving.receive_untrusted(stream, Want(0, cids(0, 3)))
    assert [len(asks) for _, asks in asks_of(serving)] == [3]
    serving.receive_untrusted(stream, Want(3, cids(3, 1)))
    assert [len(asks) for _, asks in asks_of(serving)] == [1]


def test_whoever_took_in_nothing_yet_has_one_block_read_ahead_and_more_as_it_takes_them_in() -> None:
    serving = Serving(ServeLimits(batch=1, ahead=8 * MIB))
    stream = opened(serving)
    serving.receive_untrusted(stream, Want(0, cids(0, 500)))
    ahead = []
    for _ in range(9):
        read_all(serving, 0.0)
        ahead.append(serving.held // MIB)
        sent(serving, stream, MIB, 0.0)
        # As fast as to be worth reading ahead for.
        serving._outflow.sent(100 * MIB, 1.0)
    assert ahead == [1, 2, 3, 4, 5, 6, 7, 7, 7]
    other = opened(serving)
    serving.receive_untrusted(other, Want(0, cids(1000, 500)))
    read_all(serving, 0.0)
    assert serving.held <= serving.limits.ahead, "the share is the peer's, not the stream's"


def test_shares_shrink_as_memory_fills() -> None:
    serving = Serving(ServeLimits(batch=1, ahead=8 * MIB))
    serving._outflow.sent(1000 * MIB, 1.0)
    held = []
    for number in range(40):
        stream = proven(serving, f"p{number}")
        serving.receive_untrusted(stream, Want(0, cids(100 * number, 50)))
        before = serving.held
        read_all(serving, 0.0)
        held.append((serving.held - before) // MIB)
    assert held[:5] == [7, 7, 7, 7, 7]
    assert held == sorted(held, reverse=True)
    assert len([count for count in held if count]) > 12
    assert serving.limits.memory - 3 * MIB < serving.held <= serving.limits.memory


def test_half_of_memory_is_for_those_that_have_shown_that_they_read() -> None:
    serving = Serving()
    serving._outflow.sent(1000 * MIB, 1.0)
    keen = opened(serving, "keen")
    serving.was_taken(keen, MIB, 0.0)
    beset(serving, 60)
    assert 30 * MIB <= serving.held <= 32 * MIB
    serving.receive_untrusted(keen, Want(0, cids(0, 100)))
    read_all(serving, 0.0, keen)
    assert not serving.owes(keen)


def test_where_others_wait_for_memory_the_deafest_is_ended() -> None:
    serving = Serving()
    serving._outflow.sent(1000 * MIB, 1.0)
    deaf = beset(serving, 40)
    late = opened(serving, "late")
    serving.receive_untrusted(late, Want(0, cids(0, 3)))
    for stream in deaf[1:]:
        serving.sends(stream, 1.0)
    assert late not in read_all(serving, 4.0)
    assert serving.ended() == []
    assert serving.next(5.5) is None
    assert serving.ended() == [(deaf[0], "asked and then took in nothing for 6 s, while others waited")]
    assert serving.next(5.5) is None, "one at a time: what it held is not free yet"
    assert serving.ended() == []
    serving.close(deaf[0])
    for now in range(6, 60):
        read_all(serving, now, late)
        for stream, _ in serving.ended():
            serving.close(stream)
        if not serving.owes(late):
            break
    assert not serving.owes(late)
    assert now < 12


def test_nobody_is_ended_where_nobody_waits() -> None:
    serving = Serving()
    serving._outflow.sent(1000 * MIB, 1.0)
    beset(serving, 31)
    assert serving.held >= serving.limits.memory // 2 - MIB
    for now in range(100):
        assert serving.next(float(now)) is None
    assert serving.ended() == []


def test_slow_is_not_deaf() -> None:
    """Each piece counts; and while our own cap holds a piece, nothing does."""
    serving = Serving(ServeLimits(memory=8 * MIB))
    slow, capped, late = (opened(serving, name) for name in ("slow", "capped", "late"))
    for number, stream in enumerate((slow, capped, late)):
        serving.receive_untrusted(stream, Want(0, cids(100 * number, 20)))
    for stream in (slow, capped):
        serving._lines[stream].taken_in = 64 * MIB
    read_all(serving, 0.0, late)
    for now in range(100):
        serving.sends(slow, float(now))
        serving.next(now + 4.0)
        serving.was_taken(slow, 1000, now + 4.0)
        serving.was_taken(capped, 1000, now - 1000.0)
    assert serving.ended() == []


def test_a_requester_that_does_not_read_stops_getting_turns() -> None:
    serving = Serving(ServeLimits(batch=4, ahead=4 * MIB, memory=64 * MIB))
    deaf, keen = proven(serving), proven(serving, "q")
    serving.receive_untrusted(deaf, Want(0, cids(0, 100)))
    assert asks_of(serving) == [(deaf, [0, 1])]
    serving.was_read(deaf, MIB)
    serving.was_read(deaf, MIB)
    assert asks_of(serving) == [(deaf, [2])]
    serving.receive_untrusted(keen, Want(0, cids(0, 2)))
    assert asks_of(serving) == [(keen, [0, 1])]
    sent(serving, deaf, MIB, 0.0)
    serving.was_read(deaf, MIB)
    assert asks_of(serving) == [(deaf, [3])]


def test_memory_is_bounded_over_all_streams() -> None:
    serving = Serving(ServeLimits(batch=1, ahead=4 * MIB, memory=6 * MIB))
    streams = [opened(serving, f"p{n}") for n in range(5)]
    for stream in streams:
        serving.was_taken(stream, MIB, 0.0)
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
                sent(serving, stream, 1000, 0.0)
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
    sent(serving, stream, MIB, 0.0)
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
                sent(serving, job.stream, MIB, 0.0)
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
    if fault.startswith("too many"):
        answer = serving.receive_untrusted(stream, last)
        assert isinstance(answer, Error) and answer.code == "over-asked"
        return
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
    assert serving.open("a", 0.0) is not None
    assert serving.open("a", 0.0) is None
    assert serving.open("b", 0.0) is not None
    serving.close(first)
    assert serving.open("a", 0.0) is not None
    assert serving.open("c", 0.0) is not None
    assert serving.open("d", 0.0) is not None
    assert serving.open("e", 0.0) is None


def test_a_full_house_makes_place_by_those_that_nobody_misses() -> None:
    serving = Serving(ServeLimits(streams=4))
    fetching, waiting = proven(serving, "fetching"), proven(serving, "waiting")
    mute, deaf = opened(serving, "mute"), opened(serving, "deaf")
    for stream, number in ((fetching, 0), (waiting, 100), (deaf, 200)):
        serving.receive_untrusted(stream, Want(0, cids(number, 2)))
    serving._outflow.sent(1000 * MIB, 1.0)
    while (job := serving.next(0.0)) is not None:
        assert isinstance(job, ReadBlocks)
        for _ in job.asks:
            serving.was_read(job.stream, MIB)
    sent(serving, waiting, MIB, 1.0)
    sent(serving, waiting, MIB, 1.0)
    serving.sends(deaf, 1.0)
    sent(serving, fetching, MIB, 2.0)
    assert serving.open("new", 3.0) is None, "everybody may still be of use"
    places = []
    for now in (11.0, 12.0, 13.0, 14.0):
        serving.open(f"new at {now}", now)
        places += [stream for stream, _ in serving.ended()]
        for stream in places:
            serving.close(stream)
    assert places == [mute, deaf, waiting]
    assert serving.streams == 4
    assert serving.owes(fetching)


def test_a_stream_closed_in_mid_job_is_forgotten() -> None:
    serving = Serving()
    stream = opened(serving)
    serving.receive_untrusted(stream, Want(0, cids(0, 3)))
    assert serving.next(0.0) is not None
    serving.close(stream)
    serving.was_read(stream, MIB)
    sent(serving, stream, MIB, 0.0)
    serving.was_found(stream, PART, None)
    assert serving.held == 0
    assert serving.next(0.0) is None
    with pytest.raises(LocalProtocolError):
        serving.receive_untrusted(stream, Want(3, cids(0, 1)))

"""One Yamux connection, without sockets: two cores back to back, and a peer that breaks the rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnistore.errors import LocalProtocolError, RemoteProtocolError
from omnistore.net import frames as f
from omnistore.net.muxing import Muxing
from omnistore.net.stream_state import LIMITS, MuxLimits, StreamState


def drain(core: Muxing) -> bytes:
    """Everything it has to send, batch after batch."""
    out = b""
    while core.has_frames:
        out += b"".join(core.next_frames())
    return out


def headers(pieces: Sequence[bytes | memoryview]) -> list[f.Header]:
    """Of the frames that are to be sent."""
    return [f.unpack_untrusted(piece[: f.HEADER_SIZE]) for piece in pieces if isinstance(piece, bytes)]


def exchange(one: Muxing, other: Muxing, now: float = 0.0) -> None:
    """Carry frames both ways until there are none."""
    while one.has_frames or other.has_frames:
        other.receive_untrusted(drain(one), now)
        one.receive_untrusted(drain(other), now)


def pair(limits: MuxLimits = LIMITS) -> tuple[Muxing, Muxing, StreamState, StreamState]:
    """Two connected cores and the two ends of a stream."""
    one, other = Muxing(True, limits), Muxing(False, limits)
    mine = one.open(0.0)
    exchange(one, other)
    return one, other, mine, other.opened.popleft()


def taken(core: Muxing, stream: StreamState, most: int = 1 << 30, now: float = 0.0) -> bytes:
    return b"".join(core.take(stream, most, now))


def frame(kind: int, flags: int, stream: int, value: int, payload: bytes = b"") -> bytes:
    return f.pack(kind, flags, stream, value) + payload


def test_bytes_and_ends_both_ways() -> None:
    one, other, mine, theirs = pair()
    one.write(mine, memoryview(b"question"))
    one.close(mine)
    exchange(one, other)
    assert taken(other, theirs) == b"question"
    assert theirs.ended
    assert not mine.ended
    other.write(theirs, memoryview(b"answer"))
    other.close(theirs)
    exchange(one, other)
    assert taken(one, mine) == b"answer"
    assert not one.streams
    assert not other.streams
    assert one.buffered == other.buffered == 0


def test_an_end_waits_for_what_is_pending() -> None:
    one, other, mine, theirs = pair()
    pending = one.write(mine, memoryview(bytes(300_000)))
    one.close(mine)
    exchange(one, other)
    assert not pending.done
    assert not theirs.ended
    assert len(taken(other, theirs)) == f.INITIAL_WINDOW
    exchange(one, other)
    assert pending.done
    assert theirs.ended
    assert len(taken(other, theirs)) == 300_000 - f.INITIAL_WINDOW


def test_what_is_withdrawn_does_not_hold_up_the_end() -> None:
    one, other, mine, theirs = pair()
    pending = one.write(mine, memoryview(bytes(300_000)))
    exchange(one, other)
    one.close(mine)
    one.withdraw(mine, pending)
    exchange(one, other)
    assert theirs.ended
    assert theirs.buffered == f.INITIAL_WINDOW


def test_a_reset_drops_what_was_buffered_and_is_told() -> None:
    one, other, mine, theirs = pair()
    one.write(mine, memoryview(b"never read"))
    exchange(one, other)
    one.reset(mine)
    exchange(one, other)
    assert theirs.broken == "the peer reset it"
    assert taken(other, theirs) == b""
    assert other.buffered == 0
    assert not one.streams
    assert not other.streams


def test_what_was_on_its_way_to_a_reset_stream_is_passed_over() -> None:
    one, other, mine, theirs = pair()
    one.write(mine, memoryview(bytes(1000)))
    late = drain(one)
    other.reset(theirs)
    other.receive_untrusted(late[:500], 0.0)
    other.receive_untrusted(late[500:], 0.0)
    other.end_untrusted()
    assert other.buffered == 0


def test_a_lost_connection_leaves_what_had_arrived() -> None:
    one, other, mine, theirs = pair()
    one.write(mine, memoryview(b"in time"))
    exchange(one, other)
    other.lose("the cable was cut")
    assert theirs.broken == "the cable was cut"
    assert taken(other, theirs) == b"in time"


def test_small_writes_overtake_bulk() -> None:
    core = Muxing(True)
    bulk, small = core.open(0.0), core.open(0.0)
    drain(core)
    core.write(bulk, memoryview(bytes(1 << 20)))
    first = headers(core.next_frames())
    core.receive_untrusted(frame(f.WINDOW, 0, bulk.id, 10 << 20), 0.0)
    core.write(small, memoryview(b"now"))
    then = headers(core.next_frames())
    assert [header.stream for header in first] == [bulk.id]
    assert [header.stream for header in then] == [small.id, bulk.id]


def test_bulk_has_its_half_whatever_comes_in_small() -> None:
    core = Muxing(True)
    bulk = core.open(0.0)
    crowd = [core.open(0.0) for _ in range(60)]
    drain(core)
    core.write(bulk, memoryview(bytes(200_000)))
    for stream in crowd:
        core.write(stream, memoryview(bytes(16_000)))
    sent = headers(core.next_frames())
    assert 100_000 < sum(header.value for header in sent if header.stream == bulk.id) <= LIMITS.batch


def test_bulk_streams_take_turns() -> None:
    core = Muxing(True)
    streams = [core.open(0.0) for _ in range(3)]
    drain(core)
    for stream in streams:
        core.receive_untrusted(frame(f.WINDOW, 0, stream.id, 10 << 20), 0.0)
        core.write(stream, memoryview(bytes(400_000)))
    order = [header.stream for _ in range(4) for header in headers(core.next_frames())]
    assert order[:4] == [1, 3, 5, 1]


def test_frames_and_batches_are_bounded() -> None:
    core = Muxing(True)
    stream = core.open(0.0)
    core.receive_untrusted(frame(f.WINDOW, 0, stream.id, 10 << 20), 0.0)
    core.write(stream, memoryview(bytes(5 << 20)))
    while core.has_frames:
        batch = core.next_frames()
        assert all(header.value <= f.MAX_PAYLOAD for header in headers(batch))
        assert sum(map(len, batch)) <= LIMITS.batch + LIMITS.least + 2 * f.HEADER_SIZE


def test_one_write_of_several_pieces_is_one_frame() -> None:
    one, other, mine, theirs = pair()
    one.write(mine, memoryview(b"head"), memoryview(bytes(70_000)), memoryview(b"tail"))
    pieces = one.next_frames()
    assert [header.value for header in headers(pieces)] == [70_008]
    other.receive_untrusted(b"".join(pieces), 0.0)
    assert taken(other, theirs) == b"head" + bytes(70_000) + b"tail"


def fill(core: Muxing, data: bytes, step: int) -> None:
    """Take in `data` as records of at most `step` bytes would bring it: into lent room where it fits."""
    while data:
        record, data = data[:step], data[step:]
        room = core.room(len(record))
        if room is None:
            core.receive_untrusted(record, 0.0)
        else:
            room[: len(record)] = record
            core.filled_untrusted(len(record), 0.0)


def test_what_arrives_goes_into_lent_room_and_the_rest_waits() -> None:
    one, other, mine, theirs = pair()
    sent = bytes(n % 251 for n in range(1000))
    one.write(mine, memoryview(sent))
    lent = memoryview(bytearray(700))
    other.lend(theirs, lent, 0.0)
    fill(other, drain(one), 100)
    assert other.reclaim(theirs) == 0
    assert bytes(lent) + taken(other, theirs) == sent
    assert other.buffered == 0


def test_one_room_after_the_other_is_filled_while_there_is_one() -> None:
    one, other, mine, theirs = pair()
    sent = bytes(n % 251 for n in range(1000))
    one.write(mine, memoryview(sent))
    rooms = [memoryview(bytearray(size)) for size in (4, 300, 1, 500)]
    rest = iter(rooms[1:])
    other.touched.clear()
    other.lend(theirs, rooms[0], 0.0, lambda: next(rest, None))
    data = drain(one)
    fill(other, data[: f.HEADER_SIZE + 3], 1000)
    assert theirs not in other.touched
    fill(other, data[f.HEADER_SIZE + 3 :], 100)
    assert theirs in other.touched, "a room is full: its owner hears of it"
    assert other.reclaim(theirs) == 0
    assert b"".join(rooms) + taken(other, theirs) == sent
    assert other.buffered == 0


def test_a_reader_that_lent_room_hears_when_it_is_full_or_time_passed() -> None:
    one, other, mine, theirs = pair()
    other.touched.clear()
    for now, written, heard in ((1.0, 100, False), (1.0 + LIMITS.prompt, 100, True), (1.0, 824, True)):
        if not heard or theirs.room is None:
            other.lend(theirs, memoryview(bytearray(1024)), now)
        one.write(mine, memoryview(bytes(written)))
        other.receive_untrusted(drain(one), now)
        assert (theirs in other.touched) == heard
        other.touched.clear()
    assert other.reclaim(theirs) == 0


def test_a_window_is_not_opened_for_what_is_still_to_come_of_a_frame() -> None:
    one, other, mine, theirs = pair()
    one.write(mine, memoryview(bytes(f.INITIAL_WINDOW)))
    data = drain(one)
    other.lend(theirs, memoryview(bytearray(f.INITIAL_WINDOW)), 0.0)
    fill(other, data[: f.INITIAL_WINDOW // 4], 1000)
    assert not other.has_frames
    fill(other, data[f.INITIAL_WINDOW // 4 :], 1000)
    opened = sum(header.value for header in headers([drain(other)]))
    assert f.INITIAL_WINDOW // 2 <= opened == theirs.receive_window <= f.INITIAL_WINDOW


def test_nothing_goes_into_room_that_was_reclaimed_or_whose_stream_was_reset() -> None:
    one, other, mine, theirs = pair()
    one.write(mine, memoryview(bytes(1000)))
    data = drain(one)
    other.lend(theirs, memoryview(bytearray(1000)), 0.0)
    fill(other, data[:112], 112)
    assert other.reclaim(theirs) == 900
    assert other.room(100) is None
    other.lend(theirs, memoryview(bytearray(1000)), 0.0)
    other.reset(theirs)
    assert other.room(100) is None
    fill(other, data[112:], 100)
    other.end_untrusted()


def test_a_window_opens_by_halves() -> None:
    one, other, mine, theirs = pair()
    one.write(mine, memoryview(bytes(f.INITIAL_WINDOW)))
    exchange(one, other)
    taken(other, theirs, f.INITIAL_WINDOW // 2 - 1)
    assert not other.has_frames
    taken(other, theirs, 1)
    assert f.unpack_untrusted(drain(other)) == f.Header(f.WINDOW, 0, mine.id, f.INITIAL_WINDOW // 2)


def transfer(one: Muxing, other: Muxing, mine: StreamState, theirs: StreamState, step: float) -> None:
    """Send 64 MiB, each half window taking `step` seconds."""
    now, left = 1.0, 64 << 20
    pending = one.write(mine, memoryview(bytes(left)))
    while not pending.done or left:
        exchange(one, other, now)
        left -= len(taken(other, theirs, theirs.target // 2, now))
        now += step


def test_a_window_grows_while_it_is_used_fast_and_within_bounds() -> None:
    one, other, mine, theirs = pair(replace(LIMITS, window=4 << 20))
    other.ping(0.0)
    exchange(one, other, 0.5)
    assert other.round_trip == 0.5
    transfer(one, other, mine, theirs, 0.5)
    assert theirs.target == 4 << 20


def test_a_window_stays_when_it_is_used_slowly() -> None:
    one, other, mine, theirs = pair()
    other.ping(0.0)
    exchange(one, other, 0.001)
    transfer(one, other, mine, theirs, 1.0)
    assert theirs.target == f.INITIAL_WINDOW


@pytest.mark.parametrize(("share", "grows"), [(0.9, True), (1.1, False)])
def test_on_a_very_short_path_a_window_grows_to_what_bridges_a_pause(share: float, grows: bool) -> None:
    one, other, mine, theirs = pair()
    other.ping(0.0)
    exchange(one, other, 0.0001)
    transfer(one, other, mine, theirs, share * LIMITS.growth_least)
    assert theirs.target == (LIMITS.bridge if grows else f.INITIAL_WINDOW)


@pytest.mark.parametrize(("trip", "grows"), [(LIMITS.far / 2, False), (LIMITS.far, True)])
def test_on_a_long_path_a_window_grows_within_more_round_trips(trip: float, grows: bool) -> None:
    one, other, mine, theirs = pair()
    other.ping(0.0)
    exchange(one, other, trip)
    # Half of each window takes longer than a short path allows, and less than a long one does.
    transfer(one, other, mine, theirs, trip * (LIMITS.growth_trips + LIMITS.growth_trips_far) / 2)
    assert (theirs.target > f.INITIAL_WINDOW) is grows


def test_all_windows_together_grow_by_the_budget_at_most() -> None:
    one, other, mine, theirs = pair(replace(LIMITS, growth=1 << 20))
    other.ping(0.0)
    exchange(one, other, 0.5)
    transfer(one, other, mine, theirs, 0.1)
    assert theirs.target == f.INITIAL_WINDOW + (1 << 20)
    one.reset(mine)
    exchange(one, other)
    mine = one.open(0.0)
    exchange(one, other)
    theirs = other.opened.popleft()
    transfer(one, other, mine, theirs, 0.1)
    assert theirs.target == f.INITIAL_WINDOW + (1 << 20)


def test_a_peer_opens_no_more_streams_than_it_may() -> None:
    core = Muxing(False, replace(LIMITS, inbound=2))
    core.receive_untrusted(b"".join(frame(f.WINDOW, f.SYN, n, 0) for n in (1, 3, 5)), 0.0)
    assert [stream.id for stream in core.opened] == [1, 3]
    answers = drain(core)
    last = f.unpack_untrusted(answers[-12:])
    assert (last.flags, last.stream) == (f.RST, 5)
    core.receive_untrusted(frame(f.WINDOW, f.RST, 1, 0) + frame(f.WINDOW, f.SYN, 7, 0), 0.0)
    assert set(core.streams) == {3, 7}


def test_streams_that_the_peer_never_ends_are_given_up() -> None:
    one, other, mine, _ = pair()
    one.close(mine)
    exchange(one, other)
    one.sweep(LIMITS.linger)
    assert one.streams
    one.sweep(LIMITS.linger + 1)
    assert not one.streams
    exchange(one, other)
    assert not other.streams


def test_going_away_is_heard() -> None:
    one, other, _, _ = pair()
    one.go_away(f.PROTOCOL_ERROR)
    exchange(one, other)
    assert other.gone_away == f.PROTOCOL_ERROR


def test_stream_numbers_run_out() -> None:
    core = Muxing(True)
    core._next_id = (1 << 32) - 1
    core.open(0.0)
    with pytest.raises(LocalProtocolError, match="used up"):
        core.open(0.0)


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "version": (lambda: b"\1" + bytes(11), "version 1"),
    "type": (lambda: frame(4, 0, 1, 0), "unknown type 4"),
    "flags": (lambda: frame(f.DATA, 16, 1, 0), "unknown flags 0x10"),
    "data on stream 0": (lambda: frame(f.DATA, 0, 0, 0), "type 0 on stream 0"),
    "ping on a stream": (lambda: frame(f.PING, f.SYN, 1, 0), "type 2 on stream 1"),
    "over its window": (lambda: frame(f.DATA, 0, 1, f.INITIAL_WINDOW + 1), "whose window has 262144"),
    "window over all bounds": (lambda: frame(f.WINDOW, 0, 1, 0xFFFFFFFF), "beyond all bounds"),
    "data after its end": (
        lambda: frame(f.DATA, f.FIN, 1, 1, b"x") + frame(f.DATA, 0, 1, 1, b"y"),
        "after its end",
    ),
    "our number": (lambda: frame(f.WINDOW, f.SYN, 2, 0), "ours to give"),
    "opened twice": (lambda: frame(f.WINDOW, f.SYN, 1, 0), "stream 1 twice"),
    "never opened": (lambda: frame(f.DATA, 0, 9, 4), "stream 9, which nobody opened"),
    "never opened by us": (lambda: frame(f.DATA, 0, 2, 4), "stream 2, which nobody opened"),
    "unread answers": (lambda: frame(f.PING, f.SYN, 0, 7) * 6000, "faster than it takes them"),
    "huge frame for nobody": (
        lambda: frame(f.WINDOW, f.RST, 1, 0) + frame(f.DATA, 0, 1, 0xFFFFFFFF),
        "no window is as large",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_rule_is_named(fault: str) -> None:
    make, match = BROKEN[fault]
    _, core, _, _ = pair()
    drain(core)
    with pytest.raises(RemoteProtocolError, match=match):
        core.receive_untrusted(make(), 0.0)


def test_a_peer_can_not_make_us_buffer_without_end() -> None:
    core = Muxing(False, replace(LIMITS, buffered=1 << 20))
    flood = b"".join(
        frame(f.DATA, f.SYN, number, f.INITIAL_WINDOW, bytes(f.INITIAL_WINDOW)) for number in (1, 3, 5, 7)
    )
    core.receive_untrusted(flood, 0.0)
    assert core.buffered == 1 << 20
    with pytest.raises(RemoteProtocolError, match="buffer over"):
        core.receive_untrusted(frame(f.DATA, f.SYN, 9, 1, b"x"), 0.0)


@pytest.mark.parametrize("cut", [1, 11, 12, 20])
def test_a_truncated_frame_is_named(cut: int) -> None:
    _, core, _, _ = pair()
    core.receive_untrusted(frame(f.DATA, 0, 1, 100, bytes(100))[:cut], 0.0)
    with pytest.raises(RemoteProtocolError, match="middle of a frame"):
        core.end_untrusted()


class Rooms:
    """One piece of memory, lent in rooms that grow."""

    def __init__(self, size: int) -> None:
        self._memory = memoryview(bytearray(size))
        self._at = 0
        self.room = self._memory[:4]

    def more(self) -> memoryview | None:
        self._at += len(self.room)
        self.room = self._memory[self._at : 8 * self._at]
        return self.room or None

    def filled(self, left: int) -> bytes:
        """What was put there, when so much was left of the last room."""
        return bytes(self._memory[: self._at + len(self.room) - left])


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["open", "write", "take", "lend", "close", "reset", "carry"]), st.integers(0, 2**20)
    ),
    max_size=60,
)


@given(ACTIONS, st.lists(st.integers(1, 5000), max_size=20))
@settings(deadline=None)
def test_two_cores_never_accuse_each_other(actions: list[tuple[str, int]], cuts: list[int]) -> None:
    """Whatever both do, in whatever pieces it arrives; and every byte comes out in order."""
    cores = (Muxing(True), Muxing(False))
    ends: list[tuple[Muxing, StreamState]] = []
    sent: dict[tuple[bool, int], int] = {}
    got: dict[tuple[bool, int], int] = {}
    rooms: dict[tuple[bool, int], Rooms] = {}

    def check(side: tuple[bool, int], data: bytes) -> None:
        begin = got.get(side, 0)
        assert data == bytes((begin + n) % 251 for n in range(len(data)))
        got[side] = begin + len(data)

    def carry(source: Muxing, target: Muxing) -> None:
        data = drain(source)
        for cut in cuts:
            fill(target, data[:cut], cut)
            data = data[cut:]
        fill(target, data, 65_519)
        target.end_untrusted()
        ends.extend((target, stream) for stream in target.opened)
        target.opened.clear()

    for action, number in actions:
        if action == "carry":
            carry(*(cores if number % 2 else cores[::-1]))
        elif action == "open":
            core = cores[number % 2]
            ends.append((core, core.open(0.0)))
        elif ends:
            core, stream = ends[number % len(ends)]
            side = (core is cores[0], stream.id)
            if action == "write" and not (stream.closing or stream.broken):
                begin = sent.get(side, 0)
                data = memoryview(bytes((begin + n) % 251 for n in range(number % 70_000)))
                if data:
                    core.write(stream, data[: number % 5], data[number % 5 :])
                sent[side] = begin + number % 70_000
            elif action == "take" and side in rooms:
                check(side, rooms.pop(side).filled(core.reclaim(stream)))
            elif action == "take":
                check(side, taken(core, stream, number))
            elif action == "lend" and side not in rooms and not stream.received:
                lent = rooms[side] = Rooms(1 + number % 100_000)
                core.lend(stream, lent.room, 0.0, lent.more if number % 3 else None)
            elif action == "close":
                core.close(stream)
            elif action == "reset":
                core.reset(stream)
    for _ in range(3):
        carry(*cores)
        carry(*cores[::-1])
    for core in cores:
        assert core.buffered == sum(stream.buffered for stream in core.streams.values())


HEADERS = st.builds(
    f.pack,
    st.integers(0, 4),
    st.integers(0, 17),
    st.integers(0, 6),
    st.one_of(st.integers(0, 40), st.just(0xFFFFFFFF)),
)


@given(st.lists(st.one_of(HEADERS, st.binary(max_size=40)), max_size=40))
def test_anything_is_taken_in_or_named(pieces: list[bytes]) -> None:
    _, core, _, _ = pair()
    try:
        for piece in pieces:
            core.receive_untrusted(piece, 0.0)
        core.end_untrusted()
    except RemoteProtocolError:
        return
    assert core.buffered == sum(stream.buffered for stream in core.streams.values())
    drain(core)

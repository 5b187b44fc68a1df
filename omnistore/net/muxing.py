"""The state of one Yamux connection (pure): streams, windows, what is sent next.

Plaintext goes in through `receive_untrusted`, frames to be sent come out of `next_frames`; time comes
as an argument. What a peer may do is bounded: streams, bytes buffered, answers owed. Whatever breaks
the protocol raises `RemoteProtocolError`, after which the connection is of no more use.

What arrives lies where it was decrypted until somebody takes it; a reader that waits may lend the memory
that it is to lie in. Order of sending: control frames, then streams with little to send, then the others in
turns of one frame, so that a small request never waits behind a bulk transfer. Windows begin at what the
protocol says and grow while a stream uses half of one within a few round trips, as far as the
connection's budget goes. Deliberately no socket, no tasks: `yamux` has those.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from omnistore.errors import LocalProtocolError, RemoteProtocolError
from omnistore.net import frames as f
from omnistore.net.interface import NextRoom
from omnistore.net.stream_state import LIMITS, MuxLimits, Pending, StreamState

_CONTROL_BATCH: Final = 4096 * f.HEADER_SIZE
"""Bytes of control frames sent in one go: they fit a record."""


class Muxing:
    """The core of one connection."""

    def __init__(self, initiator: bool, limits: MuxLimits = LIMITS) -> None:
        self.limits = limits
        self.streams: dict[int, StreamState] = {}
        self.opened: deque[StreamState] = deque()
        """Streams of the peer that nobody accepted yet."""
        self.touched: set[StreamState] = set()
        """Streams whose reader has something to look at; also whoever waits, where one is over."""
        self.written: set[StreamState] = set()
        """Streams of which something was put into a frame to its end: a writer waits for that."""
        self.round_trip: float | None = None
        """The shortest one measured, in seconds."""
        self.gone_away: int | None = None
        """Why the peer wants no more of us."""
        self.buffered = 0
        """Bytes received and not taken."""
        self._initiator = initiator
        self._next_id = 1 if initiator else 2
        self._highest = 0
        """The last stream that the peer opened."""
        self._inbound = 0
        self._grown = 0
        self._head = bytearray()
        self._body = 0
        """Bytes missing of the data frame being received."""
        self._into: StreamState | None = None
        self._flags = 0
        self._control = bytearray()
        self._small: deque[StreamState] = deque()
        self._bulk: deque[StreamState] = deque()
        self._pings: dict[int, float] = {}
        self._ping_id = 0

    @property
    def has_frames(self) -> bool:
        """Whether `next_frames` has something."""
        return bool(self._control or self._small or self._bulk)

    # --- what our side does -----------------------------------------------------------------

    def open(self, now: float) -> StreamState:
        """A new stream of ours. Raises `LocalProtocolError` when the numbers are used up."""
        if self._next_id >= 1 << 32:
            raise LocalProtocolError("all stream numbers of this connection are used up")
        stream = StreamState(self._next_id, opened_at=now, active_at=now)
        self._next_id += 2
        self.streams[stream.id] = stream
        self._control += f.pack(f.WINDOW, f.SYN, stream.id, 0)
        return stream

    def write(self, stream: StreamState, *data: memoryview) -> Pending:
        """Queue bytes, not none; they must stay as they are until the result is `done` or `withdraw`n."""
        pending = Pending(deque(data), sum(map(len, data)))
        stream.pending.append(pending)
        self._queue(stream)
        return pending

    def withdraw(self, stream: StreamState, pending: Pending) -> None:
        """Do not send what is left of it: frames are whole all the same."""
        if not pending.done and pending in stream.pending:
            stream.pending.remove(pending)
            pending.done = True
            if stream.closing and not stream.pending:
                self._finish(stream)

    def take(self, stream: StreamState, most: int, now: float) -> list[memoryview]:
        """At most `most` received bytes, as they lie; opens the window as they go."""
        found: list[memoryview] = []
        while most and stream.received:
            piece = stream.received[0]
            if len(piece) > most:
                stream.received[0] = piece[most:]
                piece = piece[:most]
            else:
                stream.received.popleft()
            found.append(piece)
            most -= len(piece)
            stream.buffered -= len(piece)
            if not stream.forgotten:
                self.buffered -= len(piece)
        stream.active_at = now
        if not (stream.ended or stream.broken):
            self._open_window(stream, now)
        return found

    def lend(self, stream: StreamState, room: memoryview, now: float, more: NextRoom | None = None) -> None:
        """Have what arrives next put into `room`, when all that was received is taken; `reclaim` follows.

        What arrives once that is full goes where `more` says.
        """
        stream.room, stream.more, stream.lent_at = room, more, now

    def reclaim(self, stream: StreamState) -> int:
        """Nothing is put there from now on; the bytes left of the room that was lent last."""
        left, stream.room, stream.more = len(stream.room or b""), None, None
        return left

    def close(self, stream: StreamState) -> None:
        """Send no more than is pending."""
        if not (stream.closing or stream.broken):
            stream.closing = True
            if not stream.pending:
                self._finish(stream)

    def reset(self, stream: StreamState) -> None:
        """Abort both directions."""
        if not (stream.broken or (stream.closed and stream.ended)):
            self._control += f.pack(f.WINDOW, f.RST, stream.id, 0)
        self._break(stream, "it was reset here")
        stream.received.clear()
        stream.buffered = 0

    def ping(self, now: float) -> None:
        """Measure a round trip."""
        self._ping_id = (self._ping_id + 1) & 0xFFFFFFFF
        self._pings[self._ping_id] = now
        while len(self._pings) > 8:
            del self._pings[next(iter(self._pings))]
        self._control += f.pack(f.PING, f.SYN, 0, self._ping_id)

    def go_away(self, reason: int) -> None:
        """Say farewell."""
        self._control += f.pack(f.GO_AWAY, 0, 0, reason)

    def sweep(self, now: float) -> None:
        """Give up streams that we closed and the peer never did."""
        for stream in list(self.streams.values()):
            if stream.closed and now - stream.active_at > self.limits.linger:
                self.reset(stream)

    def lose(self, why: str) -> None:
        """The connection is gone, and every stream with it."""
        for stream in list(self.streams.values()):
            self._break(stream, why)
        self._control.clear()

    # --- what leaves ------------------------------------------------------------------------

    def next_frames(self) -> list[bytes | memoryview]:
        """What to send now, headers and payloads in order: a batch at most, nothing if there is nothing."""
        found: list[bytes | memoryview] = []
        if self._control:
            found.append(bytes(self._control[:_CONTROL_BATCH]))
            del self._control[:_CONTROL_BATCH]
        budget = self.limits.batch
        # Half a batch is the bulk's, whatever comes in small.
        reserved = budget // 2 if self._bulk else 0
        while budget > 0 and (self._small or self._bulk):
            small = self._small and (budget > reserved or not self._bulk)
            most = max(budget, self.limits.least)
            budget -= self._send_from((self._small if small else self._bulk).popleft(), found, most)
        return found

    def _send_from(self, stream: StreamState, found: list[bytes | memoryview], most: int) -> int:
        """Take one frame from a stream; its size."""
        stream.queued = False
        if stream.broken or not stream.pending:
            return 0
        pending = stream.pending[0]
        size = min(pending.left, stream.send_window, most, f.MAX_PAYLOAD)
        found.append(f.pack(f.DATA, 0, stream.id, size))
        pending.move(size, found)
        stream.send_window -= size
        if not pending.left:
            stream.pending.popleft()
            pending.done = True
            self.written.add(stream)
            if stream.closing and not stream.pending:
                self._finish(stream)
        self._queue(stream)
        return size + f.HEADER_SIZE

    def _queue(self, stream: StreamState) -> None:
        if stream.queued or not stream.pending or stream.send_window <= 0 or stream.broken:
            return
        stream.queued = True
        total = sum(pending.left for pending in stream.pending)
        (self._small if total <= self.limits.small else self._bulk).append(stream)

    def _finish(self, stream: StreamState) -> None:
        stream.closed = True
        self._control += f.pack(f.WINDOW, f.FIN, stream.id, 0)
        self._forget_if_over(stream)

    # --- what arrives -----------------------------------------------------------------------

    def receive_untrusted(self, plaintext: bytes | memoryview, now: float) -> None:
        """Take in what one record carried. Raises `RemoteProtocolError`: end the connection."""
        view = memoryview(plaintext)
        while view:
            if self._body:
                piece = view[: self._body]
                view = view[len(piece) :]
                self._payload(piece, now)
                continue
            if not self._head and len(view) >= f.HEADER_SIZE:
                head: bytes | memoryview = view[: f.HEADER_SIZE]
                view = view[f.HEADER_SIZE :]
            else:
                lacking = f.HEADER_SIZE - len(self._head)
                self._head += view[:lacking]
                view = view[lacking:]
                if len(self._head) < f.HEADER_SIZE:
                    return
                head = bytes(self._head)
                self._head.clear()
            self._frame(f.unpack_untrusted(head), now)

    def end_untrusted(self) -> None:
        """The connection ended here. Raises `RemoteProtocolError` if that cut a frame."""
        if self._head or self._body:
            raise RemoteProtocolError("the connection ended in the middle of a frame")

    def _frame(self, header: f.Header, now: float) -> None:
        if header.kind == f.PING:
            self._pinged(header, now)
        elif header.kind == f.GO_AWAY:
            self.gone_away = header.value
        else:
            self._for_stream(header, now)

    def _pinged(self, header: f.Header, now: float) -> None:
        if header.flags & f.SYN:
            self._owe(f.pack(f.PING, f.ACK, 0, header.value))
            return
        sent = self._pings.pop(header.value, None)
        if sent is not None:
            took = now - sent
            self.round_trip = took if self.round_trip is None else min(took, self.round_trip)

    def _for_stream(self, header: f.Header, now: float) -> None:
        stream = self._opened(header, now) if header.flags & f.SYN else self.streams.get(header.stream)
        if stream is None:
            self._check_known(header)
        if header.kind == f.WINDOW:
            if stream is not None:
                self._window_opened(stream, header.value)
                self._flagged(stream, header.flags)
            return
        if stream is not None:
            if stream.ended and header.value:
                raise RemoteProtocolError(f"sent data on stream {stream.id} after its end")
            if header.value > stream.receive_window:
                raise RemoteProtocolError(
                    f"sent {header.value} bytes on stream {stream.id},"
                    f" whose window has {stream.receive_window}"
                )
            if self.buffered + header.value > self.limits.buffered:
                raise RemoteProtocolError(f"made us buffer over {self.limits.buffered} bytes")
            stream.receive_window -= header.value
            stream.active_at = now
        elif header.value > self.limits.window:
            raise RemoteProtocolError(f"a frame of {header.value} bytes; no window is as large")
        self._into, self._body, self._flags = stream, header.value, header.flags
        if not header.value and stream is not None:
            self._flagged(stream, header.flags)

    def room(self, least: int) -> memoryview | None:
        """Where a reader wants what comes next, if it lent as much as `least` and so much is to come."""
        stream = self._into
        if self._body < least or stream is None or stream.room is None or stream.broken:
            return None
        return stream.room[: self._body] if len(stream.room) >= least > 0 else None

    def filled_untrusted(self, size: int, now: float) -> None:
        """They are there. Raises `RemoteProtocolError`."""
        stream = self._into
        assert stream is not None, "room was given for it"
        self._body -= size
        self._filled(stream, size, now)
        if not self._body:
            self._flagged(stream, self._flags)

    def _check_known(self, header: f.Header) -> None:
        """What was sent before the peer knew that we had ended a stream is to be expected."""
        ours = header.stream % 2 == self._initiator
        if header.stream >= self._next_id if ours else header.stream > self._highest:
            raise RemoteProtocolError(f"a frame for stream {header.stream}, which nobody opened")

    def _opened(self, header: f.Header, now: float) -> StreamState | None:
        if header.stream % 2 == self._initiator:
            raise RemoteProtocolError(f"opened stream {header.stream}, whose number is ours to give")
        if header.stream in self.streams:
            raise RemoteProtocolError(f"opened stream {header.stream} twice")
        self._highest = max(self._highest, header.stream)
        if self._inbound >= self.limits.inbound:
            self._owe(f.pack(f.WINDOW, f.RST, header.stream, 0))
            return None
        stream = StreamState(header.stream, opened_at=now, active_at=now)
        self._inbound += 1
        self.streams[stream.id] = stream
        self.opened.append(stream)
        self._owe(f.pack(f.WINDOW, f.ACK, stream.id, 0))
        return stream

    def _payload(self, piece: memoryview, now: float) -> None:
        self._body -= len(piece)
        stream = self._into
        # A reset in the middle of a frame: the rest of it is still to be passed over.
        if stream is None or stream.broken:
            return
        while piece and stream.room:
            fits = min(len(piece), len(stream.room))
            stream.room[:fits] = piece[:fits]
            self._filled(stream, fits, now)
            piece = piece[fits:]
        if piece:
            stream.received.append(piece)
            stream.buffered += len(piece)
            self.buffered += len(piece)
            self.touched.add(stream)
        if not self._body:
            self._flagged(stream, self._flags)

    def _filled(self, stream: StreamState, size: int, now: float) -> None:
        """So much of the lent room has its bytes: they count as taken."""
        assert stream.room is not None, "it was just written to"
        stream.room = stream.room[size:]
        stream.active_at = now
        self._open_window(stream, now)
        if not stream.room and stream.more is not None:
            stream.room = stream.more()
            self.touched.add(stream)
        # A reader wants all of it, and would only come back for more: it is told of less when time passes.
        elif not stream.room or now - stream.lent_at >= self.limits.prompt:
            self.touched.add(stream)

    def _window_opened(self, stream: StreamState, by: int) -> None:
        stream.send_window += by
        if stream.send_window >= 1 << 32:
            raise RemoteProtocolError(f"opened the window of stream {stream.id} beyond all bounds")
        if stream.pending:
            self._queue(stream)

    def _flagged(self, stream: StreamState, flags: int) -> None:
        if flags & f.RST:
            self._break(stream, "the peer reset it")
            stream.received.clear()
            stream.buffered = 0
        elif flags & f.FIN:
            stream.ended = True
            self.touched.add(stream)
            self._forget_if_over(stream)

    def _owe(self, answer: bytes) -> None:
        self._control += answer
        if len(self._control) > self.limits.control:
            raise RemoteProtocolError("asks for answers faster than it takes them")

    def _open_window(self, stream: StreamState, now: float) -> None:
        """Let the peer send again once half of the window was used; small grants make small frames."""
        due = stream.target - stream.receive_window - stream.buffered
        if stream is self._into:
            due -= self._body
        if due * 2 < stream.target:
            return
        limits, trip = self.limits, self.round_trip
        trips = limits.growth_trips if trip is None or trip < limits.far else limits.growth_trips_far
        least = limits.growth_least if stream.target < limits.bridge else 0.0
        fast = trip is not None and now - stream.opened_at < max(trips * trip, least)
        more = min(stream.target, self.limits.window - stream.target, self.limits.growth - self._grown)
        if fast and more > 0:
            # What grows it is a short round trip's absence: look whether there is a shorter one.
            self.ping(now)
            stream.target += more
            self._grown += more
            due += more
        stream.opened_at = now
        stream.receive_window += due
        self._control += f.pack(f.WINDOW, 0, stream.id, due)

    def _break(self, stream: StreamState, why: str) -> None:
        if stream.broken is None:
            stream.broken = why
            stream.pending.clear()
        self.touched.add(stream)
        self._forget(stream)

    def _forget_if_over(self, stream: StreamState) -> None:
        if stream.closed and stream.ended:
            self._forget(stream)

    def _forget(self, stream: StreamState) -> None:
        if self.streams.pop(stream.id, None) is not None:
            stream.forgotten = True
            self.touched.add(stream)
            self.buffered -= stream.buffered
            self._grown -= stream.target - f.INITIAL_WINDOW
            if stream.id % 2 != self._initiator:
                self._inbound -= 1

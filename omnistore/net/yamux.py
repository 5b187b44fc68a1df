"""Connections of our own: Noise records and Yamux over py-libp2p's handshake, same bytes on the wire.

The trio shell around `records` and `muxing`; a stream's face is `muxed_stream`'s, sockets are `wires`'.
One task reads: the socket fills a buffer, every whole record in it is decrypted, into a waiting reader's
own memory if there is one, and every frame taken in, without awaiting. Whoever writes sends at once if
nobody else is sending; else one task sends what all have queued, a batch at a time. A batch once sealed
is sent whole, whoever is cancelled. A third task pings, and closes the connection when nothing comes
back (`Liveness`).

What py-libp2p 0.8.1 does instead: two reads and five copies for each record, a sender that polls a
closed window, frames that spill into a second record, resets and lost connections that read as an
end, half a record on the wire after a cancelled write. tests/system/test_upstream.py shows it.
Deliberately not here: the handshake, which stays the library's, and agreeing on a muxer (`negotiation`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Final

import trio
from libp2p.stream_muxer.exceptions import MuxedConnUnavailable

from omnistore.errors import RemoteProtocolError
from omnistore.net import frames
from omnistore.net.agreement import Answer
from omnistore.net.interface import NextRoom
from omnistore.net.muxed_stream import MuxedStream
from omnistore.net.muxing import Muxing
from omnistore.net.records import SMALL_BUFFER, Opener, Sealer, Taker
from omnistore.net.stream_state import Pending, StreamState
from omnistore.net.wires import wire_of

logger = logging.getLogger(__name__)

MAX_OWN_STREAMS: Final = 256
"""Streams of ours that one connection carries: what the other side is ready for."""
FAREWELL: Final = 0.2
"""Seconds to send what is queued, and why we go, before a connection is cut."""
TURN: Final = 256 << 10
"""Bytes that are sealed and sent without letting others have a turn: some 0.2 ms."""
SENT: Final = 8 << 10
"""Bytes that take as long as sending nothing does."""


@dataclass(frozen=True, slots=True)
class Liveness:
    """When a connection counts as dead."""

    ping_every: float = 5.0
    """Seconds between the pings of a connection."""
    patience: float = 15.0
    """Seconds without one byte received, after a ping, or without one that could be sent."""


class _Answered:
    """The frames of a connection, behind the answer that is still to come before them."""

    def __init__(self, core: Muxing, answer: Answer) -> None:
        self._core = core
        self._answer = answer

    def room(self, least: int) -> memoryview | None:
        return None if self._answer.lacking else self._core.room(least)

    def filled_untrusted(self, size: int, now: float) -> None:
        self._core.filled_untrusted(size, now)

    def receive_untrusted(self, plaintext: bytes, now: float) -> None:
        rest = self._answer.take_untrusted(plaintext)
        if rest:
            self._core.receive_untrusted(bytes(rest), now)


class Connection:
    """A connection, as the library's swarm uses it (its `IMuxedConn`)."""

    def __init__(self, session: Any, peer_id: Any, liveness: Liveness, answer: Answer | None = None) -> None:
        """Take over `session`, whose handshake is done; `answer` is to come before the first frame."""
        state = session.conn.noise_state.noise_protocol
        opening, sealing = state.cipher_state_decrypt, state.cipher_state_encrypt
        self.peer_id = peer_id
        self.secured_conn = session
        self.event_started = trio.Event()
        self.event_closed = trio.Event()
        self.on_close: Any = None
        """Set by the swarm."""
        self._liveness = liveness
        self._wire = wire_of(session)
        self._opener = Opener(opening.cipher.cipher, opening.n)
        self._sealer = Sealer(sealing.cipher.cipher, sealing.n)
        self._core = Muxing(session.is_initiator)
        self._answer = answer
        self._first = session._drain(None)
        """What came in the record that ended the negotiation."""
        self._streams: dict[int, MuxedStream] = {}
        self._own = trio.Semaphore(MAX_OWN_STREAMS)
        self._arrivals = trio.lowlevel.ParkingLot()
        self._sending = False
        self._unsent = memoryview(b"")
        self._unyielded = 0
        """Bytes sent since others last had a turn."""
        self._to_send = trio.Event()
        self._drained = trio.lowlevel.ParkingLot()
        self._busy_at = 0.0
        """When much was received last."""
        self._received_at = self._sent_at = 0.0
        self._why: str | None = None
        """Why the connection is over."""
        self._scope = trio.CancelScope()

    # --- for the library --------------------------------------------------------------------

    @property
    def is_initiator(self) -> bool:
        """Whether we dialled."""
        return bool(self.secured_conn.is_initiator)

    @property
    def is_established(self) -> bool:
        """Whether streams can be opened."""
        return self.event_started.is_set() and self._why is None

    @property
    def is_closed(self) -> bool:
        """Whether it is over."""
        return self._why is not None

    def rtt(self) -> float:
        """The shortest round trip, in seconds; 0 before the first."""
        return self._core.round_trip or 0.0

    def get_transport_addresses(self) -> Any:
        """Of the socket."""
        return self.secured_conn.get_transport_addresses()

    def get_connection_type(self) -> Any:
        """Direct or relayed."""
        return self.secured_conn.get_connection_type()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Of the socket."""
        address: tuple[str, int] | None = self.secured_conn.get_remote_address()
        return address

    async def start(self) -> None:
        """Run until the connection is over."""
        self._received_at = self._sent_at = trio.current_time()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read)
                    nursery.start_soon(self._send_queued)
                    nursery.start_soon(self._ping)
                    self.event_started.set()
        finally:
            self.event_started.set()
            self._lose("the node stops")
            with trio.CancelScope(shield=True):
                await self._hang_up()

    async def open_stream(self) -> MuxedStream:
        """A new stream. Raises `MuxedConnUnavailable`."""
        await self._own.acquire()
        if self._why is not None:
            self._own.release()
            raise MuxedConnUnavailable(self._why)
        stream = self._adopt(self._core.open(trio.current_time()))
        await self.push()
        return stream

    async def accept_stream(self) -> MuxedStream:
        """The next stream that the peer opened. Raises `MuxedConnUnavailable`."""
        await trio.lowlevel.checkpoint()
        while True:
            while self._core.opened:
                state = self._core.opened.popleft()
                if not state.broken:
                    return self._adopt(state)
            if self._why is not None:
                raise MuxedConnUnavailable(self._why)
            await self._arrivals.park()

    async def close(self, reason: int = frames.NORMAL) -> None:
        """Say farewell and hang up; safe to call twice."""
        if self._why is None:
            with trio.CancelScope(deadline=trio.current_time() + FAREWELL, shield=True):
                await self._take_leave(reason)
        self._lose("the connection was closed here")
        await self._hang_up()

    # --- for our streams --------------------------------------------------------------------

    def take(self, state: StreamState, most: int) -> list[memoryview]:
        """Bytes that a stream received; its window opens with them."""
        pieces = self._core.take(state, most, trio.current_time())
        self._nudge()
        return pieces

    def lend(self, state: StreamState, room: memoryview, more: NextRoom | None) -> None:
        """Have what arrives next put there; `reclaim` follows."""
        self._core.lend(state, room, trio.current_time(), more)

    def reclaim(self, state: StreamState) -> int:
        """Nothing is put there from now on; how much room is left."""
        return self._core.reclaim(state)

    def queue(self, state: StreamState, *data: memoryview) -> Pending:
        """Have bytes sent in their turn; `push` next."""
        return self._core.write(state, *data)

    def withdraw(self, state: StreamState, pending: Pending) -> None:
        """What is left of them is not to be sent."""
        self._core.withdraw(state, pending)

    def close_stream(self, state: StreamState) -> None:
        """No more will be written."""
        self._core.close(state)
        self._wake_streams()
        self._nudge()

    def reset_stream(self, state: StreamState) -> None:
        """Abort a stream."""
        self._core.reset(state)
        self._wake_streams()
        self._nudge()

    async def push(self, pending: Pending | None = None) -> None:
        """Send now, in the caller's own task, until `pending` is on its way, unless somebody is at it."""
        if self._sending:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
            await self._send(pending)

    # --- sending ----------------------------------------------------------------------------

    async def _send(self, pending: Pending | None = None) -> None:
        """Take the turn to send: until `pending` is on its way, or until nothing is left."""
        self._sending = True
        try:
            while self._unsent or self._core.has_frames:
                if not self._send_now():
                    self._unsent = self._unsent[await self._wire.send(self._unsent) :]
                    self._sent_at = trio.current_time()
                    self._unyielded = 0
                elif self._unyielded >= TURN:
                    self._unyielded = 0
                    await trio.lowlevel.checkpoint()
                if pending is not None and pending.done and not self._unsent:
                    break
        except Exception as error:  # noqa: BLE001  # the library's layers, where there are any, raise what they like
            self._end(f"sending failed: {error!r}")
        finally:
            self._sending = False
            self._sent()

    def _send_now(self) -> bool:
        """Seal the next batch, if that is due, and send what goes without waiting: whether anything went."""
        if not self._unsent:
            self._unsent = self._sealer.seal(self._core.next_frames())
            self._sent_at = trio.current_time()
            self._wake_streams()
        if not self._unsent:
            # What was queued was taken back.
            return True
        count = self._wire.send_now(self._unsent)
        self._unsent = self._unsent[count:]
        self._unyielded += count + SENT
        return count > 0

    def _sent(self) -> None:
        """Have somebody send what is left, or tell those who wait until nothing is."""
        if self._unsent or self._core.has_frames:
            self._to_send.set()
        else:
            self._drained.unpark_all()

    def _nudge(self) -> None:
        """Send what goes at once, if nobody is at it; the rest is for the sending task."""
        if self._sending or not (self._unsent or self._core.has_frames):
            return
        self._sending = True
        try:
            self._send_now()
        except Exception as error:  # noqa: BLE001  # as in `_send`
            self._end(f"sending failed: {error!r}")
        finally:
            self._sending = False
            self._sent()

    async def _send_queued(self) -> None:
        while True:
            await self._to_send.wait()
            self._to_send = trio.Event()
            if not self._sending:
                await self._send()

    # --- receiving --------------------------------------------------------------------------

    async def _read(self) -> None:
        core, opener, wire = self._core, self._opener, self._wire
        try:
            now = self._received_at = trio.current_time()
            taker: Taker = core if self._answer is None else _Answered(core, self._answer)
            if self._first:
                taker.receive_untrusted(self._first, now)
            self._took_in()
            while core.gone_away is None:
                with opener.room() as room:
                    count = await wire.receive_into(room)
                if not count:
                    opener.end_untrusted()
                    core.end_untrusted()
                    self._end("the peer closed it")
                    return
                now = self._received_at = trio.current_time()
                try:
                    opener.receive_untrusted(count, taker, now)
                finally:
                    self._took_in()
                if self._answer is not None and not self._answer.lacking:
                    taker, self._answer = core, None
                if count > SMALL_BUFFER:
                    self._busy_at = self._received_at
                elif self._received_at - self._busy_at > self._liveness.patience:
                    opener.relax()
            self._end("the peer closes it" + (f" (reason {core.gone_away})" if core.gone_away else ""))
        except RemoteProtocolError as error:
            await self._accuse(error)
        except Exception as error:  # noqa: BLE001  # the library's layers, where there are any, raise what they like
            self._end(f"it broke: {error!r}")

    def _took_in(self) -> None:
        """Tell those concerned, and send what is owed."""
        self._wake_streams()
        if self._core.opened:
            self._arrivals.unpark_all()
        self._nudge()

    async def _accuse(self, error: RemoteProtocolError) -> None:
        """The peer broke the protocol: say so, and drop it."""
        logger.info("dropping the connection to %s: it %s", self.peer_id, error)
        with trio.move_on_after(FAREWELL):
            await self._take_leave(frames.PROTOCOL_ERROR)
        self._end(f"the peer broke the protocol: {error}")

    # --- liveness ---------------------------------------------------------------------------

    async def _ping(self) -> None:
        while True:
            asked = trio.current_time()
            self._core.ping(asked)
            self._nudge()
            await trio.sleep(self._liveness.ping_every)
            while (silence := self._silence(asked)) is not None:
                if silence > self._liveness.patience:
                    logger.info("closing the connection to %s: it does not answer", self.peer_id)
                    self._end("the peer does not answer")
                    return
                await trio.sleep(self._liveness.patience - silence + 0.001)
            self._core.sweep(trio.current_time())
            self._wake_streams()
            if not self._sending and not self._unsent and not self._core.has_frames:
                self._sealer.relax()

    def _silence(self, asked: float) -> float | None:
        """For how long the peer has owed a byte, or taken none; None if all is well."""
        now = trio.current_time()
        if self._received_at <= asked:
            return now - asked
        if self._sending and self._unsent and now - self._sent_at > self._liveness.ping_every:
            return now - self._sent_at
        return None

    async def _take_leave(self, reason: int) -> None:
        """Have everything sent that is queued, and why we go."""
        self._core.go_away(reason)
        self._nudge()
        while self._why is None and (self._sending or self._unsent or self._core.has_frames):
            await self._drained.park()

    # --- ending -----------------------------------------------------------------------------

    def _end(self, why: str) -> None:
        """Stop all tasks; `start` hangs up."""
        self._lose(why)
        self._scope.cancel()

    def _lose(self, why: str) -> None:
        if self._why is not None:
            return
        self._why = why
        self._core.lose(f"the connection to {self.peer_id} is lost: {why}")
        self._wake_streams()
        self._arrivals.unpark_all()
        logger.debug("the connection to %s is over: %s", self.peer_id, why)

    async def _hang_up(self) -> None:
        """Close the socket and tell the swarm, once."""
        if self.event_closed.is_set():
            return
        self.event_closed.set()
        self._scope.cancel()
        try:
            await self.secured_conn.close()
        except Exception as error:  # noqa: BLE001  # closing what is broken already fails in any way
            logger.debug("closing the socket of %s failed: %r", self.peer_id, error)
        if self.on_close is not None:
            await self.on_close()

    # --- bookkeeping ------------------------------------------------------------------------

    def _adopt(self, state: StreamState) -> MuxedStream:
        stream = self._streams[state.id] = MuxedStream(self, state)
        return stream

    def _wake_streams(self) -> None:
        core = self._core
        for state in core.written:
            if (stream := self._streams.get(state.id)) is not None:
                stream.wake_writer()
        core.written.clear()
        for state in core.touched:
            stream = self._streams.get(state.id)
            if stream is None:
                continue
            stream.wake_reader()
            if state.broken:
                stream.wake_writer()
            if state.forgotten:
                del self._streams[state.id]
                if self._is_own(state):
                    self._own.release()
        core.touched.clear()

    def _is_own(self, state: StreamState) -> bool:
        return state.id % 2 == self.is_initiator

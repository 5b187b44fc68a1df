"""Yamux as py-libp2p 0.8.1 has it, with seven faults mended (bytes on the wire unchanged).

- A full frame (65,524 bytes and its header) spills into a second Noise record, and each frame is
  read and written on its own: here one frame is one record, and `records` moves them in bulk.
- A sender at a zero window polls every 10 ms: here it is woken by the window update.
- A consumer that stalls for 5 s gets its stream torn down: here the sender waits, since a stalled
  disk is no fault, and only a dead connection ends the wait.
- A write cancelled half-way leaves half a record on the wire, which breaks every stream of the
  connection: a frame once begun is finished, or the connection is closed.
- A peer that stopped answering is never noticed: each connection is pinged, and closed when no
  answer comes (`Liveness`).
- A connection lost in the middle of a frame ends that frame's stream as if the peer had.
- A receiver opens the window again by a few kB after every read, and the sender fills it with as
  small frames: here it opens by half a window at a time. Bulk transfers run a quarter faster.

Deliberately not here: a muxer of our own. Everything touches private names of py-libp2p, and
only in this file; tests/system/test_upstream.py fails when upstream mends one.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import trio
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.stream_muxer import muxer_multistream
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux import yamux as upstream

from omnistore.net.records import MAX_PLAINTEXT, Records

logger = logging.getLogger(__name__)

HEADER: Final = struct.Struct("!BBHII")
MAX_PAYLOAD: Final = MAX_PLAINTEXT - HEADER.size
"""Bytes of one data frame: with its header, the most plaintext that one Noise record carries."""
BATCH: Final = 4
"""Full frames sent in one go; more would keep other streams waiting."""
_TYPE_DATA: Final = 0
_TYPE_PING: Final = 2
_FLAG_SYN: Final = 1


@dataclass(frozen=True, slots=True)
class Liveness:
    """When a connection counts as dead."""

    ping_every: float = 5.0
    """Seconds between the pings of a connection."""
    patience: float = 15.0
    """Seconds that a ping, or one frame on its way into the socket, may take."""


_UpstreamYamuxStream: Any = upstream.YamuxStream


class LiveYamuxStream(_UpstreamYamuxStream):  # type: ignore[misc]  # libp2p is untyped to us
    """A stream whose sender sleeps until the window opens."""

    _pending_recv_release: int
    """Bytes read since the window was last opened."""

    def __init__(self, stream_id: int, conn: Any, is_initiator: bool) -> None:
        self._waiting = trio.lowlevel.ParkingLot()
        self._window = 0
        self._ended = False
        super().__init__(stream_id, conn, is_initiator)

    @property
    def send_window(self) -> int:
        """Bytes the peer still accepts. Upstream's reader adds to it: that is what wakes the sender."""
        return self._window

    @send_window.setter
    def send_window(self, value: int) -> None:
        self._window = value
        if value > 0:
            self._waiting.unpark_all()

    @property
    def closed(self) -> bool:
        """Whether both directions ended; set by upstream's reader on a reset."""
        return self._ended

    @closed.setter
    def closed(self, value: bool) -> None:
        self._ended = value
        self._waiting.unpark_all()

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything, as fast as the peer's window opens."""
        view = memoryview(data).cast("B")
        sent = 0
        while sent < len(view):
            while self.send_window <= 0 and not (self.closed or self.send_closed):
                await self._waiting.park()
            if self.closed or self.send_closed:
                raise MuxedStreamError("stream closed while sending")
            frames: list[bytes] = []
            while len(frames) < BATCH and self.send_window > 0 and sent < len(view):
                size = min(self.send_window, MAX_PAYLOAD, len(view) - sent)
                self.send_window -= size
                header = HEADER.pack(0, _TYPE_DATA, 0, self.stream_id, size)
                frames.append(b"".join((header, view[sent : sent + size])))
                sent += size
            await self.conn.write_frames(frames)

    async def _auto_tune_and_send_window_update(self, *, bytes_read: int = 0) -> None:
        opened = 0
        async with self.window_lock:
            self._pending_recv_release += bytes_read
            if self._pending_recv_release * 2 >= self.target_recv_window:
                opened, self._pending_recv_release = self._pending_recv_release, 0
                self.recv_window += opened
                buffered = len(self.conn.stream_buffers.get(self.stream_id, b""))
                opened += self._apply_autotune_epoch(buffered)
        if opened:
            await self.send_window_update(opened, skip_lock=True)


class LiveYamux(upstream.Yamux):  # type: ignore[misc]  # libp2p is untyped to us
    """A connection that finishes its frames and notices when the peer is gone."""

    _ping_id: int

    def __init__(self, session: Any, peer_id: Any, liveness: Liveness) -> None:
        super().__init__(session, peer_id, is_initiator=session.is_initiator)
        self.liveness = liveness
        self._records = Records(session)
        self._turn = trio.Semaphore(1)
        self._write_error: ConnectionClosedError | None = None
        # Upstream's reader asks the session for exactly so many bytes.
        session.read = self._records.read

    async def write_frames(self, frames: Sequence[bytes]) -> None:
        """Send frames in one go. Cancelled, it returns at once and the frames leave all the same.

        Raises `ConnectionClosedError`, which upstream takes for an ordinary end.
        """
        await self._turn.acquire()
        written = trio.Event()
        try:
            self._nursery.start_soon(self._write_now, frames, written)
        except (AttributeError, RuntimeError):
            self._turn.release()
            raise ConnectionClosedError("the connection is closed") from None
        await written.wait()
        if self._write_error is not None:
            raise self._write_error

    async def _write_now(self, frames: Sequence[bytes], written: trio.Event) -> None:
        """Finish what was begun, in a task of the connection's own: half a record would break it."""
        finished = False
        try:
            with trio.move_on_after(self.liveness.patience):
                await self._records.write(frames)
                finished = True
            if not finished:
                await self._abandon("it takes no more bytes")
        except Exception as error:  # noqa: BLE001  # upstream's sockets raise what they like; any of it ends us
            logger.debug("writing to %s failed: %r", self.peer_id, error)
        finally:
            if not finished:
                self._write_error = ConnectionClosedError("the connection broke")
            self._turn.release()
            written.set()

    async def _write_frame(self, data: bytes) -> None:
        await self.write_frames((data,))

    async def _read_data_body(self, length: int) -> bytes | memoryview:
        data = self._records.take(length)
        if data is not None:
            return data
        try:
            with trio.fail_after(self.liveness.patience):
                return await self._records.read(length)
        except BaseException:
            # Upstream marks this one stream as ended, as if the peer had, before it notices the rest.
            for stream in self.streams.values():
                stream.reset_received = True
            raise

    async def _measure_rtt_loop(self) -> None:
        while not self.event_shutting_down.is_set():
            with trio.move_on_after(self.liveness.ping_every):
                await self.event_shutting_down.wait()
            if self.event_shutting_down.is_set():
                return
            self._ping_id = (self._ping_id + 1) & 0xFFFFFFFF
            answered = self._ping_event = trio.Event()
            with trio.move_on_after(self.liveness.patience) as waiting:
                self._ping_sent_time = trio.current_time()
                try:
                    await self._write_frame(HEADER.pack(0, _TYPE_PING, _FLAG_SYN, 0, self._ping_id))
                except Exception:  # noqa: BLE001  # upstream's layers raise what they like; any of it ends us
                    return
                await answered.wait()
            if waiting.cancelled_caught:
                await self._abandon("it does not answer")

    async def _abandon(self, why: str) -> None:
        """Close the socket: closing in good order would wait for the peer that is gone.

        Upstream's reader then sees the closed socket, ends every stream as reset and tells the swarm.
        """
        logger.info("closing the connection to %s: %s", self.peer_id, why)
        with trio.CancelScope(shield=True):
            await self.secured_conn.close()


class LiveMuxer(muxer_multistream.MuxerMultistream):  # type: ignore[misc]  # libp2p is untyped to us
    """Negotiates as upstream does, which names its own Yamux class, and answers with ours."""

    def __init__(self, liveness: Liveness, muxers: Any, negotiate_timeout: int) -> None:
        super().__init__(muxers, negotiate_timeout)
        self._liveness = liveness

    async def new_conn(self, conn: Any, peer_id: Any) -> Any:
        """Negotiate Yamux on a secured connection."""
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        muxed = LiveYamux(conn, peer_id, self._liveness)
        return self._annotate_connection(muxed, conn, protocol)


def install(upgrader: Any, liveness: Liveness) -> None:
    """Make every connection of this host one of ours."""
    old = upgrader.muxer_multistream
    upgrader.muxer_multistream = LiveMuxer(liveness, old.transports, old.negotiate_timeout)
    # Upstream's reader makes the streams by this name, for connections of either kind.
    upstream.YamuxStream = _stream_of


def _stream_of(stream_id: int, conn: Any, is_initiator: bool) -> Any:
    """A stream of the kind its connection needs: a host that is not ours keeps upstream's."""
    kind = LiveYamuxStream if isinstance(conn, LiveYamux) else _UpstreamYamuxStream
    return kind(stream_id, conn, is_initiator)

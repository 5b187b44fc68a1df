"""One stream of a connection, as py-libp2p's layers and ours use it (its `IMuxedStream`).

Waits for what `muxing` has for it, or has room for; the connection it belongs to, `yamux`'s, moves it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from libp2p.stream_muxer.exceptions import MuxedStreamClosed, MuxedStreamEOF, MuxedStreamReset

from omnistore.errors import RemoteProtocolError
from omnistore.net.agreement import Answer, agreed
from omnistore.net.interface import NextRoom
from omnistore.net.records import LARGE_BUFFER
from omnistore.net.stream_state import StreamState

if TYPE_CHECKING:
    from omnistore.net.yamux import Connection


class _Rooms:
    """The rooms of one reader, one after the other."""

    def __init__(self, room: memoryview, more: NextRoom | None) -> None:
        self.current = room
        """The rest of it."""
        self.count = 0
        """Bytes put into all of them."""
        self.full = 0
        """How many are full."""
        self._more = more

    def put(self, piece: memoryview) -> None:
        """At most what fits the current one."""
        self.current[: len(piece)] = piece
        self.current = self.current[len(piece) :]
        self.count += len(piece)
        if not self.current:
            self._open()

    def next(self) -> memoryview | None:
        """The current one was filled by others."""
        self.count += len(self.current)
        self._open()
        return self.current or None

    def left(self, size: int) -> None:
        """The current one was filled by others up to `size` bytes of its end."""
        self.count += len(self.current) - size
        self.current = self.current[len(self.current) - size :]

    def _open(self) -> None:
        self.full += 1
        self.current = (self._more() if self._more is not None else None) or memoryview(b"")


class MuxedStream:
    """One stream, as the library's layers and ours use it."""

    def __init__(self, connection: Connection, state: StreamState) -> None:
        self.muxed_conn = connection
        self.stream_id = state.id
        self._connection = connection
        self._state = state
        self._arrived = trio.lowlevel.ParkingLot()
        self._left = trio.lowlevel.ParkingLot()
        self._answer: Answer | None = None
        """What is still to come before anything else: to what `ask` took for granted."""

    async def ask(self, protocol: str) -> None:
        """Say what this stream is for and go on as if the peer agreed; what it says is looked at later."""
        self._answer = Answer(protocol)
        await self.write(agreed(protocol))

    async def receive_some(self, most: int) -> bytes:
        """Up to `most` bytes, `b""` at the peer's end. Raises `MuxedStreamReset`."""
        if self._answer is not None:
            await self._agree(self._answer)
        if not self._state.received:
            await self._wait_for_bytes()
        else:
            # Others need no turn: who only takes what is there soon has taken a window, and waits.
            await trio.lowlevel.checkpoint_if_cancelled()
        pieces = self._connection.take(self._state, most)
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    async def receive_exactly(self, count: int) -> bytes:
        """`count` bytes, or as many as there were before the peer's end. Raises `MuxedStreamReset`."""
        if self._answer is not None:
            await self._agree(self._answer)
        pieces: list[memoryview] = []
        while count:
            if not self._state.received:
                await self._wait_for_bytes()
            taken = self._connection.take(self._state, count)
            if not taken:
                break
            pieces += taken
            count -= sum(len(piece) for piece in taken)
        await trio.lowlevel.checkpoint()
        return b"".join(pieces)

    async def receive_into(self, room: memoryview, more: NextRoom | None = None) -> int:
        """Fill `room`, not empty, or as much of it as comes without a pause; then what `more` gives.

        The bytes of all rooms, 0 at the peer's end. Raises `MuxedStreamReset`. Cancelled, it has taken what
        arrived.
        """
        if self._answer is not None:
            await self._agree(self._answer)
        state = self._state
        rooms = _Rooms(room, more)
        while state.received and rooms.current:
            for piece in self._connection.take(state, len(rooms.current)):
                rooms.put(piece)
        if rooms.full or state.ended:
            await trio.lowlevel.checkpoint()
            return rooms.count
        self._connection.lend(state, rooms.current, rooms.next if more is not None else None)
        left = len(rooms.current)
        try:
            while not (state.ended or state.broken or rooms.full or len(state.room or b"") < left):
                await self._arrived.park()
        finally:
            rooms.left(self._connection.reclaim(state))
        if not rooms.count and state.broken:
            raise MuxedStreamReset(state.broken)
        return rooms.count

    async def read(self, n: int | None = None) -> bytes:
        """As the library reads: `MuxedStreamEOF` at the end, everything there is without `n`."""
        if n == 0:
            return b""
        data = await self.receive_some(LARGE_BUFFER if n is None or n < 0 else n)
        if not data:
            raise MuxedStreamEOF("the peer ended the stream")
        return data

    async def write(self, *data: bytes | bytearray | memoryview) -> None:
        """Send everything, in order. Raises `MuxedStreamReset` or `MuxedStreamClosed`."""
        state = self._state
        if state.broken:
            raise MuxedStreamReset(state.broken)
        if state.closing:
            raise MuxedStreamClosed("the stream was closed here")
        views = [view for piece in data if (view := memoryview(piece).cast("B"))]
        if not views:
            await trio.lowlevel.checkpoint()
            return
        pending = self._connection.queue(state, *views)
        try:
            await self._connection.push(pending)
            while not (pending.done or state.broken):
                await self._left.park()
        finally:
            self._connection.withdraw(state, pending)
        if state.broken:
            raise MuxedStreamReset(state.broken)

    async def close(self) -> None:
        """End our direction; the peer's goes on."""
        self._connection.close_stream(self._state)
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """Abort both directions."""
        self._connection.reset_stream(self._state)
        await trio.lowlevel.checkpoint()

    def wake_reader(self) -> None:
        """Something arrived, or will no more."""
        self._arrived.unpark_all()

    def wake_writer(self) -> None:
        """Something that was written is on its way, or will never be."""
        self._left.unpark_all()

    def set_deadline(self, ttl: int) -> bool:
        """Deadlines are cancel scopes."""
        return False

    def get_remote_address(self) -> tuple[str, int] | None:
        """Of the connection."""
        return self._connection.get_remote_address()

    async def _agree(self, answer: Answer) -> None:
        """Receive the answer. Raises `MuxedStreamReset` if the peer does not agree."""
        while answer.lacking:
            await self._wait_for_bytes()
            pieces = self._connection.take(self._state, answer.lacking)
            if not pieces:
                raise MuxedStreamReset("the peer ended the stream before it agreed on a protocol")
            try:
                for piece in pieces:
                    answer.take_untrusted(piece)
            except RemoteProtocolError as error:
                await self.reset()
                raise MuxedStreamReset(f"the peer {error.message}") from None
        self._answer = None

    async def _wait_for_bytes(self) -> None:
        """Until there are some, or the peer's end. Raises `MuxedStreamReset`."""
        state = self._state
        while not state.received:
            if state.ended:
                await trio.lowlevel.checkpoint()
                return
            if state.broken:
                raise MuxedStreamReset(state.broken)
            await self._arrived.park()

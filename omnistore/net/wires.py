"""What carries the records of a connection: a TCP socket itself, or layers of py-libp2p's.

Bytes in and out of memory that the caller owns, as far as they go at once. Knows no records: those are
`yamux`'s.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import trio


class Wire(Protocol):
    """The bytes below the records."""

    async def receive_into(self, room: memoryview) -> int:
        """Some bytes, put into `room`; 0 at the end. Raises whatever the layer below does."""
        ...

    def send_now(self, data: memoryview) -> int:
        """Send what goes without waiting; 0 where nothing does. Raises whatever the layer below does."""
        ...

    async def send(self, data: memoryview) -> int:
        """Send some of `data`, once that goes; how much. Raises whatever the layer below does."""
        ...


class _SocketWire:
    """A TCP socket, without the layers above it, trio's own included: half of a call's time is theirs."""

    def __init__(self, socket: trio.socket.SocketType) -> None:
        self._socket = socket

    async def receive_into(self, room: memoryview) -> int:
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            count = os.readv(self._socket.fileno(), (room,))
        except BlockingIOError:
            pass
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return count
        while True:
            await trio.lowlevel.wait_readable(self._socket.fileno())
            try:
                return os.readv(self._socket.fileno(), (room,))
            except BlockingIOError:
                continue

    def send_now(self, data: memoryview) -> int:
        try:
            return os.write(self._socket.fileno(), data)
        except BlockingIOError:
            return 0

    async def send(self, data: memoryview) -> int:
        count = 0
        while not count:
            await trio.lowlevel.wait_writable(self._socket.fileno())
            count = self.send_now(data)
        return count


class _LayeredWire:
    """Whatever else the library may have put below: a relay's circuit, a private network's cipher."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    async def receive_into(self, room: memoryview) -> int:
        data = await self._raw.read(len(room))
        room[: len(data)] = data
        return len(data)

    def send_now(self, data: memoryview) -> int:
        return 0

    async def send(self, data: memoryview) -> int:
        # Cancelled half-way, nobody knows what was sent.
        with trio.CancelScope(shield=True):
            await self._raw.write(bytes(data))
        return len(data)


def wire_of(session: Any) -> Wire:
    """What is below the records of a session of the library."""
    raw = session.conn.read_writer.read_write_closer
    socket_stream = getattr(getattr(raw, "stream", None), "stream", None)
    if isinstance(socket_stream, trio.SocketStream):
        return _SocketWire(socket_stream.socket)
    return _LayeredWire(raw)

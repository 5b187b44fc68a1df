"""Noise transport records, many at a time (pure: bytes in, bytes out; the handshake is the library's).

A record is two bytes of length, then ChaCha20-Poly1305 of at most 65,519 bytes, under a counter that
both sides keep. `Opener` is read into by a socket and decrypts every whole record it holds, into the
memory that is meant for its contents where that is known; `Sealer` seals a batch of pieces into one buffer,
large ones from where they lie. Deliberately no socket and no muxer: those are `yamux`'s and `muxing`'s.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final, Protocol

from cryptography.exceptions import InvalidTag

from omnistore.errors import LocalProtocolError, RemoteProtocolError

TAG: Final = 16
MAX_RECORD: Final = 65535
"""Bytes of a record after its length: what two bytes can say."""
MAX_PLAINTEXT: Final = MAX_RECORD - TAG
"""Bytes that one record carries."""
LENGTH: Final = 2
MAX_NONCE: Final = 2**64 - 1
"""Noise keeps the last counter for itself; a connection that gets there must end."""
SMALL_BUFFER: Final = 4 << 10
"""Bytes of an idle connection's buffer: a node has hundreds of those."""
LARGE_BUFFER: Final = 512 << 10
"""Bytes of a busy one's: some eight records for each call into the kernel."""
SHARED: Final = 16 << 10
"""A piece of no more than this is copied, to share a record: copying it costs less than a record more."""

_NONCE: Final = struct.Struct("<4xQ")
_SIZE: Final = struct.Struct(">H")


class Taker(Protocol):
    """What becomes of plaintexts, one after the other: `muxing`, or a list in a test."""

    def room(self, least: int) -> memoryview | None:
        """Where what comes next belongs, if `least` bytes of it belong together: `filled` follows."""
        ...

    def filled_untrusted(self, size: int, now: float) -> None:
        """Its first `size` bytes are there. Raises `RemoteProtocolError`."""
        ...

    def receive_untrusted(self, plaintext: bytes, now: float) -> None:
        """Take in what one record carried. Raises `RemoteProtocolError`."""
        ...


class Opener:
    """The receiving half: a buffer that a socket fills, and the records in it."""

    def __init__(self, key: Any, nonce: int = 0) -> None:
        """`key`: an AEAD with `decrypt` and `decrypt_into`; `nonce`: of the first record to come."""
        self._key = key
        self._nonce = nonce
        self._buffer = bytearray(SMALL_BUFFER)
        self._end = 0
        """Bytes of the buffer that are filled; what is not a whole record yet."""

    @property
    def capacity(self) -> int:
        """Bytes of memory it takes."""
        return len(self._buffer)

    def room(self) -> memoryview:
        """Where the socket may write next; never empty."""
        return memoryview(self._buffer)[self._end :]

    def receive_untrusted(self, count: int, taker: Taker, now: float) -> None:
        """Give the plaintexts that the `count` bytes just written complete to `taker`, with the time.

        Raises `RemoteProtocolError`, after which it is useless.
        """
        end = self._end + count
        full = end == len(self._buffer)
        with memoryview(self._buffer) as view:
            position = self._open(view[:end], taker, now)
        self._end = end - position
        if position:
            self._buffer[: self._end] = self._buffer[position:end]
        if full:
            self._grow()

    def end_untrusted(self) -> None:
        """The connection ended here. Raises `RemoteProtocolError` if that cut a record."""
        if self._end:
            raise RemoteProtocolError("the connection ended in the middle of a record")

    def relax(self) -> None:
        """Give memory back, if nothing is waiting in it."""
        if not self._end and len(self._buffer) > SMALL_BUFFER:
            self._buffer = bytearray(SMALL_BUFFER)

    def _open(self, view: memoryview, taker: Taker, now: float) -> int:
        """Decrypt every whole record, several into one room where they fit; where the last one ends."""
        end, position, filled = len(view), 0, 0
        room: memoryview | None = None
        try:
            while end - position >= LENGTH:
                start = position + LENGTH
                size = view[position] << 8 | view[position + 1]
                if size < TAG:
                    raise RemoteProtocolError(f"a record of {size} bytes, shorter than its tag")
                if start + size > end:
                    break
                if self._nonce >= MAX_NONCE:
                    raise RemoteProtocolError("sent more records than its key is good for")
                plain = size - TAG
                if room is None or len(room) - filled < plain:
                    if filled:
                        taken, filled = filled, 0
                        taker.filled_untrusted(taken, now)
                    room = taker.room(plain)
                position = start + size
                nonce, record = _NONCE.pack(self._nonce), view[start:position]
                if room is None:
                    plaintext = self._key.decrypt(nonce, record, None)
                    self._nonce += 1
                    taker.receive_untrusted(plaintext, now)
                else:
                    self._key.decrypt_into(nonce, record, None, room[filled : filled + plain])
                    self._nonce += 1
                    filled += plain
        except InvalidTag:
            raise RemoteProtocolError(
                f"record {self._nonce} is not authentic: forged, replayed or out of order"
            ) from None
        finally:
            if filled:
                taker.filled_untrusted(filled, now)
        return position

    def _grow(self) -> None:
        """More room: the last read filled it. The largest record fits the largest buffer many times."""
        size = min(LARGE_BUFFER, 4 * len(self._buffer))
        if size > len(self._buffer):
            larger = bytearray(size)
            larger[: self._end] = self._buffer[: self._end]
            self._buffer = larger


class Sealer:
    """The sending half: pieces in, one buffer of records out."""

    def __init__(self, key: Any, nonce: int = 0) -> None:
        """`key`: an AEAD with `encrypt_into`."""
        self._key = key
        self._nonce = nonce
        self._plain = bytearray()
        self._out = bytearray()

    @property
    def capacity(self) -> int:
        """Bytes of memory it takes."""
        return len(self._plain) + len(self._out)

    def seal(self, pieces: Sequence[bytes | memoryview]) -> memoryview:
        """Records carrying every piece in order; valid until the next call.

        Small pieces share a record as long as they fit it, and none of them is cut; a large one fills
        records of its own, up to an end that is small. Raises `LocalProtocolError` when the key is used up.
        """
        self._reserve(sum(map(len, pieces)), len(pieces))
        out, plain = memoryview(self._out), memoryview(self._plain)
        filled = position = 0
        for piece in pieces:
            start, size = 0, len(piece)
            if size > SHARED:
                position = self._seal(plain[:filled], out, position)
                filled = 0
            while size - start > SHARED:
                end = min(start + MAX_PLAINTEXT, size)
                position = self._seal(piece[start:end], out, position)
                start = end
            rest = size - start
            if filled + rest > MAX_PLAINTEXT:
                position = self._seal(plain[:filled], out, position)
                filled = 0
            plain[filled : filled + rest] = piece[start:]
            filled += rest
        return out[: self._seal(plain[:filled], out, position)]

    def relax(self) -> None:
        """Give memory back; not while what `seal` returned is in use."""
        self._plain, self._out = bytearray(), bytearray()

    def _seal(self, plain: bytes | memoryview, out: memoryview, position: int) -> int:
        if not plain:
            return position
        if self._nonce >= MAX_NONCE:
            raise LocalProtocolError("the key of this connection is used up")
        size = len(plain) + TAG
        _SIZE.pack_into(out, position, size)
        position += LENGTH
        nonce = _NONCE.pack(self._nonce)
        self._key.encrypt_into(nonce, plain, None, out[position : position + size])
        self._nonce += 1
        return position + size

    def _reserve(self, total: int, pieces: int) -> None:
        # Full records, and for each piece the one before it and its own last one, which may not be full.
        needed = total + (total // MAX_PLAINTEXT + 2 * pieces + 1) * (LENGTH + TAG)
        if needed > len(self._out):
            self._out = bytearray(max(needed, SMALL_BUFFER))
        if len(self._plain) < min(total, MAX_PLAINTEXT):
            self._plain = bytearray(MAX_PLAINTEXT if total > SMALL_BUFFER else SMALL_BUFFER)

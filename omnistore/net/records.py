"""Noise transport records, many at a time (pure: bytes in, bytes out; the handshake is the library's).

A record is two bytes of length, then ChaCha20-Poly1305 of at most 65,519 bytes, under a counter that
both sides keep. `Opener` is read into by a socket and decrypts every whole record it holds; `Sealer`
packs frames into as few records as they fit and seals a batch of them into one buffer. Deliberately
no socket and no muxer: those are `yamux`'s and `muxing`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

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


class Opener:
    """The receiving half: a buffer that a socket fills, and the records in it."""

    def __init__(self, key: Any, nonce: int = 0) -> None:
        """`key`: an AEAD with `decrypt(nonce, data, None)`; `nonce`: of the first record to come."""
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

    def receive_untrusted(self, count: int) -> list[bytes]:
        """The plaintexts that the `count` bytes just written complete. Raises `RemoteProtocolError`."""
        end, position, found = self._end + count, 0, []
        full = end == len(self._buffer)
        size = 0
        view = memoryview(self._buffer)
        while end - position >= LENGTH:
            size = LENGTH + int.from_bytes(view[position : position + LENGTH], "big")
            if size < LENGTH + TAG:
                raise RemoteProtocolError(f"a record of {size - LENGTH} bytes, shorter than its tag")
            if position + size > end:
                break
            found.append(self._open(view[position + LENGTH : position + size]))
            position += size
        view.release()
        self._end = end - position
        if position:
            self._buffer[: self._end] = self._buffer[position:end]
        if full:
            self._grow()
        return found

    def end_untrusted(self) -> None:
        """The connection ended here. Raises `RemoteProtocolError` if that cut a record."""
        if self._end:
            raise RemoteProtocolError("the connection ended in the middle of a record")

    def relax(self) -> None:
        """Give memory back, if nothing is waiting in it."""
        if not self._end and len(self._buffer) > SMALL_BUFFER:
            self._buffer = bytearray(SMALL_BUFFER)

    def _open(self, record: memoryview) -> bytes:
        if self._nonce >= MAX_NONCE:
            raise RemoteProtocolError("sent more records than its key is good for")
        try:
            plaintext: bytes = self._key.decrypt(_nonce(self._nonce), record, None)
        except InvalidTag:
            raise RemoteProtocolError(
                f"record {self._nonce} is not authentic: forged, replayed or out of order"
            ) from None
        self._nonce += 1
        return plaintext

    def _grow(self) -> None:
        """More room: the last read filled it. The largest record fits the largest buffer many times."""
        size = min(LARGE_BUFFER, 4 * len(self._buffer))
        if size > len(self._buffer):
            larger = bytearray(size)
            larger[: self._end] = self._buffer[: self._end]
            self._buffer = larger


class Sealer:
    """The sending half: frames in, one buffer of records out."""

    def __init__(self, key: Any, nonce: int = 0) -> None:
        """`key`: an AEAD with `encrypt_into(nonce, data, None, out)`."""
        self._key = key
        self._nonce = nonce
        self._plain = bytearray()
        self._out = bytearray()

    @property
    def capacity(self) -> int:
        """Bytes of memory it takes."""
        return len(self._plain) + len(self._out)

    def seal(self, frames: Sequence[tuple[bytes, memoryview]]) -> memoryview:
        """Records carrying every (header, payload) in order; valid until the next call.

        Frames share a record as long as they fit it, and none that fits one is cut. Raises
        `LocalProtocolError` when the key is used up.
        """
        total = sum(len(header) + len(payload) for header, payload in frames)
        self._reserve(total, len(frames))
        out = memoryview(self._out)
        plain = memoryview(self._plain)
        filled = position = 0
        for header, payload in frames:
            size = len(header) + len(payload)
            if filled + size > MAX_PLAINTEXT:
                position = self._seal(plain[:filled], out, position)
                filled = 0
            plain[filled : filled + len(header)] = header
            plain[filled + len(header) : filled + size] = payload
            filled += size
        if filled:
            position = self._seal(plain[:filled], out, position)
        return out[:position]

    def relax(self) -> None:
        """Give memory back; not while what `seal` returned is in use."""
        self._plain, self._out = bytearray(), bytearray()

    def _seal(self, plain: memoryview, out: memoryview, position: int) -> int:
        if not plain:
            return position
        if self._nonce >= MAX_NONCE:
            raise LocalProtocolError("the key of this connection is used up")
        size = len(plain) + TAG
        out[position : position + LENGTH] = size.to_bytes(LENGTH, "big")
        position += LENGTH
        self._key.encrypt_into(_nonce(self._nonce), plain, None, out[position : position + size])
        self._nonce += 1
        return position + size

    def _reserve(self, total: int, frames: int) -> None:
        # Each frame may need a record of its own, never more.
        needed = total + frames * (LENGTH + TAG)
        if needed > len(self._out):
            self._out = bytearray(max(needed, SMALL_BUFFER))
        if len(self._plain) < min(total, MAX_PLAINTEXT):
            self._plain = bytearray(MAX_PLAINTEXT if total > SMALL_BUFFER else SMALL_BUFFER)


def _nonce(count: int) -> bytes:
    return b"\0\0\0\0" + count.to_bytes(8, "little")

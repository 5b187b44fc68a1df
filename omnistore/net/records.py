"""Noise records in bulk, over the keys of py-libp2p's own handshake (bytes on the wire unchanged).

py-libp2p 0.8.1 asks the socket for the two bytes of each record's length, then for the record, and
copies it five times on its way up; and it sends records one by one. Here the socket is read by
the quarter megabyte, every whole record in it is decrypted at once, frames are cut from the
plaintext without waiting, and several records leave in one write. Deliberately no muxer: that
stays upstream's, with the changes in `yamux`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from libp2p.io.exceptions import ConnectionClosedError

READ_SIZE: Final = 256 << 10
"""Bytes asked from the socket at once: four full records."""
MAX_PLAINTEXT: Final = 65535 - 16
"""Bytes one record carries besides its tag."""
_TAG: Final = 16


class Records:
    """Takes over a connection whose Noise handshake is done; for one reader and one writer at a time."""

    def __init__(self, session: Any) -> None:
        transport = session.conn
        self._raw = transport.read_writer.read_write_closer
        state = transport.noise_state.noise_protocol
        self._encrypt = state.cipher_state_encrypt.encrypt_with_ad
        self._decrypt = state.cipher_state_decrypt.decrypt_with_ad
        self._cipher = b""
        """Received, not yet a whole record."""
        self._plain: deque[memoryview] = deque()
        self._available = 0
        rest = session._drain(None)  # what came in the record that ended the negotiation
        if rest:
            self._add(rest)

    def take(self, count: int) -> bytes | memoryview | None:
        """`count` bytes if they have been decrypted already, as a view where they lie in one record."""
        if count > self._available:
            return None
        self._available -= count
        first = self._plain[0] if count else memoryview(b"")
        if count < len(first):
            self._plain[0] = first[count:]
            return first[:count]
        parts = []
        while count:
            first = self._plain.popleft()
            if count < len(first):
                self._plain.appendleft(first[count:])
                first = first[:count]
            parts.append(first)
            count -= len(first)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def read(self, count: int) -> bytes | memoryview:
        """Exactly `count` bytes. Raises `ConnectionClosedError` when the connection ends first."""
        while (data := self.take(count)) is None:
            chunk = await self._raw.read(READ_SIZE)
            if not chunk:
                raise ConnectionClosedError("connection closed", transport="noise")
            self._receive(chunk)
        return data

    async def write(self, frames: Iterable[bytes]) -> None:
        """Send frames, each in records of its own, with one write."""
        out: list[bytes] = []
        for frame in frames:
            for start in range(0, len(frame), MAX_PLAINTEXT):
                whole = start == 0 and len(frame) <= MAX_PLAINTEXT
                sealed = self._encrypt(None, frame if whole else frame[start : start + MAX_PLAINTEXT])
                out += (len(sealed).to_bytes(2, "big"), sealed)
        await self._raw.write(b"".join(out))

    def _receive(self, chunk: bytes) -> None:
        """Decrypt every whole record received so far. Raises what the cipher raises on forgery."""
        data = self._cipher + chunk if self._cipher else chunk
        view = memoryview(data)
        position = 0
        while len(data) - position >= 2:
            end = position + 2 + int.from_bytes(data[position : position + 2], "big")
            if end > len(data):
                break
            self._add(self._decrypt(None, view[position + 2 : end]))
            position = end
        self._cipher = data[position:]

    def _add(self, plaintext: bytes) -> None:
        if plaintext:
            self._plain.append(memoryview(plaintext))
            self._available += len(plaintext)

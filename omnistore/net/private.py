"""Private networks: nothing is said to whoever lacks the pre-shared key (libp2p's pnet spec; spec/08 §3).

Each direction of a connection begins with 24 random bytes; everything after them, Noise handshake
included, is XORed with XSalsa20's stream under the shared key and that nonce. This keeps strangers out
and hides nothing from members: secrecy and authenticity are Noise's, one layer above.

In place of py-libp2p 0.8.1's own, which takes Salsa20 and 8 bytes and so understands nobody else.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio
from Crypto.Cipher import Salsa20
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.connection.raw_connection import RawConnection

NONCE_SIZE: Final = 24
GREETING: Final = b"\x13/multistream/1.0.0\n"
"""The first bytes of each direction, once decrypted."""
READ: Final = 64 << 10
"""Most bytes read at once: what the allocator gives without asking the system for pages."""
PATIENCE: Final = 10.0
"""Seconds that a peer has to begin."""

_SIGMA: Final = struct.unpack("<4I", b"expand 32-byte k")
_ROUNDS: Final = (
    ((4, 0, 12, 7), (8, 4, 0, 9), (12, 8, 4, 13), (0, 12, 8, 18)),
    ((9, 5, 1, 7), (13, 9, 5, 9), (1, 13, 9, 13), (5, 1, 13, 18)),
    ((14, 10, 6, 7), (2, 14, 10, 9), (6, 2, 14, 13), (10, 6, 2, 18)),
    ((3, 15, 11, 7), (7, 3, 15, 9), (11, 7, 3, 13), (15, 11, 7, 18)),
    ((1, 0, 3, 7), (2, 1, 0, 9), (3, 2, 1, 13), (0, 3, 2, 18)),
    ((6, 5, 4, 7), (7, 6, 5, 9), (4, 7, 6, 13), (5, 4, 7, 18)),
    ((11, 10, 9, 7), (8, 11, 10, 9), (9, 8, 11, 13), (10, 9, 8, 18)),
    ((12, 15, 14, 7), (13, 12, 15, 9), (14, 13, 12, 13), (15, 14, 13, 18)),
)
"""Salsa20's double round: target, the two words added, and by how much their sum is rotated."""


def hsalsa20(key: bytes, nonce: bytes) -> bytes:
    """Derive a key from `key` (32 bytes) and `nonce` (16), as XSalsa20 does."""
    k, n = struct.unpack("<8I", key), struct.unpack("<4I", nonce)
    x = [_SIGMA[0], *k[:4], _SIGMA[1], *n, _SIGMA[2], *k[4:], _SIGMA[3]]
    for _ in range(10):
        for quarter in _ROUNDS:
            for target, one, other, bits in quarter:
                total = (x[one] + x[other]) & 0xFFFFFFFF
                x[target] ^= (total << bits | total >> 32 - bits) & 0xFFFFFFFF
    return struct.pack("<8I", *(x[i] for i in (0, 5, 10, 15, 6, 7, 8, 9)))


def xsalsa20(key: bytes, nonce: bytes) -> Any:
    """A cipher whose `encrypt` goes on where it stopped; `nonce`: 24 bytes."""
    return Salsa20.new(key=hsalsa20(key, nonce[:16]), nonce=nonce[16:])


class ProtectedConnection(RawConnection):  # type: ignore[misc]  # libp2p is untyped to us
    """A raw connection that only members understand."""

    def __init__(self, inner: Any, key: bytes) -> None:
        super().__init__(inner, inner.is_initiator, inner.get_connection_type())
        self._inner = inner
        self._key = key
        self._sending: Any = None
        self._receiving: Any = None
        self._out = bytearray()
        """Where what is sent is encrypted: large buffers made anew cost more than the cipher."""
        self._greeting = GREETING
        """What is still to come of it."""

    async def write(self, data: bytes) -> None:
        """Send everything, the nonce first."""
        nonce = b""
        if self._sending is None:
            nonce = os.urandom(NONCE_SIZE)
            self._sending = xsalsa20(self._key, nonce)
        start, end = len(nonce), len(nonce) + len(data)
        if end > len(self._out):
            self._out = bytearray(end)
        out = memoryview(self._out)[:end]
        out[:start] = nonce
        self._sending.encrypt(data, output=out[start:])
        await self._inner.write(out)

    async def read(self, n: int | None = None) -> bytes:
        """At most `n` bytes, none at the end. Raises `RawConnError` for a stranger."""
        if self._receiving is None:
            with trio.move_on_after(PATIENCE) as patience:
                self._receiving = xsalsa20(self._key, await self._read_nonce())
            if patience.cancelled_caught:
                raise RawConnError("the peer does not begin, as a member of this private swarm does")
        data: bytes = self._receiving.encrypt(await self._inner.read(READ if n is None else min(n, READ)))
        if self._greeting:
            await self._check_greeting(data)
        return data

    async def _read_nonce(self) -> bytes:
        nonce = b""
        while len(nonce) < NONCE_SIZE:
            piece = await self._inner.read(NONCE_SIZE - len(nonce))
            if not piece:
                raise RawConnError("the peer hung up: it is in no private swarm, or in another")
            nonce += piece
        return nonce

    async def _check_greeting(self, data: bytes) -> None:
        """Let a stranger go at once; libraries wait for the rest of what its noise seems to begin."""
        expected = self._greeting[: len(data)]
        if data[: len(expected)] != expected:
            await self.close()
            raise RawConnError("the peer is in no private swarm, or in another: the pre-shared keys differ")
        self._greeting = self._greeting[len(expected) :]

    def get_remote_address(self) -> tuple[str, int] | None:
        """Of the socket."""
        address: tuple[str, int] | None = self._inner.get_remote_address()
        return address

    def get_transport_addresses(self) -> list[Any]:
        """Of the socket."""
        addresses: list[Any] = self._inner.get_transport_addresses()
        return addresses


def install(upgrader: Any, key: bytes) -> None:
    """Have every connection of this host, dialled or accepted, begin with the shared key."""
    secure: Callable[..., Awaitable[Any]] = upgrader.upgrade_security

    async def upgrade_security(raw: Any, *args: Any, **kwargs: Any) -> Any:
        return await secure(ProtectedConnection(raw, key), *args, **kwargs)

    upgrader.upgrade_security = upgrade_security

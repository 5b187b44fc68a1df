"""Noise records in bulk: whatever goes in comes out, however the socket cuts it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.io.exceptions import ConnectionClosedError

from omnistore.net.records import MAX_PLAINTEXT, Records


class Cipher:
    """Noise's cipher state, as far as it matters here."""

    def __init__(self) -> None:
        self._key = ChaCha20Poly1305(bytes(32))
        self._nonce = 0

    def _next(self) -> bytes:
        self._nonce += 1
        return bytes(4) + self._nonce.to_bytes(8, "little")

    def encrypt_with_ad(self, ad: bytes | None, data: bytes) -> bytes:
        return self._key.encrypt(self._next(), data, ad)

    def decrypt_with_ad(self, ad: bytes | None, data: bytes) -> bytes:
        return self._key.decrypt(self._next(), data, ad)


class Socket:
    """Gives what was put into it, cut at the given sizes, then ends."""

    def __init__(self, cuts: list[int]) -> None:
        self.sent = b""
        self.writes = 0
        self._cuts = cuts

    async def write(self, data: bytes) -> None:
        self.sent += data
        self.writes += 1

    async def read(self, count: int) -> bytes:
        size = min(count, self._cuts.pop(0) if self._cuts else count)
        data, self.sent = self.sent[:size], self.sent[size:]
        return data


def connection(socket: Socket, rest: bytes = b"") -> Records:
    state = SimpleNamespace(cipher_state_encrypt=Cipher(), cipher_state_decrypt=Cipher())
    session: Any = SimpleNamespace(
        conn=SimpleNamespace(
            read_writer=SimpleNamespace(read_write_closer=socket),
            noise_state=SimpleNamespace(noise_protocol=state),
        ),
        _drain=lambda count: rest,
    )
    return Records(session)


@given(
    st.lists(st.binary(max_size=300), max_size=20),
    st.lists(st.integers(1, 200), max_size=60),
    st.lists(st.integers(1, 500), max_size=60),
    st.binary(max_size=30),
)
@settings(deadline=None)
def test_bytes_come_out_as_they_went_in(
    frames: list[bytes], cuts: list[int], reads: list[int], rest: bytes
) -> None:
    async def main() -> None:
        socket = Socket(cuts)
        records = connection(socket, rest)
        await records.write(frames)
        assert socket.writes == 1
        wanted = rest + b"".join(frames)
        got = b""
        for count in reads:
            if len(got) + count > len(wanted):
                break
            got += await records.read(count)
        assert got == wanted[: len(got)]
        got += await records.read(len(wanted) - len(got))
        assert got == wanted
        with pytest.raises(ConnectionClosedError):
            await records.read(1)

    trio.run(main)


def test_a_frame_larger_than_a_record_takes_several() -> None:
    async def main() -> None:
        socket = Socket([])
        records = connection(socket)
        frame = bytes(range(256)) * 600
        await records.write([frame])
        assert len(socket.sent) == len(frame) + 18 * -(-len(frame) // MAX_PLAINTEXT)
        assert await records.read(len(frame)) == frame

    trio.run(main)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_one_changed_bit_ends_it(position: int, change: int) -> None:
    async def main() -> None:
        socket = Socket([])
        records = connection(socket)
        await records.write([b"x" * 100, b"y" * 100])
        tampered = bytearray(socket.sent)
        tampered[position % len(tampered)] ^= change
        socket.sent = bytes(tampered)
        with pytest.raises((InvalidTag, ConnectionClosedError)):
            await records.read(200)

    trio.run(main)


def test_nothing_is_taken_before_it_is_there() -> None:
    records = connection(Socket([]), b"abc")
    assert records.take(4) is None
    assert records.take(2) == b"ab"
    assert records.take(0) == b""
    assert records.take(1) == b"c"
    assert records.take(1) is None

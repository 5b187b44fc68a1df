"""The cipher of private networks against known answers and another library; strangers in memory."""

from __future__ import annotations

import os
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.connection_types import ConnectionType
from libp2p.network.connection.exceptions import RawConnError
from nacl.secret import SecretBox

from omnistore.net.private import GREETING, NONCE_SIZE, ProtectedConnection, hsalsa20, xsalsa20

# Of "Cryptography in NaCl" (Bernstein, 2009), sections 8 and 10.
SHARED = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
FIRST = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
NONCE = bytes.fromhex("69696ee955b62b73cd62bda875fc73d68219e0036b7a0b37")
SECOND = bytes.fromhex("dc908dda0b9344a953629b733820778880f3ceb421bb61b91cbd4c3e66256ce4")
STREAM = bytes.fromhex("eea6a7251c1e72916d11c2cb214d3c252539121d8e234e652d651fa4c8cff880")


def test_known_answers() -> None:
    assert hsalsa20(SHARED, bytes(16)) == FIRST
    assert hsalsa20(FIRST, NONCE[:16]) == SECOND
    assert xsalsa20(FIRST, NONCE).encrypt(bytes(32)) == STREAM


@settings(deadline=None, max_examples=50)
@given(
    st.binary(min_size=32, max_size=32), st.binary(min_size=24, max_size=24), st.lists(st.integers(0, 200))
)
def test_the_stream_is_libsodiums_however_it_is_cut(key: bytes, nonce: bytes, cuts: list[int]) -> None:
    # A secret box is XSalsa20 from its 32nd byte on, behind a tag of 16.
    theirs = SecretBox(key).encrypt(bytes(sum(cuts)), nonce).ciphertext[16:]
    ours = xsalsa20(key, nonce)
    ours.encrypt(bytes(32))
    assert b"".join(ours.encrypt(bytes(count)) for count in cuts) == theirs


class Pipe:
    """One end of a connection in memory, as the library's raw connections are."""

    is_initiator = True

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.closed = False

    def get_connection_type(self) -> Any:
        return ConnectionType.DIRECT

    async def write(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def read(self, n: int | None = None) -> bytes:
        data: bytes = await self.stream.receive_some(n)
        return data

    async def close(self) -> None:
        self.closed = True


def pipes() -> tuple[Pipe, Pipe]:
    left, right = trio.testing.memory_stream_pair()
    return Pipe(left), Pipe(right)


@pytest.mark.trio
async def test_members_understand_each_other_byte_by_byte() -> None:
    one, other = pipes()
    key = os.urandom(32)
    left, right = ProtectedConnection(one, key), ProtectedConnection(other, key)
    said = GREETING + os.urandom(1000)
    await left.write(said[:7])
    await left.write(said[7:])
    heard = b"".join([await right.read(1) for _ in range(5)])
    while len(heard) < len(said):
        heard += await right.read(100)
    assert heard == said
    await right.write(GREETING + b"back")
    assert await left.read(100) == GREETING + b"back"


@pytest.mark.trio
async def test_the_nonce_goes_first_and_never_twice() -> None:
    one, other = pipes()
    key = os.urandom(32)
    connection = ProtectedConnection(one, key)
    await connection.write(GREETING)
    await connection.write(b"more")
    sent = await other.read(1000)
    assert len(sent) == NONCE_SIZE + len(GREETING) + 4
    assert xsalsa20(key, sent[:NONCE_SIZE]).encrypt(sent[NONCE_SIZE:]) == GREETING + b"more"
    again, fresh = pipes()
    await ProtectedConnection(again, key).write(GREETING)
    assert (await fresh.read(1000))[:NONCE_SIZE] != sent[:NONCE_SIZE]


@pytest.mark.trio
@pytest.mark.parametrize("stranger", ["plain", "another key"])
async def test_a_stranger_is_let_go_at_its_first_bytes(stranger: str) -> None:
    one, other = pipes()
    member = ProtectedConnection(one, os.urandom(32))
    if stranger == "plain":
        await other.write(GREETING + b"\x07/noise\n")
    else:
        await ProtectedConnection(other, os.urandom(32)).write(GREETING)
    with pytest.raises(RawConnError, match="the pre-shared keys differ"):
        await member.read(100)
    assert one.closed


@pytest.mark.trio
async def test_a_peer_that_hangs_up_or_says_nothing(autojump_clock: trio.testing.MockClock) -> None:
    one, other = pipes()
    await other.write(b"short")
    await other.stream.send_eof() if hasattr(other.stream, "send_eof") else await other.stream.aclose()
    with pytest.raises(RawConnError, match="hung up"):
        await ProtectedConnection(one, bytes(32)).read(1)
    silent, _kept = pipes()
    with pytest.raises(RawConnError, match="does not begin"):
        await ProtectedConnection(silent, bytes(32)).read(1)

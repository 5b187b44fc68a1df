"""Noise records in bulk: what goes in comes out, however the socket cuts it; all else is an error."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from omnistore.errors import LocalProtocolError, RemoteProtocolError
from omnistore.net.records import (
    LARGE_BUFFER,
    MAX_NONCE,
    MAX_PLAINTEXT,
    SHARED,
    SMALL_BUFFER,
    Opener,
    Sealer,
)

KEY = ChaCha20Poly1305(bytes(32))


class Plaintexts:
    """Takes everything in, and lends room of given sizes: whatever fits there goes there."""

    def __init__(self, rooms: list[int] | None = None) -> None:
        self.found = bytearray()
        self.records: list[int] = []
        self.rooms = list(rooms or [])
        self._lent = memoryview(b"")

    def room(self, size: int) -> memoryview | None:
        if not self.rooms or self.rooms.pop(0) < size:
            return None
        self._lent = memoryview(bytearray(size))
        return self._lent

    def filled_untrusted(self, size: int, now: float) -> None:
        assert size == len(self._lent)
        self.receive_untrusted(bytes(self._lent), now)

    def receive_untrusted(self, plaintext: bytes, now: float) -> None:
        self.found += plaintext
        self.records.append(len(plaintext))


def sealed(*payloads: bytes, nonce: int = 0) -> bytes:
    return bytes(Sealer(KEY, nonce).seal(payloads))


def opened(
    opener: Opener, data: bytes, cuts: list[int] | None = None, taker: Plaintexts | None = None
) -> bytes:
    """Feed `data`, cut where a socket might have cut it."""
    taker = taker or Plaintexts()
    cuts = list(cuts or [])
    while data:
        with opener.room() as room:
            count = min(len(room), len(data), cuts.pop(0) if cuts else len(data))
            room[:count] = data[:count]
        data = data[count:]
        opener.receive_untrusted(count, taker, 0.0)
    return bytes(taker.found)


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=300), st.sampled_from([SHARED, SHARED + 1, MAX_PLAINTEXT, 200_000]).map(bytes)
        ),
        max_size=20,
    ),
    st.lists(st.integers(1, 200), max_size=60),
    st.lists(st.integers(0, 70_000), max_size=20),
    st.integers(0, 2**63),
)
@settings(deadline=None)
def test_bytes_come_out_as_they_went_in(
    pieces: list[bytes], cuts: list[int], rooms: list[int], nonce: int
) -> None:
    """In whatever pieces, and whether or not somebody has room for them."""
    out, opener, taker = sealed(*pieces, nonce=nonce), Opener(KEY, nonce), Plaintexts(rooms)
    assert opened(opener, out, cuts, taker) == b"".join(pieces)
    opener.end_untrusted()
    assert all(0 < size <= MAX_PLAINTEXT for size in taker.records)


def test_small_pieces_share_a_record_while_they_fit() -> None:
    assert len(sealed(b"a" * 100, b"b" * 100)) == 2 + 200 + 16
    full = b"x" * MAX_PLAINTEXT
    assert len(sealed(b"a", full, b"b")) == 3 * (2 + 16) + MAX_PLAINTEXT + 2
    assert opened(Opener(KEY), sealed(b"a", full, b"b")) == b"a" + full + b"b"


def test_batches_follow_each_other() -> None:
    sealer, opener = Sealer(KEY), Opener(KEY)
    for size in (1, 70, 3_000, 60_000, 5):
        payload = bytes(size)
        assert opened(opener, bytes(sealer.seal([b"h", memoryview(payload)]))) == b"h" + payload


def test_a_large_piece_has_records_of_its_own_and_its_end_shares_one() -> None:
    taker = Plaintexts()
    opened(Opener(KEY), sealed(b"head", bytes(2 * MAX_PLAINTEXT + 9), b"head"), taker=taker)
    assert taker.records == [4, MAX_PLAINTEXT, MAX_PLAINTEXT, 9 + 4]


def test_a_forged_record_is_refused_wherever_it_belongs() -> None:
    data = bytearray(sealed(bytes(30_000)))
    data[20_000] ^= 1
    taker = Plaintexts([30_000])
    with pytest.raises(RemoteProtocolError, match="not authentic"):
        opened(Opener(KEY), bytes(data), taker=taker)
    assert not taker.found


def test_the_buffer_grows_for_bulk_and_shrinks_when_idle() -> None:
    opener, sealer = Opener(KEY), Sealer(KEY)
    data = b"".join(bytes(sealer.seal([bytes(MAX_PLAINTEXT)])) for _ in range(40))
    assert opened(opener, data) == bytes(40 * MAX_PLAINTEXT)
    assert opener.capacity == LARGE_BUFFER
    opener.relax()
    assert opener.capacity == SMALL_BUFFER
    sealer.relax()
    assert sealer.capacity == 0
    assert opened(opener, bytes(sealer.seal([b"on"]))) == b"on"


def test_what_waits_is_not_given_back() -> None:
    opener = Opener(KEY)
    record = sealed(bytes(20_000))
    assert opened(opener, record[:15_000]) == b""
    opener.relax()
    assert opened(opener, record[15_000:]) == bytes(20_000)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_one_changed_bit_ends_it(position: int, change: int) -> None:
    data = bytearray(sealed(b"x" * 50_000, b"y" * 50_000))
    data[position % len(data)] ^= change
    opener = Opener(KEY)
    with pytest.raises(RemoteProtocolError):
        opened(opener, bytes(data))
        opener.end_untrusted()


def test_a_replayed_record_is_named() -> None:
    record = sealed(b"once")
    opener = Opener(KEY)
    assert opened(opener, record) == b"once"
    with pytest.raises(RemoteProtocolError, match="record 1 is not authentic"):
        opened(opener, record)


def test_records_out_of_order_are_named() -> None:
    with pytest.raises(RemoteProtocolError, match="record 0 is not authentic"):
        opened(Opener(KEY), sealed(b"second", nonce=1))


@pytest.mark.parametrize("cut", [1, 2, 10])
def test_a_truncated_record_is_named(cut: int) -> None:
    opener = Opener(KEY)
    assert opened(opener, sealed(b"whole")[:cut]) == b""
    with pytest.raises(RemoteProtocolError, match="middle of a record"):
        opener.end_untrusted()


@pytest.mark.parametrize("size", [0, 1, 15])
def test_a_record_shorter_than_its_tag_is_named(size: int) -> None:
    with pytest.raises(RemoteProtocolError, match="shorter than its tag"):
        opened(Opener(KEY), size.to_bytes(2, "big") + bytes(size))


def test_an_empty_record_carries_nothing() -> None:
    assert opened(Opener(KEY), b"\0\x10" + KEY.encrypt(bytes(12), b"", None)) == b""


def test_keys_are_not_used_beyond_their_counter() -> None:
    last = Sealer(KEY, MAX_NONCE - 1)
    record = bytes(last.seal([b"last"]))
    with pytest.raises(LocalProtocolError, match="used up"):
        last.seal([b"one more"])
    opener = Opener(KEY, MAX_NONCE - 1)
    assert opened(opener, record) == b"last"
    with pytest.raises(RemoteProtocolError, match="more records"):
        opened(opener, record)


@given(st.binary(max_size=400))
def test_garbage_raises_one_class(data: bytes) -> None:
    opener = Opener(KEY)
    try:
        assert opened(opener, data) == b""
        opener.end_untrusted()
        assert not data
    except RemoteProtocolError:
        pass

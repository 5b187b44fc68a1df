"""The bytes of `/omni/transfer/1.0.0`: there and back, however they are split, and what is refused."""

from __future__ import annotations

import pytest
from blake3 import blake3

from omnistore import dagcbor
from omnistore.block import BLOCK_SIZE, Block
from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.errors import LocalProtocolError, RemoteProtocolError
from omnistore.transfer.buffers import Buffers
from omnistore.transfer.messages import (
    LIMITS,
    REQUESTER,
    SERVER,
    Cancel,
    Decoder,
    Deliver,
    Error,
    Have,
    Hello,
    Holds,
    Message,
    Missing,
    Want,
    encode,
)


def cid(number: int, codec: int = RAW) -> CID:
    return CID.of_digest(codec, blake3(bytes((number,))).digest())


PART = cid(0, DAG_CBOR)
ask = cid(1)
FROM_REQUESTER: list[Message] = [
    Want(0, (cid(1),)),
    Want(5, tuple(cid(n) for n in range(100))),
    Cancel((0, 3, 2)),
    Have((PART,)),
]
FROM_SERVER: list[Message] = [
    Hello(1024, 256),
    Deliver(0, b"x"),
    Deliver(LIMITS.number, bytes(100_000)),
    Missing((1, 2)),
    Holds(PART, None),
    Holds(PART, b"\xff\x01"),
    Error("busy", "come back later"),
]


def wire(message: Message) -> bytes:
    return encode(message) + (bytes(message.data) if isinstance(message, Deliver) else b"")


def prefixed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def framed(value: dagcbor.Value) -> bytes:
    return prefixed(dagcbor.encode(value))


def keys_swapped() -> bytes:
    """A `want` whose fields stand in the wrong order."""
    first = b"\x65first\x00"
    data = dagcbor.encode({"want": {"first": 0, "links": [ask]}})
    return data.replace(first, b"") + first


@pytest.mark.parametrize(
    ("accepts", "messages"), [(REQUESTER, FROM_REQUESTER), (SERVER, FROM_SERVER)], ids=["requester", "server"]
)
@pytest.mark.parametrize("piece", [1, 3, 7, 1000, 1 << 20])
def test_there_and_back_however_split(accepts: frozenset[str], messages: list[Message], piece: int) -> None:
    data = b"".join(map(wire, messages))
    decoder = Decoder(accepts)
    found: list[Message] = []
    for start in range(0, len(data), piece):
        found += decoder.feed_untrusted(data[start : start + piece])
    assert found == messages
    assert decoder.between_messages
    assert len(decoder.room()) == 4


def test_payloads_lie_in_lent_memory_that_is_used_again() -> None:
    buffers = Buffers()
    decoder = Decoder(SERVER, buffers=buffers)
    payload = bytes(range(256)) * 16
    (first,) = decoder.feed_untrusted(encode(Deliver(1, payload)) + payload)
    assert isinstance(first, Deliver) and first.data == payload
    assert isinstance(first.data, memoryview)
    memory, block = first.data.obj, Block.raw(first.data)
    kept = block.kept()
    buffers.take_back(first.data)
    with pytest.raises(ValueError, match="released"):
        bytes(block.data)
    (second,) = decoder.feed_untrusted(encode(Deliver(2, b"other")) + b"other")
    assert isinstance(second, Deliver) and second.data == b"other"
    assert isinstance(second.data, memoryview) and second.data.obj is memory
    assert kept.data == payload


def test_a_payload_may_be_put_into_its_place_by_others() -> None:
    decoder = Decoder(SERVER)
    payload = bytes(n % 251 for n in range(1000))
    assert decoder.feed_untrusted(encode(Deliver(7, payload)) + payload[:300]) == []
    found: Message | None = None
    for start, end in ((300, 900), (900, 1000)):
        assert found is None
        room = decoder.room()
        assert len(room) == 1000 - start
        room[: end - start] = payload[start:end]
        found = decoder.filled_untrusted(end - start)
    assert found == Deliver(7, payload)
    assert decoder.between_messages
    with pytest.raises(LocalProtocolError, match="more than there was room"):
        decoder.filled_untrusted(5)


def test_messages_too_may_be_put_into_their_place_by_others() -> None:
    decoder = Decoder(SERVER)
    data = encode(Hello(7, 9)) + encode(Deliver(3, b"payload")) + b"payload"
    found: list[Message] = []
    while data:
        room = decoder.room()
        room[:] = data[: len(room)]
        data = data[len(room) :]
        message = decoder.filled_untrusted(len(room))
        found += [] if message is None else [message]
    assert found == [Hello(7, 9), Deliver(3, b"payload")]


def test_buffers_kept_are_bounded_and_large_ones_are_not_kept() -> None:
    buffers = Buffers(spare=1)
    lent = [buffers.lend(BLOCK_SIZE), buffers.lend(1), buffers.lend(BLOCK_SIZE + 1)]
    first, second, large = (view.obj for view in lent)
    assert len(lent[2]) == BLOCK_SIZE + 1
    for view in reversed(lent):
        buffers.take_back(view)
    assert buffers.lend(3).obj is second
    fresh = buffers.lend(3).obj
    assert all(fresh is not other for other in (first, second, large))


def test_a_full_want_fits_in_a_message() -> None:
    many = tuple(CID.of_digest(RAW, n.to_bytes(32, "big")) for n in range(LIMITS.links))
    assert Decoder(REQUESTER).feed_untrusted(encode(Want(LIMITS.number - LIMITS.links, many)))


def test_a_message_over_the_limit_is_not_sent() -> None:
    many = tuple(CID.of_digest(RAW, n.to_bytes(32, "big")) for n in range(2000))
    with pytest.raises(LocalProtocolError, match="want"):
        encode(Want(0, many))


HOSTILE_TO_A_SERVER = {
    "no length": b"\0\0\0\0",
    "length of 4 GiB": b"\xff\xff\xff\xff",
    "length just over": (LIMITS.message + 1).to_bytes(4, "big"),
    "not cbor": b"\0\0\0\x01\xff",
    "a number": framed(1),
    "an empty map": framed({}),
    "two messages in one": framed({"want": {"first": 0, "links": [ask]}, "cancel": {"asks": [0]}}),
    "an unknown name": framed({"gimme": {}}),
    "a server's message": framed({"hello": {"asks": 1, "queries": 1}}),
    "a field missing": framed({"want": {"first": 0}}),
    "a field too many": framed({"want": {"first": 0, "links": [ask], "now": True}}),
    "no fields": framed({"want": None}),
    "fields that are a list": framed({"cancel": [0]}),
    "nothing wanted": framed({"want": {"first": 0, "links": []}}),
    "links that are text": framed({"want": {"first": 0, "links": [str(ask)]}}),
    "links that are bytes": framed({"want": {"first": 0, "links": [ask.binary]}}),
    "links that are a map": framed({"want": {"first": 0, "links": {"a": ask}}}),
    "one link twice": framed({"want": {"first": 0, "links": [ask, ask]}}),
    "a negative ask": framed({"want": {"first": -1, "links": [ask]}}),
    "an ask that is true": framed({"want": {"first": True, "links": [ask]}}),
    "an ask beyond 2^53": framed({"want": {"first": LIMITS.number, "links": [ask]}}),
    "too many links": framed(
        {"want": {"first": 0, "links": [CID.of_digest(RAW, n.to_bytes(32, "big")) for n in range(1025)]}}
    ),
    "nothing cancelled": framed({"cancel": {"asks": []}}),
    "one ask cancelled twice": framed({"cancel": {"asks": [1, 1]}}),
    "too many parts": framed(
        {"have": {"parts": [CID.of_digest(DAG_CBOR, n.to_bytes(32, "big")) for n in range(257)]}}
    ),
    "a longer form of an integer": prefixed(dagcbor.encode({"cancel": {"asks": [1]}})[:-1] + b"\x18\x01"),
    "trailing bytes inside": prefixed(dagcbor.encode({"cancel": {"asks": [1]}}) + b"\0"),
    "keys out of order": prefixed(keys_swapped()),
    "a tag that is no link": b"\0\0\0\x07" + bytes.fromhex("c249010000000000"),
    "nested beyond reason": b"\0\0\0\x28" + b"\x81" * 39 + b"\0",
    "an endless list": b"\0\0\0\x03" + b"\x9f\x00\xff",
}
HOSTILE_TO_A_REQUESTER = {
    "a requester's message": framed({"have": {"parts": [PART]}}),
    "an empty block": framed({"block": {"ask": 0, "size": 0}}),
    "a block of 2 MiB and a byte": framed({"block": {"ask": 0, "size": LIMITS.payload + 1}}),
    "a block of 2^63 bytes": framed({"block": {"ask": 0, "size": 1 << 63}}),
    "a block of -1 bytes": framed({"block": {"ask": 0, "size": -1}}),
    "a block whose size is text": framed({"block": {"ask": 0, "size": "1"}}),
    "a hello that takes no asks": framed({"hello": {"asks": 0, "queries": 1}}),
    "a hello that takes too many": framed({"hello": {"asks": 1 << 20, "queries": 1}}),
    "an empty bitmap": framed({"holds": {"part": PART, "blocks": b""}}),
    "a bitmap of 8 KiB and a byte": framed({"holds": {"part": PART, "blocks": bytes(8193)}}),
    "a bitmap that is a list": framed({"holds": {"part": PART, "blocks": [1]}}),
    "holds of nothing": framed({"holds": {"part": None, "blocks": None}}),
    "an error of unknown code": framed({"error": {"code": "teapot", "text": ""}}),
    "an error whose code is a list": framed({"error": {"code": [], "text": ""}}),
    "an endless error": framed({"error": {"code": "busy", "text": "x" * 257}}),
}


@pytest.mark.parametrize("fault", HOSTILE_TO_A_SERVER)
def test_a_server_refuses(fault: str) -> None:
    with pytest.raises(RemoteProtocolError):
        Decoder(REQUESTER).feed_untrusted(HOSTILE_TO_A_SERVER[fault])


@pytest.mark.parametrize("fault", HOSTILE_TO_A_REQUESTER)
def test_a_requester_refuses(fault: str) -> None:
    with pytest.raises(RemoteProtocolError):
        Decoder(SERVER).feed_untrusted(HOSTILE_TO_A_REQUESTER[fault])


def test_a_broken_decoder_takes_no_more() -> None:
    decoder = Decoder(SERVER)
    with pytest.raises(RemoteProtocolError):
        decoder.feed_untrusted(bytes(4))
    with pytest.raises(LocalProtocolError):
        decoder.feed_untrusted(b"")

"""The requester's half of a stream: every answer is held against what was asked."""

from __future__ import annotations

import pytest
from blake3 import blake3

from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.errors import LocalProtocolError, RemoteProtocolError
from omnistore.transfer.asks import Arrived, Asks, Refused
from omnistore.transfer.demand import Wanted
from omnistore.transfer.messages import (
    REQUESTER,
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


A, B, C = (Wanted(cid(n), 10) for n in range(3))
NODE = Wanted(cid(9, DAG_CBOR), 64, exact=False)
PART = cid(8, DAG_CBOR)


def greeted() -> Asks:
    asks = Asks()
    assert asks.receive_untrusted(encode(Hello(10, 10))) == [Hello(10, 10)]
    return asks


def sent(data: bytes) -> list[Message]:
    return Decoder(REQUESTER).feed_untrusted(data)


def block(ask: int, size: int = 10) -> bytes:
    return encode(Deliver(ask, bytes(size))) + bytes(size)


def test_asks_are_numbered_on() -> None:
    asks = greeted()
    assert sent(asks.want([A, B])) == [Want(0, (A.cid, B.cid))]
    assert sent(asks.want([C])) == [Want(2, (C.cid,))]
    assert sent(asks.cancel([C.cid, A.cid, NODE.cid])) == [Cancel((2, 0))]
    assert sent(asks.have([PART])) == [Have((PART,))]


def test_many_wants_become_several_messages() -> None:
    many = [Wanted(CID.of_digest(RAW, n.to_bytes(32, "big")), 1) for n in range(2500)]
    wants = sent(greeted().want(many))
    assert [(want.first, len(want.links)) for want in wants if isinstance(want, Want)] == [
        (0, 1024),
        (1024, 1024),
        (2048, 452),
    ]


def test_answers_in_any_order() -> None:
    asks = greeted()
    asks.want([A, B, C, NODE])
    asks.have([PART])
    data = block(2) + encode(Missing((1,))) + encode(Holds(PART, None)) + block(3, 500) + block(0)
    assert asks.receive_untrusted(data) == [
        Arrived(C, bytes(10)),
        Refused((B.cid,)),
        Holds(PART, None),
        Arrived(NODE, bytes(500)),
        Arrived(A, bytes(10)),
    ]
    assert sent(asks.want([A])) == [Want(4, (A.cid,))]


def test_nothing_is_asked_twice_at_once() -> None:
    asks = greeted()
    asks.want([A])
    with pytest.raises(LocalProtocolError):
        asks.want([A])


@pytest.mark.parametrize("split", [0, 1, 5])
def test_a_hello_and_a_block_may_come_in_the_same_bytes(split: int) -> None:
    asks = Asks()
    asks.want([A, B])
    data = encode(Hello(10, 10)) + block(0) + block(1)
    answers = asks.receive_untrusted(data[:split]) + asks.receive_untrusted(data[split:])
    assert answers == [Hello(10, 10), Arrived(A, memoryview(bytes(10))), Arrived(B, memoryview(bytes(10)))]


def test_an_error_may_come_instead_of_a_hello() -> None:
    assert Asks().receive_untrusted(encode(Error("busy", ""))) == [Error("busy", "")]


BAD = {
    "an answer before the hello": (Asks, block(0)),
    "a bitmap before the hello": (Asks, encode(Holds(PART, None))),
    "two hellos": (greeted, encode(Hello(1, 1))),
    "a block never asked for": (greeted, block(4)),
    "a block answered twice": (greeted, block(0) + block(0)),
    "a block after it was missing": (greeted, encode(Missing((0,))) + block(0)),
    "missing what was never asked": (greeted, encode(Missing((9,)))),
    "a block a byte too short": (greeted, block(0, 9)),
    "a block a byte too long": (greeted, block(0, 11)),
    "a part never asked about": (greeted, encode(Holds(cid(7, DAG_CBOR), None))),
    "a part answered twice": (greeted, encode(Holds(PART, None)) * 2),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_server_that_breaks_the_protocol(fault: str) -> None:
    make, data = BAD[fault]
    asks = make()
    asks.want([A, B])
    asks.have([PART])
    with pytest.raises(RemoteProtocolError):
        asks.receive_untrusted(data)


def test_a_wrong_length_is_noticed_before_the_payload() -> None:
    asks = greeted()
    asks.want([A])
    with pytest.raises(RemoteProtocolError, match="sent 11 bytes"):
        asks.receive_untrusted(encode(Deliver(0, bytes(11))))

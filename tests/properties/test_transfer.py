"""Transfer messages against anything: one class of error, and what is accepted is what was meant."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from omnistore import dagcbor
from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.errors import RemoteProtocolError
from omnistore.net.interface import spread
from omnistore.transfer.asks import Answer, Asks
from omnistore.transfer.demand import Demand, Holdings, Wanted
from omnistore.transfer.heads import decode_head, encode_head
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
from omnistore.transfer.serve import Serving

digests = st.binary(min_size=32, max_size=32)
raw = digests.map(lambda digest: CID.of_digest(RAW, digest))
parts = digests.map(lambda digest: CID.of_digest(DAG_CBOR, digest))
numbers = st.integers(0, LIMITS.number)
asks = st.lists(numbers, min_size=1, max_size=20, unique=True).map(tuple)
from_requester = st.one_of(
    st.builds(
        Want,
        st.integers(0, LIMITS.number - 20),
        st.lists(raw, min_size=1, max_size=20, unique=True).map(tuple),
    ),
    st.builds(Cancel, asks),
    st.builds(Have, st.lists(parts, min_size=1, max_size=20, unique=True).map(tuple)),
)
from_server = st.one_of(
    st.builds(Hello, st.integers(1, LIMITS.asks), st.integers(1, LIMITS.queries)),
    st.builds(Deliver, numbers, st.binary(min_size=1, max_size=300)),
    st.builds(Missing, asks),
    st.builds(Holds, parts, st.none() | st.binary(min_size=1, max_size=50)),
    st.builds(Error, st.sampled_from(["busy", "closing"]), st.text(max_size=50)),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text() | st.binary() | raw,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
shaped = st.dictionaries(
    st.sampled_from(sorted(REQUESTER | SERVER)),
    st.dictionaries(
        st.sampled_from(
            ["first", "links", "asks", "parts", "ask", "size", "part", "blocks", "code", "text", "queries"]
        ),
        values,
        max_size=3,
    ),
    min_size=1,
    max_size=1,
)


def wire(message: Message) -> bytes:
    return encode(message) + (bytes(message.data) if isinstance(message, Deliver) else b"")


def fed(decoder: Decoder, data: bytes, cuts: list[int]) -> list[Message]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    found: list[Message] = []
    for start, end in pairwise(edges):
        found += decoder.feed_untrusted(data[start:end])
    return found


@given(
    st.lists(from_requester, max_size=5), st.lists(from_server, max_size=5), st.lists(st.integers(0, 1 << 20))
)
def test_there_and_back(asked: list[Message], answered: list[Message], cuts: list[int]) -> None:
    for accepts, messages in ((REQUESTER, asked), (SERVER, answered)):
        decoder = Decoder(accepts)
        assert fed(decoder, b"".join(map(wire, messages)), cuts) == messages
        assert decoder.between_messages


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
def test_heads_are_what_the_general_encoder_makes_of_them(ask: int, size: int) -> None:
    head = encode_head(ask, size)
    assert head == dagcbor.encode({"block": {"ask": ask, "size": size}})
    assert decode_head(head) == (ask, size)


INTEGERS = st.one_of(
    st.integers(0, 23).map(lambda n: bytes((n,))),
    st.sampled_from([24, 25, 26, 27]).flatmap(
        lambda first: st.binary(min_size=0, max_size=8).map(lambda rest: bytes((first,)) + rest)
    ),
    st.binary(max_size=9),
)


@given(INTEGERS, INTEGERS, st.binary(max_size=2), st.integers(0, 40), st.integers(0, 255), st.booleans())
def test_a_head_is_taken_for_one_only_where_the_general_decoder_takes_it_for_the_same(
    ask: bytes, size: bytes, more: bytes, at: int, byte: int, damaged: bool
) -> None:
    data = bytearray(b"\xa1\x65block\xa2\x63ask" + ask + b"\x64size" + size + more)
    if damaged:
        data[at % len(data)] = byte
    found = decode_head(bytes(data))
    try:
        value = dagcbor.decode_untrusted(bytes(data), limit=1 << 16)
    except RemoteProtocolError:
        assert found is None
        return
    block = value.get("block") if isinstance(value, dict) else None
    whole = isinstance(value, dict) and len(value) == 1 and isinstance(block, dict)
    if found is not None:
        assert value == {"block": {"ask": found[0], "size": found[1]}}
    elif whole and block.keys() == {"ask", "size"}:
        # The same shape with something else than a number of the right kind in it.
        assert not all(type(number) is int and number >= 0 for number in block.values())


@given(st.lists(from_server, max_size=8), st.lists(st.integers(1, 200), max_size=60))
def test_room_by_room_the_answers_are_those_of_the_bytes(messages: list[Message], cuts: list[int]) -> None:
    """However many rooms one receive fills; a broken protocol comes behind what was good."""
    data = b"".join(map(wire, [Hello(10, 10), *messages]))
    sides = [Asks(), Asks()]
    for side in sides:
        side.want([Wanted(CID.of_digest(RAW, bytes([n]) * 32), 100, exact=False) for n in range(5)])
    found: list[list[Answer]] = [[], []]
    faults = [False, False]
    try:
        for byte in data:
            found[0] += sides[0].receive_untrusted(bytes((byte,)))
    except RemoteProtocolError:
        faults[0] = True
    rest, sizes = data, iter(cuts)
    try:
        while rest:
            count = min(len(rest), next(sizes, len(rest)))
            spread(rest[:count], sides[1].room(), sides[1].next_room)
            rest = rest[count:]
            found[1] += sides[1].answers_untrusted(count)
        sides[1].room()
    except RemoteProtocolError:
        faults[1] = True
    assert found[0] == found[1]
    assert faults[0] == faults[1]


@given(st.sampled_from([REQUESTER, SERVER]), st.binary(max_size=400), st.lists(st.integers(0, 1 << 20)))
def test_any_bytes(accepts: frozenset[str], data: bytes, cuts: list[int]) -> None:
    with suppress(RemoteProtocolError):
        fed(Decoder(accepts), data, cuts)


@given(st.sampled_from([REQUESTER, SERVER]), shaped | values)
def test_any_value_in_a_frame(accepts: frozenset[str], value: dagcbor.Value) -> None:
    data = dagcbor.encode(value)
    try:
        messages = Decoder(accepts).feed_untrusted(len(data).to_bytes(4, "big") + data)
    except RemoteProtocolError:
        return
    for message in messages:
        assert wire(message) == len(data).to_bytes(4, "big") + data


@given(st.lists(from_server, max_size=6), st.integers(0, 400), st.integers(0, 255), st.data())
def test_a_requester_survives_any_server(
    messages: list[Message], at: int, byte: int, data: st.DataObject
) -> None:
    """Real messages, some bytes altered: an answer to something asked, or `RemoteProtocolError`."""
    side = Asks()
    wanted = [Wanted(CID.of_digest(RAW, bytes([n]) * 32), 100, exact=n % 2 == 0) for n in range(5)]
    side.want(wanted)
    stream = bytearray(b"".join(map(wire, [Hello(10, 10), *messages])))
    if data.draw(st.booleans()):
        stream[at % len(stream)] = byte
    with suppress(RemoteProtocolError):
        side.receive_untrusted(bytes(stream))


@given(st.lists(from_requester, max_size=10))
def test_a_server_survives_any_requester(messages: list[Want | Cancel | Have]) -> None:
    serving = Serving()
    opened = serving.open("p", 0.0)
    assert opened is not None
    try:
        for message in messages:
            serving.receive_untrusted(opened[0], message)
    except RemoteProtocolError:
        serving.close(opened[0])
    assert serving.held == 0


@settings(max_examples=200)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12), min_size=1, max_size=4),
    st.lists(st.tuples(st.sampled_from("tfr"), st.integers(0, 30)), max_size=60),
)
def test_demand_against_sets(groups: list[list[int]], verbs: list[tuple[str, int]]) -> None:
    """Blocks may lie in several groups; the masks must agree with three plain sets."""
    demand, everything = Demand(), Holdings()
    pending: set[int] = set()
    for number, links in enumerate(groups):
        blocks = [Wanted(CID.of_digest(RAW, bytes([n]) * 32), 1) for n in links]
        part = CID.of_digest(DAG_CBOR, bytes([number]) * 32)
        group = demand.add(part, blocks, (1 << len(blocks)) - 1, 0.0)
        assert group is not None
        everything.learn(group, group.all)
        pending.update(links)
    taken: set[int] = set()
    for verb, number in verbs:
        cid = CID.of_digest(RAW, bytes([number]) * 32)
        if verb == "t" and number in pending:
            demand.take(cid)
            pending.remove(number)
            taken.add(number)
        elif verb == "r" and number in taken:
            demand.release(cid)
            taken.remove(number)
            pending.add(number)
        elif verb == "f" and number in taken:
            demand.finish(cid)
            taken.remove(number)
        assert {cid.digest[0] for cid in demand.missing()} == pending | taken
        assert demand.pending == bool(pending)
    chosen = set()
    for block in demand.choose(everything):
        demand.take(block.cid)
        chosen.add(block.cid.digest[0])
    assert chosen == pending

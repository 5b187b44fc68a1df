"""Deterministic dag-cbor: one value, one encoding; all else is refused, cheaply and in one class."""

from __future__ import annotations

import resource
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnistore.block import Block
from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.dagcbor import MAX_DEPTH, MAX_ITEMS, Value, decode_untrusted, encode
from omnistore.errors import LocalProtocolError, MalformedManifest, RemoteProtocolError

LINK = Block.node(b"\xa0").cid
NODE_LIMIT = 2 << 20
CIDS = st.builds(CID.of_digest, st.sampled_from([RAW, DAG_CBOR]), st.binary(min_size=32, max_size=32))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.sampled_from(
        [0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1, -1, -24, -25, -(2**63)]
    )
    | TEXT
    | st.binary(max_size=300)
    | CIDS
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=30) | st.dictionaries(TEXT, inner, max_size=30),
    max_leaves=40,
)


def levels(value: Any) -> int:
    if isinstance(value, CID):
        return 1
    if isinstance(value, list):
        return 1 + max(map(levels, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(levels, value.values()), default=0)
    return 0


def plainly(value: Any) -> bytes:
    """An encoder written from the specification alone, to hold ours against."""

    def head(major: int, number: int) -> bytes:
        if number < 24:
            return bytes([major << 5 | number])
        for code, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
            if number < 1 << 8 * size:
                return bytes([major << 5 | code]) + number.to_bytes(size, "big")
        raise AssertionError("beyond 64 bits")

    if value is None:
        return b"\xf6"
    if isinstance(value, bool):
        return b"\xf5" if value else b"\xf4"
    if isinstance(value, int):
        return head(0, value) if value >= 0 else head(1, -1 - value)
    if isinstance(value, bytes):
        return head(2, len(value)) + value
    if isinstance(value, str):
        return head(3, len(value.encode())) + value.encode()
    if isinstance(value, CID):
        return b"\xd8\x2a\x58\x25\x00" + value.binary
    if isinstance(value, list):
        return head(4, len(value)) + b"".join(map(plainly, value))
    pairs = sorted((len(key.encode()), key.encode(), key) for key in value)
    return head(5, len(pairs)) + b"".join(plainly(key) + plainly(value[key]) for _, _, key in pairs)


def refusal(data: bytes, limit: int = NODE_LIMIT) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_untrusted(data, limit=limit)
    return caught.value.message


@given(VALUES)
def test_what_is_encoded_is_decoded(value: Any) -> None:
    if levels(value) <= MAX_DEPTH:
        assert decode_untrusted(encode(value), limit=NODE_LIMIT) == value
    else:
        with pytest.raises(LocalProtocolError):
            encode(value)


@given(VALUES)
def test_an_independent_encoder_agrees(value: Any) -> None:
    if levels(value) <= MAX_DEPTH:
        assert encode(value) == plainly(value)


@given(st.dictionaries(TEXT, st.integers(0, 9)), st.randoms(use_true_random=False))
def test_the_order_of_a_dict_does_not_matter(value: dict[str, int], rng: Any) -> None:
    keys = list(value)
    rng.shuffle(keys)
    assert encode({key: value[key] for key in keys}) == encode(value)


@given(VALUES, st.data())
def test_a_flipped_bit_is_another_value_or_is_refused(value: Any, data: st.DataObject) -> None:
    if levels(value) > MAX_DEPTH:
        return
    altered = bytearray(encode(value))
    place = data.draw(st.integers(0, len(altered) - 1))
    altered[place] ^= data.draw(st.integers(1, 255))
    accepted_only_if_canonical(bytes(altered))


@given(st.binary(max_size=100))
def test_any_bytes_are_canonical_or_refused(data: bytes) -> None:
    accepted_only_if_canonical(data)


@given(VALUES, st.data())
def test_truncated_or_continued(value: Any, data: st.DataObject) -> None:
    if levels(value) <= MAX_DEPTH:
        whole = encode(value)
        refusal(whole[: data.draw(st.integers(0, len(whole) - 1))])
        refusal(whole + data.draw(st.binary(min_size=1, max_size=9)))


def accepted_only_if_canonical(data: bytes) -> None:
    try:
        value = decode_untrusted(data, limit=1000, error=MalformedManifest, what="a node")
    except MalformedManifest as error:
        assert error.message.startswith("a node ")
        assert len(error.message) < 400
    else:
        assert plainly(value) == data


BAD = {
    "nothing": "",
    "a trailing byte": "0000",
    "a second item": "a0a0",
    "half-precision float": "f90000",
    "float": "fa00000000",
    "double": "fb3ff8000000000000",
    "NaN": "f97e00",
    "infinity": "f97c00",
    "undefined": "f7",
    "simple value 16": "f0",
    "simple value 255": "f8ff",
    "false as a long simple value": "f814",
    "break alone": "ff",
    "1 in two bytes": "1801",
    "255 in three bytes": "1900ff",
    "65535 in five bytes": "1a0000ffff",
    "2^32-1 in nine bytes": "1b00000000ffffffff",
    "-1 in two bytes": "3800",
    "a text's length in two bytes": "780161",
    "a byte string's length in two bytes": "580100",
    "a list's length in two bytes": "980100",
    "a map's length in two bytes": "b801616100",
    "a tag in three bytes": "d9002a" + encode(LINK).hex()[4:],
    "integer below -2^63": "3b8000000000000000",
    "integer -2^64": "3bffffffffffffffff",
    "bignum": "c249010000000000000000",
    "negative bignum": "c349010000000000000000",
    "indefinite byte string": "5f4100ff",
    "indefinite text": "7f6161ff",
    "indefinite list": "9f00ff",
    "indefinite map": "bf616100ff",
    "duplicate key": "a2616100616101",
    "keys out of order": "a2616200616100",
    "longer key first": "a262616100616200",
    "integer key": "a10000",
    "byte string key": "a1416100",
    "null key": "a1f600",
    "list key": "a18000",
    "text is not UTF-8": "61ff",
    "text is a lone surrogate": "63eda080",
    "overlong UTF-8": "62c080",
    "key is not UTF-8": "a161ff00",
    "truncated integer": "1900",
    "truncated text": "6261",
    "truncated byte string": "4200",
    "truncated list": "8200",
    "truncated map": "a16161",
    "truncated tag": "d82a",
    "byte string of 2^63-1 bytes": "5b7fffffffffffffff",
    "byte string of 2^64-1 bytes": "5bffffffffffffffff",
    "text of 2^64-1 bytes": "7bffffffffffffffff",
    "list of 2^64-1 items": "9bffffffffffffffff",
    "map of 2^64-1 pairs": "bbffffffffffffffff",
    "reserved length 28": "1c",
    "reserved length 31 of an integer": "1f",
    "a list that holds itself": "d81c81d81d00",
    "a shared value": "82d81c80d81d00",
    "date": "c074323031332d30332d32315432303a30343a30305a",
    "timestamp": "c11a514b67b0",
    "decimal fraction": "c48221196ab3",
    "big float of 2^63": "c5821b7fffffffffffffff01",
    "rational": "d81e820103",
    "regular expression": "d8236161",
    "MIME message": "d8246161",
    "UUID": "d82550" + "00" * 16,
    "set": "d9010280",
    "string reference": "d81900",
    "namespace of string references": "d9010080",
    "IPv4 address": "d8344401020304",
    "self-described CBOR": "d9d9f700",
    "unknown tag": "d9ffff00",
    "tag 24": "d8184100",
    "link of text": "d82a6161",
    "link of nothing": "d82a40",
    "link without the leading zero": "d82a5824" + LINK.binary.hex(),
    "link with a byte over": "d82a582600" + LINK.binary.hex() + "00",
    "link of another hash": "d82a582500" + "01711220" + LINK.digest.hex(),
    "link of another codec": "d82a582500" + "01701e20" + LINK.digest.hex(),
    "link of a link": "d82a" + encode(LINK).hex(),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input(fault: str) -> None:
    assert "dag-cbor" in refusal(bytes.fromhex(BAD[fault]))


def tagged() -> Iterator[tuple[int, bytes]]:
    """Every tag that cbor2 may know, and some that nobody does, around bodies that suit them."""
    bodies = [cbor2.dumps(body) for body in (0, b"\0", "", "a", [], {}, [0, 0], [1, 2**62], 2**64 - 1)]
    for tag in [*range(300), 1004, 1040, 4444, 43000, 55799, 55800, 2**16, 2**32, 2**64 - 1]:
        for body in bodies:
            yield tag, cbor2.dumps(cbor2.CBORTag(tag, 0))[:-1] + body


def test_every_tag_is_refused() -> None:
    """By itself, in a list, and as a key: interpreting one is what costs memory or makes cycles."""
    started = time.process_time()
    for tag, item in tagged():
        for data in (item, b"\x81" + item, b"\xa1" + item + b"\0"):
            assert "dag-cbor" in refusal(data), tag
    assert time.process_time() - started < 10


@pytest.mark.parametrize("leaf", [0, [], {}, LINK, b"x"], ids=str)
def test_the_deepest_nesting(leaf: Any) -> None:
    """Encoder and decoder draw the line in one place, for every kind of leaf."""
    room = MAX_DEPTH - levels(leaf)
    for wrap in (lambda value: [value], lambda value: {"k": value}):
        value = leaf
        for _ in range(room):
            value = wrap(value)
        assert decode_untrusted(encode(value), limit=NODE_LIMIT) == value
        with pytest.raises(LocalProtocolError, match="deeper than 16"):
            encode(wrap(value))
        refusal(plainly(wrap(value)))


@pytest.mark.parametrize("opening", ["81", "a16161", "d82a", "d81c81", "9f", "bf6161", "c2"])
@pytest.mark.parametrize("depth", [17, 1000, 100_000])
def test_deep_input(opening: str, depth: int) -> None:
    refusal(bytes.fromhex(opening) * depth + b"\0")


def test_a_list_that_holds_itself_is_not_encoded() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(LocalProtocolError, match="deeper"):
        encode(value)


def test_the_number_of_values() -> None:
    most = [0] * (MAX_ITEMS - 1)
    assert decode_untrusted(encode(most), limit=NODE_LIMIT) == most
    with pytest.raises(LocalProtocolError, match="more than 262144 values"):
        encode([*most, 0])
    assert "more than 262144 values" in refusal(plainly([*most, 0]))


@pytest.mark.parametrize(
    "item", [b"\x00", b"\x80", b"\xa0", b"\x81\x00", b"\xa1\x60\x00", b"\x60", b"\x40"], ids=bytes.hex
)
def test_two_mebibytes_of_nothing_cost_little(item: bytes) -> None:
    """The worst amplification there is: at most what one pass over small objects costs."""
    count = (NODE_LIMIT - 5) // len(item)
    data = b"\x9a" + count.to_bytes(4, "big") + item * count
    started = time.process_time()
    assert "values" in refusal(data)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("head", ["5b", "7b", "9b", "bb"])
@pytest.mark.parametrize("length", [2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_declared_length_allocates_nothing(head: str, length: int) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        refusal(bytes.fromhex(head) + length.to_bytes(8, "big") + bytes(100))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 64 << 10, f"{grown} KiB"


def test_the_limit_is_looked_at_first() -> None:
    assert decode_untrusted(b"\x00", limit=1) == 0
    assert refusal(b"\x80\x80", limit=1) == "a message has 2 bytes; at most 1 are allowed"


def test_a_message_does_not_repeat_the_input() -> None:
    key = plainly("\x1b[2J" + "k" * 100_000)
    message = refusal(b"\xa2" + key + b"\0" + key + b"\0")
    assert len(message) < 300
    assert "\x1b" not in message


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_read(kind: Any) -> None:
    assert decode_untrusted(kind(b"\x81\x41\x00"), limit=9) == [b"\0"]


class Text(str):
    """A text that is not quite one."""


@pytest.mark.parametrize(
    "value",
    [
        1.0, float("nan"), 2**64, -(2**63) - 1, "\ud800",
        {"\udfff": 0}, {1: 0}, {b"a": 0}, {None: 0}, {"a": {1: 2}},
        object(), {1, 2}, frozenset(), bytearray(b"x"), memoryview(b"x"), 1j, Text("x"), {Text("x"): 0},
        cbor2.undefined, cbor2.CBORTag(42, b"\0"), cbor2.CBORSimpleValue(16),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_not_in_the_data_model_is_not_encoded(value: Value) -> None:
    with pytest.raises(LocalProtocolError, match="can not encode"):
        encode(value)
    with pytest.raises(LocalProtocolError, match="can not encode"):
        encode([value])


def test_a_tuple_is_a_list() -> None:
    assert encode((1, (2,))) == encode([1, [2]])

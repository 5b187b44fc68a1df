"""Names' records: what is refused, and that a record says what was signed."""

from __future__ import annotations

from typing import Any

import pytest
from blake3 import blake3

from omnistore import dagcbor
from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.dht.names import (
    MAX_RECORD,
    NameRules,
    check_name,
    name_key,
    publisher_untrusted,
    record_untrusted,
    select,
    sign,
)
from omnistore.dht.values import MAX_KEY, best_index, check_value_untrusted
from omnistore.errors import BadNameRecord, InputError, RemoteProtocolError
from omnistore.keys import PrivateKey

KEY, OTHER = PrivateKey(bytes(31) + b"\x01"), PrivateKey(bytes(31) + b"\x02")
VALUE = CID.of_digest(DAG_CBOR, blake3(b"one").digest())
ANOTHER = CID.of_digest(DAG_CBOR, blake3(b"two").digest())
GOOD = sign(KEY, "llama-3.1", VALUE, 7, 2_000_000_000)
NODE: dict[str, Any] = dict(dagcbor.decode_untrusted(GOOD.encode(), limit=MAX_RECORD))  # type: ignore[arg-type]


def changed(**fields: Any) -> bytes:
    return dagcbor.encode(NODE | {name.replace("_", "-"): value for name, value in fields.items()})


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "not cbor": b"\xff\x00",
    "trailing bytes": GOOD.encode() + b"\x00",
    "too long": dagcbor.encode(NODE | {"name": "a" * MAX_RECORD}),
    "a list": dagcbor.encode([1, 2]),
    "a field missing": dagcbor.encode({name: value for name, value in NODE.items() if name != "value"}),
    "a field more": changed(more=1),
    "another version": changed(omni=2),
    "a version that is true": changed(omni=True),
    "a name of capitals": changed(name="LLaMA"),
    "a name with a slash": changed(name="a/b"),
    "a name with a newline": changed(name="llama-3.1\n"),
    "a name of another alphabet": changed(name="lӏama"),
    "an empty name": changed(name=""),
    "a long name": changed(name="a" * 64),
    "a name that is a number": changed(name=1),
    "another name": changed(name="llama-3.2"),
    "another value": changed(value=ANOTHER),
    "a raw block": changed(value=CID.of_digest(RAW, VALUE.digest)),
    "a value as text": changed(value=str(VALUE)),
    "a higher number": changed(sequence=8),
    "number zero": changed(sequence=0),
    "a negative number": changed(sequence=-1),
    "a number that is true": changed(sequence=True),
    "a huge number": changed(sequence=1 << 53),
    "a later expiry": changed(not_after=2_000_000_001),
    "no expiry": changed(not_after=None),
    "another publisher": changed(publisher=OTHER.public.protobuf),
    "a publisher of small order": changed(publisher=OTHER.public.protobuf[:4] + bytes(32)),
    "an RSA publisher": changed(publisher=b"\x08\x00\x12\x20" + bytes(32)),
    "a publisher as text": changed(publisher=KEY.public.peer_id),
    "a flipped signature": changed(signature=bytes((GOOD.signature[0] ^ 1,)) + GOOD.signature[1:]),
    "a short signature": changed(signature=GOOD.signature[:63]),
    "no signature": changed(signature=b""),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_bad_record_is_refused(fault: str) -> None:
    with pytest.raises(BadNameRecord):
        record_untrusted(HOSTILE[fault])
    with pytest.raises(RemoteProtocolError):
        check_value_untrusted({"omni-name": NameRules()}, name_key(KEY.public, "llama-3.1"), HOSTILE[fault])


def test_a_signature_for_something_else_is_none() -> None:
    payload = dagcbor.encode(
        {name: value for name, value in NODE.items() if name not in ("publisher", "signature")}
    )
    elsewhere = KEY.sign(domain="omni-manifest", payload_type=b"/omni/name/1", payload=payload)
    with pytest.raises(BadNameRecord, match="does not verify"):
        record_untrusted(changed(signature=elsewhere))


def test_what_was_signed_comes_back() -> None:
    assert record_untrusted(GOOD.encode()) == GOOD
    assert len(GOOD.encode()) < MAX_RECORD


def test_the_longest_name_fits_record_and_key() -> None:
    longest = sign(KEY, "a" * 63, VALUE, (1 << 53) - 1, (1 << 53) - 1)
    assert record_untrusted(longest.encode()) == longest
    assert len(name_key(KEY.public, longest.name)) <= MAX_KEY


def test_a_record_belongs_under_its_own_key_only() -> None:
    namespaces = {"omni-name": NameRules()}
    check_value_untrusted(namespaces, name_key(KEY.public, "llama-3.1"), GOOD.encode())
    for key in (name_key(OTHER.public, "llama-3.1"), name_key(KEY.public, "llama-3.2"), b"/omni-name/x"):
        with pytest.raises(RemoteProtocolError):
            check_value_untrusted(namespaces, key, GOOD.encode())


def test_nodes_keep_the_higher_number_and_the_renewed_equal() -> None:
    namespaces, key = {"omni-name": NameRules()}, name_key(KEY.public, "llama-3.1")
    newer = sign(KEY, "llama-3.1", ANOTHER, 8, 1).encode()
    assert best_index(namespaces, key, [newer, GOOD.encode()]) == 0
    assert best_index(namespaces, key, [GOOD.encode(), newer]) == 1
    assert best_index(namespaces, key, [GOOD.encode(), GOOD.encode()]) == 1


@pytest.mark.parametrize("name", ["", "A", "a" * 64, "a/b", "a b", "-a", ".a", "a\n", "é"])
def test_names_that_can_not_be_published(name: str) -> None:
    with pytest.raises(InputError):
        check_name(name)
    with pytest.raises(InputError):
        sign(KEY, name, VALUE, 1, 1)


def test_a_block_of_weights_is_no_value() -> None:
    with pytest.raises(InputError, match="no manifest"):
        sign(KEY, "a", CID.of_digest(RAW, VALUE.digest), 1, 1)


def test_publishers_are_ed25519_peer_ids() -> None:
    assert publisher_untrusted(KEY.public.peer_id) == KEY.public
    for text in (
        "",
        "12D3KooW",
        KEY.public.peer_id[:-1],
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
        "l",
    ):
        with pytest.raises(InputError):
            publisher_untrusted(text)


def test_an_older_record_than_one_seen_is_a_rollback() -> None:
    seen = sign(KEY, "llama-3.1", ANOTHER, 8, 2_000_000_000)
    with pytest.raises(BadNameRecord, match=r"number 7.*number 8 was seen") as caught:
        select([GOOD], seen, now=0)
    assert str(ANOTHER) in (caught.value.remedy or "")


def test_an_expired_record_is_refused_also_beside_an_older_one_in_force() -> None:
    ended = sign(KEY, "llama-3.1", ANOTHER, 8, 1_000_000)
    with pytest.raises(BadNameRecord, match="expired 2 days ago"):
        select([ended, GOOD], None, now=1_000_000 + 2 * 86400)
    assert select([ended, GOOD], None, now=1_000_000).record == ended

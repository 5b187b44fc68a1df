"""Names: a publisher's signed word on which CID a name stands for (pure; spec/07-names).

A record is deterministic dag-cbor, at most `MAX_RECORD` bytes, kept in the DHT under a key that names
publisher and name. `select` decides between what several peers answered and what was seen before: the
highest sequence number wins, an older one never does. Fetches nothing and remembers nothing.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from omnistore import dagcbor
from omnistore.cid import CID, DAG_CBOR
from omnistore.dht.records import peer_id_bytes_untrusted
from omnistore.errors import BadNameRecord, BadSignature, InputError, RemoteProtocolError
from omnistore.keys import PrivateKey, PublicKey

FORMAT_VERSION: Final = 1
NAMESPACE: Final = "omni-name"
SIGNATURE_DOMAIN: Final = "omni-name"
SIGNATURE_PAYLOAD_TYPE: Final = b"/omni/name/1"
MAX_RECORD: Final = 512
"""Bytes of a record; the longest there can be has under 300."""
MAX_NAME: Final = 63
"""Characters; with a peer ID, the DHT's key stays within 128 bytes."""
MAX_NUMBER: Final = 1 << 53
"""Sequence numbers and times stay below: every language's integers reach it."""

_NAME: Final = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{MAX_NAME - 1}}}")
_FIELDS: Final = frozenset({"omni", "name", "value", "sequence", "not-after", "publisher", "signature"})


@dataclass(frozen=True, slots=True)
class NameRecord:
    """A name's record whose signature was checked, or made here."""

    name: str
    value: CID
    """The signed manifest's CID."""
    sequence: int
    """Counts the publisher's records of this name, from 1."""
    not_after: int
    """Unix seconds; afterwards it is not to be believed."""
    publisher: PublicKey
    signature: bytes

    def encode(self) -> bytes:
        """Its bytes in the DHT."""
        signed = _signed_fields(self.name, self.value, self.sequence, self.not_after)
        return dagcbor.encode({**signed, "publisher": self.publisher.protobuf, "signature": self.signature})


def check_name(name: str) -> str:
    """`name`, if it is one that can be published. Raises `InputError`."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name[:80]!r} can not be published as a name",
            remedy=f"Names are 1 to {MAX_NAME} small letters, digits, '.', '_' and '-', beginning with"
            " a letter or digit.",
        )
    return name


def publisher_untrusted(peer_id: str) -> PublicKey:
    """The key in an Ed25519 peer ID. Raises `InputError`."""
    try:
        binary = peer_id_bytes_untrusted(peer_id)
        return PublicKey.from_protobuf_untrusted(binary[2:] if binary[0] == 0 else b"")
    except (RemoteProtocolError, BadSignature):
        raise InputError(
            f"{peer_id[:80]!r} is not the peer ID of a publisher",
            remedy="It begins with 12D3KooW; `omni id` prints it on the publisher's machine.",
        ) from None


def sign(key: PrivateKey, name: str, value: CID, sequence: int, not_after: int) -> NameRecord:
    """The publisher's record. Raises `InputError` for what can not be in one."""
    if value.codec != DAG_CBOR:
        raise InputError(f"{value} is a block of weights, and no manifest", remedy="`omni ls` shows CIDs.")
    if not (0 < sequence < MAX_NUMBER and 0 < not_after < MAX_NUMBER):
        raise InputError(f"sequence number {sequence} or time {not_after} is out of range")
    payload = dagcbor.encode(_signed_fields(check_name(name), value, sequence, not_after))
    signature = key.sign(domain=SIGNATURE_DOMAIN, payload_type=SIGNATURE_PAYLOAD_TYPE, payload=payload)
    return NameRecord(name, value, sequence, not_after, key.public, signature)


def record_untrusted(data: bytes) -> NameRecord:
    """The record in these bytes, its signature checked. Raises `BadNameRecord`."""
    node = dagcbor.decode_untrusted(data, limit=MAX_RECORD, error=BadNameRecord, what="a name's record")
    if not isinstance(node, dict) or node.keys() != _FIELDS:
        raise BadNameRecord("a name's record with other fields than its own")
    if type(node["omni"]) is not int or node["omni"] != FORMAT_VERSION:
        raise BadNameRecord(f"a name's record of format version {reprlib.repr(node['omni'])}")
    name, value, signature = node["name"], node["value"], node["signature"]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadNameRecord(f"a name's record for {reprlib.repr(name)}, which is no name")
    if not isinstance(value, CID) or value.codec != DAG_CBOR:
        raise BadNameRecord(f"the record of {name}: its value is not a link to a manifest")
    if not isinstance(signature, bytes) or len(signature) != 64:
        raise BadNameRecord(f"the record of {name}: its signature is not 64 bytes")
    if not isinstance(node["publisher"], bytes):
        raise BadNameRecord(f"the record of {name}: its publisher is not a byte string")
    sequence = _number(node["sequence"], f"the record of {name}: its sequence number")
    not_after = _number(node["not-after"], f"the record of {name}: its expiry")
    payload = dagcbor.encode(_signed_fields(name, value, sequence, not_after))
    try:
        publisher = PublicKey.from_protobuf_untrusted(node["publisher"])
        publisher.verify_untrusted(
            signature, domain=SIGNATURE_DOMAIN, payload_type=SIGNATURE_PAYLOAD_TYPE, payload=payload
        )
    except BadSignature as error:
        raise BadNameRecord(f"the record of {name}: {error.message}") from None
    return NameRecord(name, value, sequence, not_after, publisher, signature)


def name_key(publisher: PublicKey, name: str) -> bytes:
    """The DHT's key: `/omni-name/<peer ID>/<name>`."""
    return f"/{NAMESPACE}/{publisher.peer_id}/{name}".encode()


class NameRules:
    """What a DHT node keeps under such keys (`omnistore.dht.values.ValueRules`).

    Expiry plays no part: nodes whose clocks differ must agree on which record is right.
    """

    def check_untrusted(self, key: bytes, value: bytes) -> None:
        """Refuse what is no record of that name and publisher. Raises `BadNameRecord`."""
        record = record_untrusted(value)
        if name_key(record.publisher, record.name) != key:
            raise BadNameRecord(f"a record of {record.publisher.peer_id}/{record.name} under another key")

    def rank(self, key: bytes, value: bytes) -> int:
        """The higher sequence number wins."""
        return record_untrusted(value).sequence


@dataclass(frozen=True, slots=True)
class Choice:
    """Which record counts."""

    record: NameRecord
    forked: bool
    """Whether the publisher signed two values under the same sequence number."""


def select(found: Iterable[NameRecord], seen: NameRecord | None, now: float) -> Choice:
    """The record that counts among those found (one at least) of one name.

    `seen`: the best one known before; `now`: Unix seconds. A fork is decided by the records' bytes, so that
    everybody chooses alike. Raises `BadNameRecord` if only older ones were found, or the best one expired.
    """
    records = list(found)
    newest = max(records, key=_order)
    what = f"{newest.publisher.peer_id}/{newest.name}"
    if seen is not None and newest.sequence < seen.sequence:
        raise BadNameRecord(
            f"{what}: only an old record (sequence number {newest.sequence}) was found; number"
            f" {seen.sequence} was seen before",
            remedy="Whoever answered is behind, or holds the new record back. Try again, or through other"
            f" nodes; the record seen names {seen.value}.",
        )
    rivals = [*records, seen] if seen is not None else records
    best = max(rivals, key=_order)
    if best.not_after < now:
        raise BadNameRecord(
            f"{what}: its record expired {_ago(now - best.not_after)} ago",
            remedy="Its publisher has to run `omni seed` or `omni publish` again; or this clock is wrong.",
        )
    forked = any(other.sequence == best.sequence and other.value != best.value for other in rivals)
    return Choice(best, forked)


def _order(record: NameRecord) -> tuple[int, bytes]:
    """As `omnistore.dht.values` orders the values of a key."""
    return record.sequence, record.encode()


def _signed_fields(name: str, value: CID, sequence: int, not_after: int) -> dict[str, dagcbor.Value]:
    """What the signature covers."""
    return {
        "omni": FORMAT_VERSION,
        "name": name,
        "value": value,
        "sequence": sequence,
        "not-after": not_after,
    }


def _number(value: Any, what: str) -> int:
    if type(value) is not int or not 0 < value < MAX_NUMBER:
        raise BadNameRecord(f"{what} is not an integer from 1 to {MAX_NUMBER - 1}")
    return value


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"

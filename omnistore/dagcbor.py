"""Deterministic dag-cbor: the encoding of every node and message (spec/01-cid, IPLD dag-cbor).

Encoding is canonical: shortest integers, map keys are text sorted by length then bytes, definite
lengths, links as tag 42. Decoding accepts exactly what encoding produces and nothing else: no
floats, no other tags, no duplicate keys, no trailing bytes, at most `MAX_DEPTH` levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import cbor2

from omnistore.cid import CID
from omnistore.errors import LocalProtocolError, MalformedCID, OmniError, RemoteProtocolError

Value: TypeAlias = "bool | int | str | bytes | CID | Sequence[Value] | Mapping[str, Value] | None"

MAX_DEPTH: Final = 16
"""Deepest nesting accepted, lists, maps and links counted: our deepest node has 5 levels."""
MAX_ITEMS: Final = 1 << 18
"""Most values in one item, keys not counted. A node of 2 MiB that says something has fewer; 2 MiB of
empty maps would cost seconds and half a gigabyte."""
LINK_TAG: Final = 42
_SHOWN: Final = 200
"""Characters of a fault that are repeated in a message: it may quote the input."""

# Every tag cbor2 would otherwise interpret by itself; a big float (5) alone can eat all memory.
_BUILT_IN_TAGS: Final = (
    *range(6), 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 258, 260, 261, 1004, 43000, 55799,
)  # fmt: skip


class _Refused(Exception):
    """Carries a refusal out of cbor2's callbacks."""


def _refuse(_value: Any, _immutable: bool) -> Any:
    raise _Refused("a tag other than 42")


_REFUSALS: Final[Mapping[int, Callable[[Any, bool], Any]]] = dict.fromkeys(_BUILT_IN_TAGS, _refuse)


def _link(tag: Any, _immutable: bool) -> CID:
    if tag.tag != LINK_TAG:
        raise _Refused(f"tag {tag.tag}; only links (42) are allowed")
    if not isinstance(tag.value, bytes) or tag.value[:1] != b"\x00":
        raise _Refused("a link that is not 0x00 + a binary CID")
    try:
        return CID.from_bytes_untrusted(tag.value[1:])
    except MalformedCID as error:
        raise _Refused(f"a link: {error}") from None


def encode(value: Value) -> bytes:
    """Encode `value` canonically. Raises `LocalProtocolError` for a type outside the data model."""
    try:
        return cbor2.dumps(_Preparation().prepare(value, MAX_DEPTH), canonical=True)
    except (cbor2.CBOREncodeError, _Refused, UnicodeError) as error:
        raise LocalProtocolError(f"can not encode as dag-cbor: {error}") from None


def decode_untrusted(
    data: bytes, *, limit: int, error: type[OmniError] = RemoteProtocolError, what: str = "a message"
) -> Value:
    """Decode one canonical item that fills `data` exactly.

    `limit` is the most bytes looked at; `what` names the input in messages. Raises `error` only.
    """
    if len(data) > limit:
        raise error(f"{what} has {len(data)} bytes; at most {limit} are allowed")
    try:
        value: Value = cbor2.loads(
            bytes(data),
            tag_hook=_link,
            semantic_decoders=_REFUSALS,
            max_depth=MAX_DEPTH,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        )
        again = cbor2.dumps(_Preparation().prepare(value, MAX_DEPTH), canonical=True)
    except (cbor2.CBORError, _Refused, ValueError, TypeError, OverflowError, RecursionError) as fault:
        reason = fault.__cause__ if isinstance(fault.__cause__, _Refused) else fault
        raise error(f"{what} is not valid dag-cbor: {str(reason)[:_SHOWN]}") from None
    if again != data:
        raise error(f"{what} is not canonical dag-cbor (or has trailing bytes)")
    return value


class _Preparation:
    """Checks one value against the data model and turns its links into tags, for cbor2 to encode."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = MAX_ITEMS

    def prepare(self, value: Value, depth: int) -> Any:
        """`value` as cbor2 takes it; it may hold `depth` more levels."""
        self._left -= 1
        if self._left < 0:
            raise _Refused(f"more than {MAX_ITEMS} values")
        kind = type(value)
        if kind is int:
            if not -(1 << 63) <= value < 1 << 64:  # type: ignore[operator]
                raise _Refused("an integer outside 64 bits")
            return value
        if value is None or kind in (bool, str, bytes):
            return value
        if depth < 1:
            raise _Refused(f"nesting deeper than {MAX_DEPTH}")
        if kind is CID:
            return cbor2.CBORTag(LINK_TAG, b"\x00" + value.binary)  # type: ignore[union-attr]
        if kind in (list, tuple):
            return [self.prepare(item, depth - 1) for item in value]  # type: ignore[union-attr]
        if kind is dict:
            if not all(type(key) is str for key in value):  # type: ignore[union-attr]
                raise _Refused("a map key that is not text")
            return {key: self.prepare(item, depth - 1) for key, item in value.items()}  # type: ignore[union-attr]
        raise _Refused(f"a value of type {kind.__name__}")

"""The message before every payload, by its fixed shape: the bytes that `dagcbor` makes, in less time.

A `block` message is `{"block": {"ask": n, "size": n}}` and nothing else, so that it can be written and read
without a general encoder. What does not have that shape to the byte is left to the general decoder, which
says what is wrong with it. Pure (spec/05-transfer, section "Messages").
"""

from __future__ import annotations

from typing import Final

_BEFORE: Final = b"\xa1\x65block\xa2\x63ask"
_BETWEEN: Final = b"\x64size"
_WIDTHS: Final = {24: 1, 25: 2, 26: 4, 27: 8}
"""Bytes of an integer after its first one, by what that says (RFC 8949, section 3)."""


def encode_head(ask: int, size: int) -> bytes:
    """The message for a payload of `size` bytes, without its length. Both numbers are below 2**64."""
    return _BEFORE + _integer(ask) + _BETWEEN + _integer(size)


def decode_head(data: bytes) -> tuple[int, int] | None:
    """(ask, size) of such a message; None if it is anything else, or not canonical."""
    if not data.startswith(_BEFORE):
        return None
    ask, at = _integer_at(data, len(_BEFORE))
    if not data.startswith(_BETWEEN, at):
        return None
    size, at = _integer_at(data, at + len(_BETWEEN))
    return (ask, size) if at == len(data) else None


def _integer(value: int) -> bytes:
    if value < 24:
        return bytes((value,))
    for first, width in _WIDTHS.items():
        if value < 1 << 8 * width:
            return bytes((first,)) + value.to_bytes(width, "big")
    raise OverflowError(f"{value} does not fit 64 bits")


def _integer_at(data: bytes, at: int) -> tuple[int, int]:
    """The integer there and where it ends; an end beyond `data` where there is none of the shortest form."""
    first = data[at] if at < len(data) else 0xFF
    if first < 24:
        return first, at + 1
    width = _WIDTHS.get(first, 0)
    end = at + 1 + width
    value = int.from_bytes(data[at + 1 : end], "big")
    # The shortest form: one that needs all of its bytes.
    if not width or end > len(data) or value < (24 if width == 1 else 1 << 4 * width):
        return 0, len(data) + 1
    return value, end

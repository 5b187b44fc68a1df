"""Unsigned variable-length integers (LEB128, as in multiformats and protobuf). Pure."""

from __future__ import annotations

from typing import Final

MAX_BYTES: Final = 9
"""Bytes of the longest one accepted: 63 bits, as multiformats says."""


def encode(number: int) -> bytes:
    """The shortest encoding."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def decode(data: bytes | bytearray | memoryview, at: int = 0) -> tuple[int, int] | None:
    """(value, offset after it) of the one at `at`; None when it is cut off. Raises `ValueError`."""
    value = 0
    for count, byte in enumerate(data[at : at + MAX_BYTES]):
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, at + count + 1
    if len(data) - at >= MAX_BYTES:
        raise ValueError("a varint of more than 9 bytes")
    return None

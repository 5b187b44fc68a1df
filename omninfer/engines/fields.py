"""Fields of quantised blocks, copied out of them and spread, many blocks at a time.

A field is a few bytes of each block. numpy's loops run along the last axis, so that an operation on 16 bytes
of many blocks spends its time between loops; here a field is one element as wide as itself, its copy one
loop down the blocks, and everything after that runs over contiguous bytes. Arrays come out of a `Room` that
is used again: fresh ones would be fresh pages, which cost more than what is computed in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
F32 = NDArray[np.float32]

NIBBLES: Final = (0, 4)
"""Shifts that make all low nibbles, then all high ones."""
Term: TypeAlias = tuple[Bytes, int, int]
"""Contiguous bytes, how far they are shifted right (left, where negative), and which bits are taken then."""
_LINE: Final = 64
"""Bytes of a cache line, at which arrays begin."""


class Room:
    """Memory for arrays that nobody needs any more when it is cleared. For one thread."""

    def __init__(self, size: int = 0) -> None:
        """`size` in bytes; arrays that do not fit are allocated, all of them where it is 0."""
        self._memory = np.empty(size, np.uint8)
        self._taken = 0

    def array(self, shape: tuple[int, ...], dtype: Any = np.uint8) -> NDArray[Any]:
        """An array of anything."""
        start, size = self._taken, prod(shape) * np.dtype(dtype).itemsize
        if start + size > self._memory.size:
            return np.empty(shape, dtype)
        self._taken = -(-(start + size) // _LINE) * _LINE
        return np.ndarray(shape, dtype, self._memory.data, start)

    def clear(self) -> None:
        """Its arrays may be written over from now on."""
        self._taken = 0


def moved(into: Bytes, source: Bytes) -> None:
    """Copy [n, width] bytes, each row as one element."""
    element = f"V{source.shape[1]}"
    np.copyto(into.view(element)[:, 0], source.view(element)[:, 0])


def copied(blocks: Bytes, start: int, width: int, room: Room) -> Bytes:
    """The field of `width` bytes at `start` of each block, contiguous: [blocks, width]."""
    field: Bytes = room.array((len(blocks), width))
    moved(field, blocks[:, start : start + width])
    return field


def spread(raw: Bytes, shifts: Sequence[int], mask: int, room: Room) -> Bytes:
    """[n, width] bytes → [n, shifts * width]: all of a row shifted right (left, where negative) by the first
    and masked, then all by the second, …"""
    return assembled([[(raw, shift, mask)] for shift in shifts], room)


def assembled(runs: Sequence[Sequence[Term]], room: Room) -> Bytes:
    """[n, runs * width]: each run is made of the bits that its terms say, all of them [n, width] bytes."""
    count, width = runs[0][0][0].shape
    out: Bytes = room.array((count, len(runs) * width))
    plane, more = (room.array((count, width)) for _ in range(2))
    for i, (first, *others) in enumerate(runs):
        _masked(first, plane)
        for other in others:
            _masked(other, more)
            np.bitwise_or(plane, more, out=plane)
        moved(out[:, i * width : (i + 1) * width], plane)
    return out


def _masked(term: Term, out: Bytes) -> None:
    raw, shift, mask = term
    if shift < 0:
        np.left_shift(raw, np.uint8(-shift), out=out)
    elif shift > 0:
        np.right_shift(raw, np.uint8(shift), out=out)
    np.bitwise_and(out if shift else raw, np.uint8(mask), out=out)


_HALFS: Final[F32] = np.arange(1 << 16, dtype=np.uint16).view("<f2").astype(np.float32)
"""What each half is: to look it up takes half the time of the conversion."""
_FIFTHS: Final = ((np.arange(256)[:, None] >> np.arange(8) & 1) << 4).astype(np.uint8).view("<u8")[:, 0]
"""The bits of a byte, each moved to 16 of a byte of its own."""


def halfs(blocks: Bytes, start: int, room: Room) -> F32:
    """The little-endian half at `start` of each block, as float32: [blocks]."""
    return looked_up(_HALFS, blocks[:, start : start + 2].view("<u2")[:, 0], room)


def fifth_bits(raw: Bytes, room: Room) -> Bytes:
    """[n, 4] bytes → [n, 32]: bit j of the little-endian word, moved to 16."""
    bits: Bytes = looked_up(_FIFTHS, raw.reshape(-1), room).view(np.uint8)
    return bits.reshape(-1, 32)


def plain(kind: str, rows: Bytes, room: Room) -> F32:
    """Rows of F32, F16 or BF16 as float32."""
    if kind == "F16":
        return looked_up(_HALFS, rows.view("<u2"), room)
    count = rows.shape[1] // (4 if kind == "F32" else 2)
    words = room.array((len(rows), count), np.uint32)
    words[...] = rows.view("<u4" if kind == "F32" else "<u2")
    if kind == "BF16":  # the upper half of a float32
        words <<= np.uint32(16)
    return words.view(np.float32)


class Steps:
    """Codes of four bits that stand for uneven steps: what each is, as a byte."""

    def __init__(self, steps: Bytes) -> None:
        self._steps = steps

    @cached_property
    def _of_words(self) -> NDArray[np.uint32]:
        """By two bytes: the steps of their low nibbles, then those of their high ones."""
        words = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)
        return self._steps[spread(words, NIBBLES, 15, Room())].view("<u4")[:, 0]

    def of(self, raw: Bytes, room: Room) -> Bytes:
        """[n, width] bytes → [n, 2 * width]: the steps of all low nibbles of a row, then of all high ones."""
        words: NDArray[np.uint32] = looked_up(self._of_words, raw.reshape(-1).view("<u2"), room)
        width = raw.shape[1]
        out: Bytes = room.array((len(raw), 2 * width))
        plane = room.array(words.shape, np.uint16)
        for half in (out[:, :width], out[:, width:]):
            np.copyto(plane, words, casting="unsafe")  # the lower half of a word
            moved(half, plane.view(np.uint8).reshape(-1, width))
            words >>= np.uint32(16)
        return out


def looked_up(table: NDArray[Any], index: NDArray[Any], room: Room) -> NDArray[Any]:
    """Of each index its entry; none may be outside of the table."""
    out = room.array(index.shape, table.dtype)
    np.take(table, index, out=out, mode="clip")  # in the other mode numpy fills a copy of `out`
    return out

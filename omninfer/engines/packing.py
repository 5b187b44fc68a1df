"""GGUF's quantised blocks, taken apart into the numbers that they hold. Pure numpy.

Every quantisation here says the same thing in different bits: a weight is

    scale * (code - zero) - minimum

with one `scale` (and perhaps one `minimum`) for each group of 16 or 32 weights of a row, and one
`zero` for the whole type. `unpack` answers exactly that (`Groups`), `decode` multiplies it out, in
the order of operations of ggml's own reference, so that the float32 results are the same bits.
Engines that can multiply packed weights repack `Groups`; the numpy engine decodes.

Types whose codes stand for uneven steps (IQ4, MXFP4) have that form too, with the steps as codes. The
lattice types (IQ1 to IQ3, TQ) have not: the gguf package decodes them (`DECODABLE`), and engines that
multiply packed weights refuse them by name. Sizes of types are `omnistore.chunker.ggml`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import gguf
import numpy as np
from gguf import quants
from numpy.typing import NDArray

from omninfer.engines.fields import (
    F32,
    NIBBLES,
    Bytes,
    Room,
    Steps,
    assembled,
    copied,
    fifth_bits,
    halfs,
    looked_up,
    plain,
    spread,
)

_SIX, _LOWS, _TOPS = np.uint32(0x3F3F3F3F), np.uint32(0x0F0F0F0F), np.uint32(0x30303030)


@dataclass(frozen=True, slots=True)
class Groups:
    """Quantised rows, taken apart."""

    codes: Bytes
    """[rows, columns], each below 2**bits"""
    bits: int
    zero: int
    scales: F32
    """[rows, columns / group]"""
    minimums: F32 | None
    """As scales; None where the type has none."""

    @property
    def group(self) -> int:
        """How many neighbouring weights of a row share a scale: 16 or 32."""
        return int(self.codes.shape[1]) // int(self.scales.shape[1])


def _q4_0(b: Bytes, room: Room) -> Groups:
    return Groups(spread(copied(b, 2, 16, room), NIBBLES, 15, room), 4, 8, halfs(b, 0, room), None)


def _q4_1(b: Bytes, room: Room) -> Groups:
    codes = spread(copied(b, 4, 16, room), NIBBLES, 15, room)
    return Groups(codes, 4, 0, halfs(b, 0, room), -halfs(b, 2, room))


def _q5_0(b: Bytes, room: Room) -> Groups:
    codes = spread(copied(b, 6, 16, room), NIBBLES, 15, room)
    codes |= fifth_bits(copied(b, 2, 4, room), room)
    return Groups(codes, 5, 16, halfs(b, 0, room), None)


def _q5_1(b: Bytes, room: Room) -> Groups:
    codes = spread(copied(b, 8, 16, room), NIBBLES, 15, room)
    codes |= fifth_bits(copied(b, 4, 4, room), room)
    return Groups(codes, 5, 0, halfs(b, 0, room), -halfs(b, 2, room))


def _q8_0(b: Bytes, room: Room) -> Groups:
    codes = copied(b, 2, 32, room)
    codes ^= np.uint8(0x80)
    return Groups(codes, 8, 128, halfs(b, 0, room), None)


def k_scales(b: Bytes, room: Room) -> tuple[F32, F32]:
    """Scales and minimums of the 8 groups of Q4_K or Q5_K blocks: two halfs times 6-bit factors.

    The 12 bytes hold the factors of groups 0-3 in the low six bits of bytes 0-3 (scale) and 4-7
    (minimum); groups 4-7 have their low nibbles in bytes 8-11 and their top two bits above those six.
    """
    # Four factors at a time, as the bytes of a word.
    words: NDArray[np.uint32] = copied(b, 4, 12, room).view("<u4")
    first, second, low = words[..., 0], words[..., 1], words[..., 2]
    factors = room.array((2, len(b), 2), np.uint32)
    np.bitwise_and(first, _SIX, out=factors[0, :, 0])
    np.bitwise_or(low & _LOWS, first >> 2 & _TOPS, out=factors[0, :, 1])
    np.bitwise_and(second, _SIX, out=factors[1, :, 0])
    np.bitwise_or(low >> 4 & _LOWS, second >> 2 & _TOPS, out=factors[1, :, 1])
    scales = room.array((2, len(b), 8), np.float32)
    scales[...] = factors.view(np.uint8)
    scales[0] *= halfs(b, 0, room)[:, None]
    scales[1] *= halfs(b, 2, room)[:, None]
    return scales[0], scales[1]


def _q4_k(b: Bytes, room: Room) -> Groups:
    # Each 32 bytes hold two groups, one per nibble.
    codes = spread(copied(b, 16, 128, room).reshape(-1, 32), NIBBLES, 15, room)
    return Groups(codes, 4, 0, *k_scales(b, room))


def _q5_k(b: Bytes, room: Room) -> Groups:
    # Each 32 bytes hold two groups, one per nibble; group g has its fifth bits in bit g of 32 others.
    low = [copied(b, start, 32, room) for start in range(48, 176, 32)]
    fifth = copied(b, 16, 32, room)
    codes = assembled([[(low[g // 2], g % 2 * 4, 15), (fifth, g - 4, 16)] for g in range(8)], room)
    return Groups(codes, 5, 0, *k_scales(b, room))


def _q6_k(b: Bytes, room: Room) -> Groups:
    # Two halves of 128 weights: 64 bytes of nibbles and 32 bytes of top bits each.
    codes = spread(copied(b, 0, 128, room).reshape(-1, 64), NIBBLES, 15, room)
    codes |= spread(copied(b, 128, 64, room).reshape(-1, 32), (-4, -2, 0, 2), 0x30, room)
    scales = room.array((len(b), 16), np.float32)
    scales[...] = copied(b, 192, 16, room).view(np.int8)
    scales *= halfs(b, 208, room)[:, None]
    return Groups(codes, 6, 32, scales, None)


def _q2_k(b: Bytes, room: Room) -> Groups:
    factors = copied(b, 0, 16, room)
    scales = halfs(b, 80, room)[:, None] * (factors & np.uint8(15)).astype(np.float32)
    minimums = halfs(b, 82, room)[:, None] * (factors >> np.uint8(4)).astype(np.float32)
    return Groups(_crumbs(b, 16, room), 2, 0, scales, minimums)


def _crumbs(b: Bytes, start: int, room: Room) -> Bytes:
    """256 codes of two bits: each 32 bytes hold four runs of 32."""
    return spread(copied(b, start, 64, room).reshape(-1, 32), (0, 2, 4, 6), 3, room).reshape(len(b), 256)


def _q3_k(b: Bytes, room: Room) -> Groups:
    # The third bit of the codes of run r of 32 is bit r of the first 32 bytes.
    codes = _crumbs(b, 32, room)
    codes |= spread(copied(b, 0, 32, room), range(-2, 6), 4, room)
    # 16 factors of six bits: low nibbles in 8 bytes, then top bits, four factors a byte.
    factors = spread(copied(b, 96, 8, room), NIBBLES, 15, room)
    factors |= spread(copied(b, 104, 4, room), (-4, -2, 0, 2), 0x30, room)
    return Groups(codes, 3, 4, halfs(b, 108, room)[:, None] * _signed(factors), None)


def _signed(factors: Bytes) -> F32:
    return (factors.view(np.int8) - np.int8(32)).astype(np.float32)


# What a code of four bits stands for, moved to be positive: the steps of IQ4, the floats of MXFP4 doubled.
_IQ4_STEPS: Final = Steps(np.array(quants.IQ4_NL.kvalues, dtype=np.int8).view(np.uint8) ^ np.uint8(0x80))
_E2M1_STEPS: Final = Steps(np.array(quants.MXFP4.kvalues, dtype=np.int8).view(np.uint8) + np.uint8(12))


# The scale is 2**(e - 127), halved since the steps are doubled; ldexp is exact to the last subnormal.
_E8M0_HALVED: Final[F32] = np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)


def _iq4_nl(b: Bytes, room: Room) -> Groups:
    return Groups(_IQ4_STEPS.of(copied(b, 2, 16, room), room), 8, 128, halfs(b, 0, room), None)


def _iq4_xs(b: Bytes, room: Room) -> Groups:
    factors = spread(copied(b, 4, 4, room).reshape(-1, 1), NIBBLES, 15, room).reshape(len(b), 8)
    top = spread(copied(b, 2, 2, room).reshape(-1, 1), (-4, -2, 0, 2), 0x30, room)
    factors |= top.reshape(len(b), 8)
    codes = _IQ4_STEPS.of(copied(b, 8, 128, room).reshape(-1, 16), room)
    return Groups(codes, 8, 128, halfs(b, 0, room)[:, None] * _signed(factors), None)


def _mxfp4(b: Bytes, room: Room) -> Groups:
    scales = looked_up(_E8M0_HALVED, b[:, 0], room)
    return Groups(_E2M1_STEPS.of(copied(b, 1, 16, room), room), 5, 12, scales, None)


_UNPACKERS: Final[Mapping[str, tuple[int, Callable[[Bytes, Room], Groups]]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q2_K": (84, _q2_k),
    "Q3_K": (110, _q3_k),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
    "IQ4_NL": (18, _iq4_nl),
    "IQ4_XS": (136, _iq4_xs),
    "MXFP4": (17, _mxfp4),
}

FORMS: Final[Mapping[str, tuple[int, int]]] = {
    "Q4_0": (4, 32),
    "Q4_1": (4, 32),
    "Q5_0": (5, 32),
    "Q5_1": (5, 32),
    "Q8_0": (8, 32),
    "Q2_K": (2, 16),
    "Q3_K": (3, 16),
    "Q4_K": (4, 32),
    "Q5_K": (5, 32),
    "Q6_K": (6, 16),
    "IQ4_NL": (8, 32),
    "IQ4_XS": (8, 32),
    "MXFP4": (5, 32),
}
"""Bits of a code and weights of a group: what `unpack` will answer, known before there is data."""

PLAIN: Final = ("F32", "F16", "BF16")
QUANTISED: Final = tuple(_UNPACKERS)
SUPPORTED: Final = PLAIN + QUANTISED
"""Types that `unpack` takes apart, or that are numbers already."""
LATTICES: Final = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0",
)  # fmt: skip
DECODABLE: Final = SUPPORTED + LATTICES
"""Types that `decode` knows."""


def blocks_of(kind: str, rows: Bytes) -> Bytes:
    """Quantised rows [rows, bytes of a row] as [blocks, bytes of a block]."""
    return rows.reshape(-1, _UNPACKERS[kind][0])


def unpack(kind: str, rows: Bytes, room: Room | None = None) -> Groups:
    """Take quantised rows apart: `rows` is [rows, bytes of a row], `kind` one of `QUANTISED`.

    The answer, and what it takes to make it, lie in `room` if there is one and it is large enough.
    """
    groups = _UNPACKERS[kind][1](blocks_of(kind, rows), room or Room())
    count = len(rows)
    return Groups(
        groups.codes.reshape(count, -1),
        groups.bits,
        groups.zero,
        groups.scales.reshape(count, -1),
        None if groups.minimums is None else groups.minimums.reshape(count, -1),
    )


def decode(kind: str, rows: Bytes, room: Room | None = None) -> F32:
    """The weights of packed rows as float32: `rows` is [rows, bytes of a row], `kind` of `DECODABLE`.

    They lie in `room`, as what `unpack` answers.
    """
    room = room or Room()
    if kind in LATTICES:
        decoded: F32 = quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
        return decoded
    if kind in PLAIN:
        return plain(kind, rows, room)
    groups = unpack(kind, rows, room)
    # Around zero before they become floats: every type's codes fit into a signed byte then, and the
    # subtraction may wrap.
    if groups.zero:
        np.subtract(groups.codes, np.uint8(groups.zero), out=groups.codes)
    weights = room.array((*groups.scales.shape, groups.group), np.float32)
    weights[...] = groups.codes.view(np.int8).reshape(weights.shape)
    weights *= groups.scales[..., None]
    if groups.minimums is not None:
        weights -= groups.minimums[..., None]
    return weights.reshape(len(rows), -1)

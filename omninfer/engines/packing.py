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

Bytes = NDArray[np.uint8]
F32 = NDArray[np.float32]

# Plain integers would widen the arithmetic of the type checker, though not numpy's.
_4, _LOW = np.uint8(4), np.uint8(15)
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


def halfs(raw: Bytes) -> F32:
    """Little-endian halfs at the end of the axis, as float32."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(raw: Bytes) -> Bytes:
    """[..., n] bytes → [..., 2n] codes: all low nibbles, then all high ones."""
    count = raw.shape[-1]
    codes = np.empty((*raw.shape[:-1], 2 * count), dtype=np.uint8)
    np.bitwise_and(raw, _LOW, out=codes[..., :count])
    np.right_shift(raw, _4, out=codes[..., count:])
    return codes


def _fifth_bits(raw: Bytes) -> Bytes:
    """[..., 4] bytes → [..., 32]: bit j of the little-endian word, moved to 16."""
    return np.unpackbits(raw, axis=-1, bitorder="little") << _4


def _q4_0(b: Bytes) -> Groups:
    return Groups(_nibbles(b[..., 2:]), 4, 8, halfs(b[..., :2]), None)


def _q4_1(b: Bytes) -> Groups:
    return Groups(_nibbles(b[..., 4:]), 4, 0, halfs(b[..., :2]), -halfs(b[..., 2:4]))


def _q5_0(b: Bytes) -> Groups:
    return Groups(_nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6]), 5, 16, halfs(b[..., :2]), None)


def _q5_1(b: Bytes) -> Groups:
    codes = _nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8])
    return Groups(codes, 5, 0, halfs(b[..., :2]), -halfs(b[..., 2:4]))


def _q8_0(b: Bytes) -> Groups:
    return Groups(b[..., 2:] ^ np.uint8(0x80), 8, 128, halfs(b[..., :2]), None)


def k_scales(b: Bytes) -> tuple[F32, F32]:
    """Scales and minimums of the 8 groups of a Q4_K or Q5_K block: two halfs times 6-bit factors.

    The 12 bytes hold the factors of groups 0-3 in the low six bits of bytes 0-3 (scale) and 4-7
    (minimum); groups 4-7 have their low nibbles in bytes 8-11 and their top two bits above those six.
    """
    # Four factors at a time, as the bytes of a word.
    words: NDArray[np.uint32] = np.ascontiguousarray(b[..., 4:16]).view("<u4")
    first, second, low = words[..., 0], words[..., 1], words[..., 2]
    scales = np.stack((first & _SIX, (low & _LOWS) | (first >> 2 & _TOPS)), axis=-1)
    minimums = np.stack((second & _SIX, (low >> 4 & _LOWS) | (second >> 2 & _TOPS)), axis=-1)
    return (
        halfs(b[..., :2]) * scales.view(np.uint8).astype(np.float32),
        halfs(b[..., 2:4]) * minimums.view(np.uint8).astype(np.float32),
    )


def _k_nibbles(raw: Bytes) -> Bytes:
    """[..., 128] bytes → [..., 256]: each 32 bytes hold two groups, one per nibble."""
    quarters = raw.reshape(*raw.shape[:-1], 4, 32)
    return _nibbles(quarters).reshape(*raw.shape[:-1], 256)


def _q4_k(b: Bytes) -> Groups:
    scales, minimums = k_scales(b)
    return Groups(_k_nibbles(b[..., 16:]), 4, 0, scales, minimums)


def _q5_k(b: Bytes) -> Groups:
    scales, minimums = k_scales(b)
    shifts = np.arange(8, dtype=np.uint8)[:, None]  # group g has its fifth bits in bit g of the 32 bytes
    fifth = (b[..., None, 16:48] >> shifts & np.uint8(1)) << _4
    codes = _k_nibbles(b[..., 48:]) | fifth.reshape(*b.shape[:-1], 256)
    return Groups(codes, 5, 0, scales, minimums)


def _q6_k(b: Bytes) -> Groups:
    # Two halves of 128 weights: 64 bytes of nibbles and 32 bytes of top bits each.
    low = _nibbles(b[..., :128].reshape(*b.shape[:-1], 2, 64))
    shifts = np.array([[0], [2], [4], [6]], dtype=np.uint8)
    high = (b[..., 128:192].reshape(*b.shape[:-1], 2, 1, 32) >> shifts & np.uint8(3)) << _4
    codes = low.reshape(*b.shape[:-1], 256) | high.reshape(*b.shape[:-1], 256)
    factors = np.ascontiguousarray(b[..., 192:208]).view(np.int8).astype(np.float32)
    return Groups(codes, 6, 32, halfs(b[..., 208:210]) * factors, None)


def _q2_k(b: Bytes) -> Groups:
    factors = b[..., :16]
    scales = halfs(b[..., 80:82]) * (factors & _LOW).astype(np.float32)
    minimums = halfs(b[..., 82:84]) * (factors >> _4).astype(np.float32)
    return Groups(_crumbs(b[..., 16:80]), 2, 0, scales, minimums)


def _crumbs(raw: Bytes) -> Bytes:
    """[..., 64] bytes → [..., 256] codes of two bits: each 32 bytes hold four runs of 32."""
    shifts = np.array([[0], [2], [4], [6]], dtype=np.uint8)
    runs = raw.reshape(*raw.shape[:-1], 2, 1, 32) >> shifts & np.uint8(3)
    return runs.reshape(*raw.shape[:-1], 256)


def _q3_k(b: Bytes) -> Groups:
    # The third bit of the codes of run r of 32 is bit r of the first 32 bytes.
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    third = (b[..., None, :32] >> shifts & np.uint8(1)) << np.uint8(2)
    codes = _crumbs(b[..., 32:96]) | third.reshape(*b.shape[:-1], 256)
    # 16 factors of six bits: low nibbles in 8 bytes, then top bits, four factors a byte.
    top = (b[..., None, 104:108] >> np.array([[0], [2], [4], [6]], dtype=np.uint8)) & np.uint8(3)
    factors = _nibbles(b[..., 96:104]) | top.reshape(*b.shape[:-1], 16) << _4
    signed = factors.view(np.int8) - np.int8(32)
    return Groups(codes, 3, 4, halfs(b[..., 108:110]) * signed.astype(np.float32), None)


# What a code of four bits stands for, moved to be positive: the steps of IQ4, the floats of MXFP4 doubled.
_IQ4_STEPS: Final = np.array(quants.IQ4_NL.kvalues, dtype=np.int8).view(np.uint8) ^ np.uint8(0x80)
_E2M1_STEPS: Final = np.array(quants.MXFP4.kvalues, dtype=np.int8).view(np.uint8) + np.uint8(12)


def _iq4_nl(b: Bytes) -> Groups:
    return Groups(_IQ4_STEPS[_nibbles(b[..., 2:])], 8, 128, halfs(b[..., :2]), None)


def _iq4_xs(b: Bytes) -> Groups:
    low = b[..., 4:8, None] >> np.array([0, 4], dtype=np.uint8) & _LOW
    top = b[..., 2:4, None] >> np.array([0, 2, 4, 6], dtype=np.uint8) & np.uint8(3)
    factors = low.reshape(*b.shape[:-1], 8) | top.reshape(*b.shape[:-1], 8) << _4
    signed = factors.view(np.int8) - np.int8(32)
    codes = _nibbles(b[..., 8:].reshape(*b.shape[:-1], 8, 16)).reshape(*b.shape[:-1], 256)
    return Groups(_IQ4_STEPS[codes], 8, 128, halfs(b[..., :2]) * signed.astype(np.float32), None)


def _mxfp4(b: Bytes) -> Groups:
    # The scale is 2**(e - 127), halved since the steps are doubled; ldexp is exact to the last subnormal.
    scales = np.ldexp(np.float32(1), b[..., :1].astype(np.int32) - 128).astype(np.float32)
    return Groups(_E2M1_STEPS[_nibbles(b[..., 1:])], 5, 12, scales, None)


_UNPACKERS: Final[Mapping[str, tuple[int, Callable[[Bytes], Groups]]]] = {
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


def unpack(kind: str, rows: Bytes) -> Groups:
    """Take quantised rows apart: `rows` is [rows, bytes of a row], `kind` one of `QUANTISED`."""
    size, unpacker = _UNPACKERS[kind]
    count = len(rows)
    groups = unpacker(rows.reshape(count, -1, size))
    return Groups(
        groups.codes.reshape(count, -1),
        groups.bits,
        groups.zero,
        groups.scales.reshape(count, -1),
        None if groups.minimums is None else groups.minimums.reshape(count, -1),
    )


def decode(kind: str, rows: Bytes) -> F32:
    """The weights of packed rows as float32: `rows` is [rows, bytes of a row], `kind` of `DECODABLE`."""
    if kind in LATTICES:
        decoded: F32 = quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
        return decoded
    if kind == "F32":
        return rows.view("<f4").astype(np.float32)
    if kind == "F16":
        return rows.view("<f2").astype(np.float32)
    if kind == "BF16":  # the upper half of a float32
        return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
    groups = unpack(kind, rows)
    # Around zero before they become floats: every type's codes fit into a signed byte then, and the
    # subtraction may wrap.
    signed = groups.codes.view(np.int8)
    if groups.zero:
        signed = (groups.codes - np.uint8(groups.zero)).view(np.int8)
    weights = signed.astype(np.float32).reshape(*groups.scales.shape, groups.group)
    weights *= groups.scales[..., None]
    if groups.minimums is not None:
        weights -= groups.minimums[..., None]
    return weights.reshape(len(rows), -1)

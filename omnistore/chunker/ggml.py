"""The tensor types of ggml: how many bytes a tensor of each type takes.

A table and three functions over it. It knows sizes only, not how a block of a quantisation is
laid out: decoding weights is the engines' business. Types that ggml has withdrawn (4, 5, 31-33,
36-38) are left out, so a file that uses one is refused. Implements the table of
spec/02-layout, section "Tensor types".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class GGMLType:
    """One ggml tensor type."""

    name: str
    id: int
    """The number that stands for the type in a GGUF file."""
    block_size: int
    """Elements per quantisation block; a row is a whole number of these."""
    type_size: int
    """Bytes per quantisation block."""


_TYPES = (
    GGMLType("F32", 0, 1, 4),
    GGMLType("F16", 1, 1, 2),
    GGMLType("Q4_0", 2, 32, 18),
    GGMLType("Q4_1", 3, 32, 20),
    GGMLType("Q5_0", 6, 32, 22),
    GGMLType("Q5_1", 7, 32, 24),
    GGMLType("Q8_0", 8, 32, 34),
    # Two halfs and 32 codes, as ggml's C struct has it. No file holds it: it is a type of activations.
    GGMLType("Q8_1", 9, 32, 36),
    GGMLType("Q2_K", 10, 256, 84),
    GGMLType("Q3_K", 11, 256, 110),
    GGMLType("Q4_K", 12, 256, 144),
    GGMLType("Q5_K", 13, 256, 176),
    GGMLType("Q6_K", 14, 256, 210),
    GGMLType("Q8_K", 15, 256, 292),
    GGMLType("IQ2_XXS", 16, 256, 66),
    GGMLType("IQ2_XS", 17, 256, 74),
    GGMLType("IQ3_XXS", 18, 256, 98),
    GGMLType("IQ1_S", 19, 256, 50),
    GGMLType("IQ4_NL", 20, 32, 18),
    GGMLType("IQ3_S", 21, 256, 110),
    GGMLType("IQ2_S", 22, 256, 82),
    GGMLType("IQ4_XS", 23, 256, 136),
    GGMLType("I8", 24, 1, 1),
    GGMLType("I16", 25, 1, 2),
    GGMLType("I32", 26, 1, 4),
    GGMLType("I64", 27, 1, 8),
    GGMLType("F64", 28, 1, 8),
    GGMLType("IQ1_M", 29, 256, 56),
    GGMLType("BF16", 30, 1, 2),
    GGMLType("TQ1_0", 34, 256, 54),
    GGMLType("TQ2_0", 35, 256, 66),
    GGMLType("MXFP4", 39, 32, 17),
    GGMLType("NVFP4", 40, 64, 36),
    GGMLType("Q1_0", 41, 128, 18),
)

GGML_TYPES: Mapping[int, GGMLType] = MappingProxyType({t.id: t for t in _TYPES})

_BY_NAME: Mapping[str, GGMLType] = MappingProxyType({t.name: t for t in _TYPES})

_FILE_TYPES: Mapping[int, str] = MappingProxyType(
    {
        0: "F32",
        1: "F16",
        2: "Q4_0",
        3: "Q4_1",
        7: "Q8_0",
        8: "Q5_0",
        9: "Q5_1",
        10: "Q2_K",
        11: "Q3_K_S",
        12: "Q3_K_M",
        13: "Q3_K_L",
        14: "Q4_K_S",
        15: "Q4_K_M",
        16: "Q5_K_S",
        17: "Q5_K_M",
        18: "Q6_K",
        19: "IQ2_XXS",
        20: "IQ2_XS",
        21: "Q2_K_S",
        22: "IQ3_XS",
        23: "IQ3_XXS",
        24: "IQ1_S",
        25: "IQ4_NL",
        26: "IQ3_S",
        27: "IQ3_M",
        28: "IQ2_S",
        29: "IQ2_M",
        30: "IQ4_XS",
        31: "IQ1_M",
        32: "BF16",
        36: "TQ1_0",
        37: "TQ2_0",
        38: "MXFP4_MOE",
        39: "NVFP4",
        40: "Q1_0",
    }
)

_GUESSED = 1024
"""llama.cpp sets this bit in `general.file_type` when it inferred the type from the tensors."""


def by_name(name: str) -> GGMLType:
    """The type called `name` (`Q4_K`, `BF16`, …); KeyError when there is none."""
    return _BY_NAME[name]


def nbytes(kind: GGMLType, shape: Sequence[int]) -> int:
    """Bytes of a tensor of this type and shape (`ne[0]`, the row length, first).

    Raises ValueError when a row is not a whole number of quantisation blocks.
    """
    row = shape[0] if shape else 1
    if row % kind.block_size:
        raise ValueError(f"rows of {row} elements are not a multiple of {kind.name}'s {kind.block_size}")
    return prod(shape) // kind.block_size * kind.type_size


def file_type_name(file_type: int) -> str | None:
    """What people call a `general.file_type` (15 → `Q4_K_M`), or None when it is unknown."""
    return _FILE_TYPES.get(file_type & ~_GUESSED)

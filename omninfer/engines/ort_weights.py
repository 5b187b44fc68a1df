"""GGUF weights as ONNX Runtime multiplies them: the operands of MatMulNBits, or plain float32.

MatMulNBits knows w = scale * (code - zero), with 4 or 8 bits and a float32 scale for each block of 16 or 32
weights of a row; without zeros of its own, a matrix has 2**(bits-1). Every quantisation of `packing` is that:

- codes of up to 4 bits are held in 4, wider ones in 8, moved so that the middle of their range is the zero;
- a type with minimums has the nearest whole zero of each block ("zeros") instead, and leaves scale * zero -
  minimum over, which multiplies the sum of the block's activations: one more product, of a 32nd of the size.
  These rests ("rests", "rest_scales") are 8 bits wide, to half a step of 1/127 of the largest of 32 blocks:
  the one thing here that is rounded, and by an order less than activations are in the products themselves.

F32, F16 and BF16 are float32, the one of them that ONNX Runtime multiplies fast on CPUs. Several tensors that
multiply the same activations are stacked into one matrix, row under row. Every operand is an array whose
first axis are the rows, so that it can be written as the rows are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from omninfer.engines.checks import PackedTensor
from omninfer.engines.interface import TensorSource
from omninfer.engines.packing import F32, FORMS, PLAIN, Bytes, decode, halfs, k_scales, unpack

WITH_MINIMUMS: Final = frozenset({"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"})
REST_BLOCK: Final = 32
"""Rests that share a scale."""
STEP_BYTES: Final = 512 << 10
"""Packed bytes taken apart at a time: with what comes of them they stay in a core's cache."""
Put = Callable[[str, int, NDArray[Any]], None]
"""Takes rows of an operand: its name, the first row's number, the rows."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix is multiplied; tensors of one form can be stacked."""

    bits: int
    """4 or 8; 32 for float32."""
    block: int
    """Weights that share a scale; 0 for float32."""
    minimums: bool

    @classmethod
    def of(cls, tensor: PackedTensor) -> Form:
        if tensor.kind in PLAIN:
            return cls(32, 0, False)
        bits, block = FORMS[tensor.kind]
        return cls(4 if bits <= 4 else 8, block, tensor.kind in WITH_MINIMUMS)


@dataclass(frozen=True, slots=True)
class Operand:
    """One array of a matrix."""

    dtype: str
    shape: tuple[int, ...]
    """Rows first."""

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Matrix:
    """Tensors of one form and width, one under the other; no weights are read before `repack`."""

    tensors: tuple[PackedTensor, ...]

    @property
    def form(self) -> Form:
        return Form.of(self.tensors[0])

    @property
    def rows(self) -> int:
        """Outputs."""
        return sum(tensor.rows for tensor in self.tensors)

    @property
    def columns(self) -> int:
        """Inputs."""
        return self.tensors[0].columns

    def operands(self) -> dict[str, Operand]:
        """Of float32 "dense", else "codes" and "scales" and what the module says of types with minimums."""
        form, rows = self.form, self.rows
        if form.bits == 32:
            return {"dense": Operand("float32", (rows, self.columns))}
        blocks = self.columns // form.block
        operands = {
            "codes": Operand("uint8", (rows, blocks, form.block * form.bits // 8)),
            "scales": Operand("float32", (rows, blocks)),
        }
        if form.minimums:
            operands["zeros"] = Operand("uint8", (rows, -(-blocks * form.bits // 8)))
            runs = -(-blocks // REST_BLOCK)
            operands["rests"] = Operand("uint8", (rows, runs, REST_BLOCK))
            operands["rest_scales"] = Operand("float32", (rows, runs))
        return operands

    def repack(self, source: TensorSource, put: Put) -> None:
        """Read the tensors slab by slab and hand over their rows of every operand."""
        for row, tensor, packed in _slabs(self.tensors, source):
            for name, rows in _repacked(self.form, tensor.kind, packed).items():
                put(name, row, rows)


def stacked(tensors: Sequence[PackedTensor]) -> tuple[Matrix, ...]:
    """Neighbours of one form as one matrix."""
    runs: list[list[PackedTensor]] = []
    for tensor in tensors:
        if runs and Form.of(runs[-1][0]) == Form.of(tensor):
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
    return tuple(Matrix(tuple(run)) for run in runs)


def _slabs(
    tensors: Sequence[PackedTensor], source: TensorSource
) -> Iterator[tuple[int, PackedTensor, Bytes]]:
    """A few packed rows at a time, with the number of the first in the stack."""
    at = 0
    for tensor in tensors:
        step = max(1, STEP_BYTES * tensor.rows // tensor.nbytes)
        for span, packed in tensor.slabs(source):
            for row in range(0, len(packed), step):
                yield at + span.start + row, tensor, packed[row : row + step]
        at += tensor.rows


def _repacked(form: Form, kind: str, packed: Bytes) -> dict[str, NDArray[Any]]:
    """The operands of some packed rows."""
    if form.bits == 32:
        return {"dense": decode(kind, packed)}
    if kind == "Q4_0":  # byte j of a block holds weights j and j + 16
        blocks = packed.reshape(len(packed), -1, 18)
        return {"codes": _pairs(blocks[..., 2:]), "scales": halfs(blocks[..., :2])[..., 0]}
    if kind == "Q4_K":  # byte j of 32 holds weight j of two groups
        blocks = packed.reshape(len(packed), -1, 144)
        codes = _pairs(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32))
        scales, minimums = (each.reshape(len(packed), -1) for each in k_scales(blocks))
        return {"codes": codes, "scales": scales, **_minimums(form.bits, scales, minimums)}
    groups = unpack(kind, packed)
    if groups.minimums is None:
        moved = np.uint8((1 << (form.bits - 1)) - groups.zero)
        centred = groups.codes + moved if moved else groups.codes
        return {"codes": _packed(centred, form.bits), "scales": groups.scales}
    operands: dict[str, NDArray[Any]] = {"codes": _packed(groups.codes, form.bits), "scales": groups.scales}
    return operands | _minimums(form.bits, groups.scales, groups.minimums)


def _minimums(bits: int, scales: F32, minimums: F32) -> dict[str, NDArray[Any]]:
    """The zeros and rests of rows [rows, blocks]."""
    nearest = np.zeros_like(scales)
    np.divide(minimums, scales, out=nearest, where=scales != 0)
    zeros = np.clip(np.rint(nearest), 0, (1 << bits) - 1)
    rest = scales * zeros - minimums
    zeros = np.pad(zeros.astype(np.uint8), ((0, 0), (0, scales.shape[1] % 2)))
    rest = np.pad(rest, ((0, 0), (0, -rest.shape[1] % REST_BLOCK))).reshape(len(rest), -1, REST_BLOCK)
    steps = np.abs(rest).max(axis=-1) / np.float32(127)
    rounded = np.rint(np.divide(rest, steps[..., None], out=np.zeros_like(rest), where=steps[..., None] != 0))
    return {
        "zeros": _packed(zeros, bits) if bits == 4 else zeros[:, : scales.shape[1]],
        "rests": (rounded + 128).astype(np.uint8),
        "rest_scales": steps,
    }


def _packed(codes: Bytes, bits: int) -> Bytes:
    """Codes as MatMulNBits reads them: of two neighbours in a byte the first is in the low nibble."""
    if bits == 8:
        return codes
    pairs = np.ascontiguousarray(codes).view("<u2")
    packed: Bytes = (pairs | pairs >> 4).astype(np.uint8)
    return packed


def _pairs(raw: Bytes) -> Bytes:
    """[..., n] bytes with a weight in each nibble, all low ones before all high ones → [..., n] bytes with
    neighbours in a byte; without a byte for each code between."""
    words: NDArray[np.uint16] = np.ascontiguousarray(raw).view("<u2")
    half = words.shape[-1]
    codes = np.empty(raw.shape, np.uint8)
    scratch = words & np.uint16(0x0F0F)
    for into in (codes[..., :half], codes[..., half:]):
        moved = scratch >> np.uint16(4)
        np.bitwise_or(scratch, moved, out=moved)
        into[...] = moved  # the high bytes hold what belongs to nobody
        np.right_shift(words, np.uint16(4), out=scratch)
        np.bitwise_and(scratch, np.uint16(0x0F0F), out=scratch)
    return codes

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
from omninfer.engines.fields import F32, Bytes, Room, copied, halfs, moved, plain
from omninfer.engines.interface import TensorSource
from omninfer.engines.packing import FORMS, PLAIN, blocks_of, k_scales, unpack

WITH_MINIMUMS: Final = frozenset({"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"})
REST_BLOCK: Final = 32
"""Rests that share a scale."""
STEP_BYTES: Final = 2 << 20
"""Packed bytes taken apart at a time. With less the threads that do it wait more for each other's GIL, with
more they leave the cores' caches."""
ROOM_BYTES: Final = 8 * STEP_BYTES
"""Room for them and what comes of them, of which only what is used takes memory."""
Put = Callable[[str, int, NDArray[Any]], None]
"""Takes rows of an operand: its name, the first row's number, the rows, which are gone afterwards."""


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

    def repack(self, source: TensorSource, put: Put, room: Room) -> None:
        """Read the tensors slab by slab and hand over their rows of every operand, which lie in `room`."""
        for row, tensor, packed in _slabs(self.tensors, source):
            room.clear()
            for name, rows in _repacked(self.form, tensor.kind, packed, room).items():
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


def _repacked(form: Form, kind: str, packed: Bytes, room: Room) -> dict[str, NDArray[Any]]:
    """The operands of some packed rows."""
    if form.bits == 32:
        return {"dense": plain(kind, packed, room)}
    minimums: F32 | None = None
    if kind in _PAIRED:
        blocks = blocks_of(kind, packed)
        start, width, run = _PAIRED[kind]
        codes = _pairs(copied(blocks, start, width, room).reshape(-1, run), room)
        if kind == "Q4_K":
            scales, minimums = k_scales(blocks, room)
        else:
            scales = halfs(blocks, 0, room)
            minimums = -halfs(blocks, 2, room) if form.minimums else None
    else:
        groups = unpack(kind, packed, room)
        codes, scales, minimums = groups.codes, groups.scales, groups.minimums
        if minimums is None:
            codes += np.uint8((1 << (form.bits - 1)) - groups.zero)
        codes = _packed(codes, form.bits, room)
    scales = scales.reshape(len(packed), -1)
    operands: dict[str, NDArray[Any]] = {"codes": codes.reshape(len(packed), -1), "scales": scales}
    if minimums is None:
        return operands
    return operands | _minimums(form.bits, scales, minimums.reshape(scales.shape), room)


_PAIRED: Final = {"Q4_0": (2, 16, 16), "Q4_1": (4, 16, 16), "Q4_K": (16, 128, 32)}
"""Where the bytes with codes lie in a block, how many they are, and how many hold a run of weights in their
low nibbles and the next run in their high ones: such codes need no byte of their own on the way."""


def _minimums(bits: int, scales: F32, minimums: F32, room: Room) -> dict[str, NDArray[Any]]:
    """The zeros and rests of rows [rows, blocks]."""
    rows, blocks = scales.shape
    runs = -(-blocks // REST_BLOCK)
    zeros: F32 = room.array(scales.shape, np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        np.divide(minimums, scales, out=zeros)
    absent = scales == 0
    if absent.any():
        zeros[absent] = 0
    np.rint(zeros, out=zeros)
    np.clip(zeros, 0, (1 << bits) - 1, out=zeros)
    codes = room.array((rows, blocks + blocks % 2))
    codes[:, blocks:] = 0
    np.copyto(codes[:, :blocks], zeros, casting="unsafe")
    padded = room.array((rows, runs * REST_BLOCK), np.float32)
    padded[:, blocks:] = 0
    rest = padded[:, :blocks]
    np.multiply(scales, zeros, out=rest)
    rest -= minimums
    whole = padded.reshape(rows, runs, REST_BLOCK)
    sizes = room.array(whole.shape, np.float32)
    steps = _largest(np.abs(whole, out=sizes), room) / np.float32(127)
    np.divide(whole, np.where(steps == 0, np.float32(1), steps)[..., None], out=whole)
    np.rint(whole, out=whole)
    whole += np.float32(128)
    rests = room.array(whole.shape)
    np.copyto(rests, whole, casting="unsafe")
    return {
        "zeros": _packed(codes, bits, room) if bits == 4 else codes[:, :blocks],
        "rests": rests,
        "rest_scales": steps,
    }


def _largest(values: F32, room: Room) -> F32:
    """Of each run [rows, runs, REST_BLOCK]; by halves, since numpy looks at the runs one by one."""
    left = values.reshape(-1)
    while left.size > values.size // REST_BLOCK:
        left, pairs = room.array((left.size // 2,), np.float32), left
        np.maximum(pairs[0::2], pairs[1::2], out=left)
    return left.reshape(values.shape[:-1])


def _packed(codes: Bytes, bits: int, room: Room) -> Bytes:
    """Codes as MatMulNBits reads them: of two neighbours in a byte the first is in the low nibble."""
    if bits == 8:
        return codes
    pairs: NDArray[np.uint16] = codes.view("<u2")
    high = room.array(pairs.shape, np.uint16)
    packed: Bytes = room.array(pairs.shape)
    np.right_shift(pairs, np.uint16(4), out=high)
    high |= pairs
    np.copyto(packed, high, casting="unsafe")
    return packed


def _pairs(raw: Bytes, room: Room) -> Bytes:
    """[n, width] bytes with a weight in each nibble, all low ones of a row before all high ones → [n, width]
    bytes with neighbours in a byte; without a byte for each code between."""
    words: NDArray[np.uint16] = raw.reshape(-1).view("<u2")
    half = raw.shape[1] // 2
    out: Bytes = room.array(raw.shape)
    pairs, high = (room.array(words.shape, np.uint16) for _ in range(2))
    plane: Bytes = room.array((len(raw), half))
    for into, shift in ((out[:, :half], 0), (out[:, half:], 4)):
        if shift:
            np.right_shift(words, np.uint16(shift), out=pairs)
        np.bitwise_and(pairs if shift else words, np.uint16(0x0F0F), out=pairs)
        np.right_shift(pairs, np.uint16(4), out=high)
        high |= pairs
        np.copyto(plane.reshape(-1), high, casting="unsafe")  # the upper bytes hold what belongs to nobody
        moved(into, plane)
    return out

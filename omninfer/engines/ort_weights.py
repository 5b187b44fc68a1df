"""GGUF weights as ONNX Runtime holds and multiplies them: the operands of MatMulNBits, or plain float32.

MatMulNBits knows w = scale * (code - 2**(bits-1)), with 4 or 8 bits and a float32 scale for each block of
16 or 32 weights of a row. Every quantisation of `packing` becomes exactly that:

- codes of up to 4 bits are held in 4, wider ones in 8, moved so that the middle of their range is the zero;
- a type with minimums leaves scale * middle - minimum over for each block. It multiplies the sum of the
  block's activations: one product more, of a 32nd of the size (`Operands.offsets`).

F32, F16 and BF16 are float32, the one of them that ONNX Runtime multiplies fast on CPUs. Several tensors that
multiply the same activations are stacked into one matrix, row under row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from omninfer.engines.checks import PackedTensor
from omninfer.engines.interface import TensorSource
from omninfer.engines.packing import F32, FORMS, PLAIN, Bytes, decode, unpack

_WITH_MINIMUMS: Final = frozenset({"Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"})
"""Types with minimums, whose codes are then moved by half of their range."""


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix is multiplied; tensors of one form can be stacked."""

    bits: int
    """4 or 8; 32 for float32."""
    block: int
    """Weights that share a scale; 0 for float32."""
    offsets: bool

    @classmethod
    def of(cls, tensor: PackedTensor) -> Form:
        if tensor.kind in PLAIN:
            return cls(32, 0, False)
        bits, block = FORMS[tensor.kind]
        return cls(4 if bits <= 4 else 8, block, tensor.kind in _WITH_MINIMUMS)


@dataclass(frozen=True, slots=True)
class Operands:
    """One stacked matrix of `rows` outputs and `columns` inputs."""

    form: Form
    rows: int
    columns: int
    codes: Bytes | None
    """[rows, blocks, bytes of a block]"""
    scales: F32 | None
    """[rows, blocks]"""
    offsets: F32 | None
    """[blocks, rows]: what the sum of a block's activations is multiplied with."""
    dense: F32 | None
    """[columns, rows]"""


def load_operands(tensors: Sequence[PackedTensor], source: TensorSource) -> Operands:
    """Repack tensors of one form into one matrix, slab by slab."""
    form = Form.of(tensors[0])
    rows, columns = sum(t.rows for t in tensors), tensors[0].columns
    if form.bits == 32:
        dense = np.empty((columns, rows), dtype=np.float32)
        for at, tensor, span, packed in _slabs(tensors, source):
            dense[:, at + span.start : at + span.stop] = decode(tensor.kind, packed).T
        return Operands(form, rows, columns, None, None, None, dense)
    blocks = columns // form.block
    codes = np.empty((rows, blocks, form.block * form.bits // 8), dtype=np.uint8)
    scales = np.empty((rows, blocks), dtype=np.float32)
    offsets = np.empty((blocks, rows), dtype=np.float32) if form.offsets else None
    for at, tensor, span, packed in _slabs(tensors, source):
        into = slice(at + span.start, at + span.stop)
        if tensor.kind == "Q4_0":
            _repack_q4_0(packed, codes[into], scales[into])
            continue
        groups = unpack(tensor.kind, packed)
        middle = 1 << (groups.bits - 1) if groups.minimums is not None else groups.zero
        moved = np.uint8((1 << (form.bits - 1)) - middle)
        centred = groups.codes + moved if moved else groups.codes
        codes[into] = _packed(centred, form.bits).reshape(codes[into].shape)
        scales[into] = groups.scales
        if offsets is not None and groups.minimums is not None:
            offsets[:, into] = (groups.scales * np.float32(middle) - groups.minimums).T
    return Operands(form, rows, columns, codes, scales, offsets, None)


def _slabs(
    tensors: Sequence[PackedTensor], source: TensorSource
) -> Iterator[tuple[int, PackedTensor, slice, Bytes]]:
    """Packed rows, with the row at which their tensor begins in the stack."""
    at = 0
    for tensor in tensors:
        for span, packed in tensor.slabs(source):
            yield at, tensor, span, packed
        at += tensor.rows


def _packed(codes: Bytes, bits: int) -> Bytes:
    """Codes as MatMulNBits reads them: of two neighbours in a byte the first is in the low nibble."""
    if bits == 8:
        return codes
    pairs = np.ascontiguousarray(codes).view("<u2")
    packed: Bytes = (pairs | pairs >> 4).astype(np.uint8)
    return packed


def _repack_q4_0(packed: Bytes, codes: Bytes, scales: F32) -> None:
    """Without a byte for each code between: byte j holds weights j and j+16."""
    count = len(packed)
    blocks = packed.reshape(count, -1, 18)
    scales[...] = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    pairs: NDArray[np.uint16] = np.ascontiguousarray(blocks[..., 2:]).view("<u2")
    low = pairs & np.uint16(0x0F0F)
    codes[..., :8] = low | low >> 4
    pairs >>= np.uint16(4)
    pairs &= np.uint16(0x0F0F)
    codes[..., 8:] = pairs | pairs >> 4

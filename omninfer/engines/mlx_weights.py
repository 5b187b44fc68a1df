"""GGUF weights as MLX holds and multiplies them.

Every quantisation of `packing` becomes codes that `mx.quantized_matmul` reads as they are, so no weight is
ever decoded in memory. MLX wants w = scale * code + bias with groups of 32 along a row:

- groups of 32 (most types): scale as it is, bias = -zero * scale - minimum;
- Q2_K, Q3_K and Q6_K have groups of 16, which MLX lacks. Each group of 32 codes gets the scales of both its
  halves, and a product is two: one with the first scales and x zeroed in the second halves, one the other
  way round. It costs twice the time and 4.0, 5.0 and 8.0 bits a weight instead of 2.6, 3.4 and 6.6;
  decoding to float16 would take 16;
- IQ4 and MXFP4 have uneven steps: the steps are the codes, in 8 and 5 bits.

Scales and biases are float16 wherever that loses no more than rounding to a half does (`_Buffer.fill`):
exact for Q4_0 … Q8_0, whose scales are halfs in the file, and within 2**-11 of the tensor's largest for
K-quants. In float32 a Q4_K weight would take 6 bits instead of 5, more than an engine's memory rule allows.

F32, F16 and BF16 stay what they are. Where the activations are of another type (float32 on the CPU), a
product converts a slab of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from omninfer.engines.checks import PackedTensor
from omninfer.engines.fields import Bytes
from omninfer.engines.interface import TensorSource
from omninfer.engines.packing import FORMS, PLAIN, unpack

Array = Any
"""mlx.core.array, which has no types that a strict check could use."""

GROUP: Final = 32
CONVERTED_BYTES: Final = 16 << 20
"""What a product may convert to the activations' type at a time."""


class Matrix(Protocol):
    """A weight matrix [outputs, inputs], however it is held; products and rows are float32."""

    def product(self, x: Array) -> Array:
        """x @ matrix.T"""

    def rows(self, index: Array) -> Array: ...

    def of_parts(self, x: Array, chosen: Array, count: int) -> Array:
        """The matrix is `count` equal ones on top of each other, and each vector goes through its own choice.

        x is [tokens, 1 or n, inputs], `chosen` [tokens, n]; the answer [tokens, n, outputs of one].
        """


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    weights: Array
    compute: Any
    """Type in which products are computed: float32, or on a GPU float16 (bfloat16 for such weights)."""

    def product(self, x: Array) -> Array:
        x = x.astype(self.compute)
        converted = 0 if self.weights.dtype == self.compute else self.weights.size * 4

        def multiply(rows: slice) -> Array:
            return (x @ self.weights[rows].astype(self.compute).T).astype(mx.float32)

        return _by_slabs(self.weights.shape[0], converted, multiply)

    def rows(self, index: Array) -> Array:
        return self.weights[index].astype(mx.float32)

    def of_parts(self, x: Array, chosen: Array, count: int) -> Array:
        (weights,), chosen = _parts((self.weights,), chosen, count, self.compute)
        x = x.astype(self.compute)[..., None, :]
        y = mx.gather_mm(x, weights.swapaxes(-1, -2), rhs_indices=chosen)
        return y[..., 0, :].astype(mx.float32)


@dataclass(frozen=True, slots=True)
class QuantMatrix:
    """Groups of 32."""

    codes: Array
    scales: Array
    biases: Array
    bits: int
    compute: Any

    def product(self, x: Array) -> Array:
        x = x.astype(self.compute)
        converted = 0 if self.scales.dtype == self.compute else self.scales.size * 8

        def multiply(rows: slice) -> Array:
            codes, scales, biases = self.codes[rows], self.scales[rows], self.biases[rows]
            y = mx.quantized_matmul(
                x, codes, scales, biases, transpose=True, group_size=GROUP, bits=self.bits
            )
            return y.astype(mx.float32)

        return _by_slabs(self.codes.shape[0], converted, multiply)

    def rows(self, index: Array) -> Array:
        scales, biases = self.scales[index].astype(mx.float32), self.biases[index].astype(mx.float32)
        return mx.dequantize(self.codes[index], scales, biases, group_size=GROUP, bits=self.bits)

    def of_parts(self, x: Array, chosen: Array, count: int) -> Array:
        arrays = (self.codes, self.scales, self.biases)
        (codes, scales, biases), chosen = _parts(arrays, chosen, count, self.compute)
        y = mx.gather_qmm(
            x.astype(self.compute)[..., None, :],
            codes,
            scales,
            biases,
            rhs_indices=chosen,
            transpose=True,
            group_size=GROUP,
            bits=self.bits,
        )
        return y[..., 0, :].astype(mx.float32)


@dataclass(frozen=True, slots=True)
class HalvedQuantMatrix:
    """Groups of 16: the same codes under the scales of the first and of the second half of each 32."""

    first: QuantMatrix
    second: QuantMatrix

    def product(self, x: Array) -> Array:
        mask = self._first_halves(x.shape[-1])
        zero = mx.array(0, dtype=x.dtype)
        return self.first.product(mx.where(mask, x, zero)) + self.second.product(mx.where(mask, zero, x))

    def rows(self, index: Array) -> Array:
        first, second = self.first.rows(index), self.second.rows(index)
        return mx.where(self._first_halves(first.shape[-1]), first, second)

    def of_parts(self, x: Array, chosen: Array, count: int) -> Array:
        halves, zero = self._first_halves(x.shape[-1]), mx.array(0, dtype=x.dtype)
        first = self.first.of_parts(mx.where(halves, x, zero), chosen, count)
        return first + self.second.of_parts(mx.where(halves, zero, x), chosen, count)

    @staticmethod
    def _first_halves(columns: int) -> Array:
        return mx.arange(columns) % GROUP < GROUP // 2


def _parts(arrays: tuple[Array, ...], chosen: Array, count: int, compute: Any) -> tuple[list[Array], Array]:
    """Arrays [count * rows, …] as [parts, rows, …] in the type of products, and which of these were chosen.

    Where a type has to be converted, only what was chosen is: MLX would convert all parts for each product.
    """
    parts = [a.reshape(count, a.shape[0] // count, *a.shape[1:]) for a in arrays]
    if all(a.dtype in (compute, mx.uint32) for a in arrays):
        return parts, chosen
    used, places = np.unique(np.array(chosen), return_inverse=True)
    index = mx.array(used.astype(np.uint32))
    taken = [part[index] for part in parts]
    converted = [a if a.dtype == mx.uint32 else a.astype(compute) for a in taken]
    return converted, mx.array(places.reshape(chosen.shape).astype(np.uint32))


def _by_slabs(rows: int, converted: int, multiply: Callable[[slice], Array]) -> Array:
    """A product over all rows of a matrix, of which `converted` bytes have to be converted on the way.

    MLX would convert the whole matrix before it multiplies; here it is a slab of rows at a time.
    """
    count = max(1, -(-converted // CONVERTED_BYTES))
    if count == 1:
        return multiply(slice(0, rows))
    step = -(-rows // count)
    parts = []
    for start in range(0, rows, step):
        parts.append(multiply(slice(start, start + step)))
        mx.eval(parts[-1])  # else all slabs would be in memory at once
    return mx.concatenate(parts, axis=-1)


def load_vector(tensor: PackedTensor, source: TensorSource) -> Array:
    return mx.array(tensor.decoded(source))


def load_matrix(tensor: PackedTensor, source: TensorSource, compute: Any) -> Matrix:
    """Repack one tensor, slab by slab; `compute` is the type in which its products are to be computed."""
    if tensor.kind in PLAIN:
        return _load_dense(tensor, source, compute)
    try:
        return _load_quantised(tensor, source, compute, mx.float16)
    except _ScalesTooWide:
        return _load_quantised(tensor, source, compute, mx.float32)


class _ScalesTooWide(Exception):
    """The scales or biases of a tensor do not fit into halfs."""


class _Buffer:
    """An MLX array that is written through numpy.

    In place on the CPU, so that nothing is in memory twice; on a GPU, where that memory may not be the
    host's, by way of a numpy array.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self._array = mx.zeros(shape, dtype)
        mx.eval(self._array)
        self._in_place = mx.default_device() == mx.Device(mx.cpu)
        view = np.asarray(memoryview(self._array))  # type: ignore[arg-type]  # it has the buffer protocol
        self._view: NDArray[Any] = view if self._in_place else np.zeros_like(view)

    def fill(self, rows: slice, values: NDArray[Any]) -> None:
        """Write rows, which may round float32 to halfs by no more than 2**-11 of the largest value."""
        kept = self._view[rows]
        with np.errstate(over="ignore"):
            kept[...] = values
        if kept.dtype == np.float16 and values.dtype == np.float32:
            lost = np.abs(kept.astype(np.float32) - values).max()
            if not lost <= 2.0**-11 * np.abs(values).max():
                raise _ScalesTooWide

    def array(self) -> Array:
        return self._array if self._in_place else mx.array(self._view)


def _load_dense(tensor: PackedTensor, source: TensorSource, compute: Any) -> DenseMatrix:
    # numpy has no bfloat16: the bits go in as integers and are then called what they are.
    raw, dtype = {
        "F32": (mx.float32, mx.float32),
        "F16": (mx.float16, mx.float16),
        "BF16": (mx.uint16, mx.bfloat16),
    }[tensor.kind]
    buffer = _Buffer((tensor.rows, tensor.columns), raw)
    for rows, packed in tensor.slabs(source):
        buffer.fill(rows, packed.view({"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.kind]))
    weights = buffer.array().view(dtype)
    mx.eval(weights)
    if compute == mx.float16 and dtype != mx.float16:
        compute = dtype  # a GPU multiplies these as they are; a half could not hold them
    return DenseMatrix(weights, compute)


def _load_quantised(tensor: PackedTensor, source: TensorSource, compute: Any, scale_type: Any) -> Matrix:
    bits, group = FORMS[tensor.kind]
    halves = GROUP // group
    shape = (tensor.rows, tensor.columns // GROUP)
    codes = _Buffer((tensor.rows, tensor.columns * bits // 32), mx.uint32)
    scales = [_Buffer(shape, scale_type) for _ in range(halves)]
    biases = [_Buffer(shape, scale_type) for _ in range(halves)]
    for rows, packed in tensor.slabs(source):
        groups = unpack(tensor.kind, packed)
        codes.fill(rows, pack_codes(groups.codes, bits))
        for half in range(halves):
            scale = groups.scales[:, half::halves]
            minimums = groups.minimums
            bias = -groups.zero * scale if minimums is None else -minimums[:, half::halves]
            scales[half].fill(rows, scale)
            biases[half].fill(rows, bias)
    packed_codes = codes.array()
    parts = [
        QuantMatrix(packed_codes, s.array(), b.array(), bits, compute)
        for s, b in zip(scales, biases, strict=True)
    ]
    return parts[0] if halves == 1 else HalvedQuantMatrix(*parts)


def pack_codes(codes: Bytes, bits: int) -> NDArray[np.uint32]:
    """[rows, columns] codes as MLX's words: one little-endian string of bits per row, low bits first."""
    rows = len(codes)
    if bits == 8:
        packed = codes
    elif bits == 4:
        packed = codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    else:  # 2, 3, 5 or 6 bits: eight codes are `bits` whole bytes
        words = np.zeros((rows, codes.shape[1] // 8), dtype="<u8")
        for i in range(8):
            words |= codes[:, i::8].astype(np.uint64) << np.uint64(bits * i)
        packed = words.view(np.uint8).reshape(rows, -1, 8)[..., :bits].reshape(rows, -1)
    return np.ascontiguousarray(packed).view("<u4")

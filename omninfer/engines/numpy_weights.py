"""Weight matrices of the numpy engine: decoded once, or packed and decoded in each product.

Products over packed rows are spread over threads, a slab of rows each, with a single-threaded BLAS.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from omninfer.engines.checks import PackedTensor
from omninfer.engines.fields import F32, Bytes
from omninfer.engines.interface import TensorSource
from omninfer.engines.packing import decode

SLAB_WEIGHTS: Final = 1 << 18
"""Weights decoded at a time in a product: 1 MB of float32 stays in a core's cache."""


class Matrix(Protocol):
    """A weight matrix [outputs, inputs], however it is held."""

    def product(self, x: F32) -> F32:
        """x @ matrix.T"""

    def rows(self, index: NDArray[Any]) -> F32: ...

    def part(self, rows: slice) -> Matrix:
        """Some neighbouring rows, such as those of one expert, as a matrix of their own."""


@dataclass(frozen=True, slots=True)
class DecodedMatrix:
    weights: F32

    def product(self, x: F32) -> F32:
        return x @ self.weights.T

    def rows(self, index: NDArray[Any]) -> F32:
        rows: F32 = self.weights[index]
        return rows

    def part(self, rows: slice) -> DecodedMatrix:
        return DecodedMatrix(self.weights[rows])


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    kind: str
    packed: Bytes
    columns: int
    threads: ThreadPoolExecutor

    def product(self, x: F32) -> F32:
        out = np.empty((len(x), len(self.packed)), dtype=np.float32)
        step = max(1, SLAB_WEIGHTS // self.columns)

        def multiply(start: int) -> None:
            slab = decode(self.kind, self.packed[start : start + step])
            np.matmul(x, slab.T, out=out[:, start : start + step])

        for _ in self.threads.map(multiply, range(0, len(self.packed), step)):
            pass  # map raises here what a slab raised
        return out

    def rows(self, index: NDArray[Any]) -> F32:
        return decode(self.kind, self.packed[index])

    def part(self, rows: slice) -> PackedMatrix:
        return PackedMatrix(self.kind, self.packed[rows], self.columns, self.threads)


def packed_matrix(tensor: PackedTensor, source: TensorSource, threads: ThreadPoolExecutor) -> PackedMatrix:
    packed = np.empty((tensor.rows, tensor.nbytes // tensor.rows), dtype=np.uint8)
    for rows, slab in tensor.slabs(source):
        packed[rows] = slab
    return PackedMatrix(tensor.kind, packed, tensor.columns, threads)

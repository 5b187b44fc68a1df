"""Keys and values of the mlx engine's slots: as products compute them, or 8-bit codes with a scale for each
group.

MLX arrays are values: a copied cache shares them until one of the two is written to, and an array that only
one cache holds is updated in place. What was written in 8 bits is read back as it was rounded: one layer's
keys and values are decoded at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx

from omninfer.arch import KVKind, ModelSpec, kv_group
from omninfer.engines.mlx_weights import Array

STEP: Final = 256
"""Tokens by which a slot's cache grows at least."""
LARGEST: Final = 65504.0
"""The largest half."""


@dataclass(slots=True)
class SlotCache:
    """Keys and values of one slot.

    For each layer the arrays of keys and those of values: [1, kv heads, capacity, head dim] of the type of
    products; or int8 of that shape and float16 [1, kv heads, capacity, groups].
    """

    keys: list[tuple[Array, ...]]
    values: list[tuple[Array, ...]]
    compute: Any
    length: int = 0

    @classmethod
    def empty(cls, layers: int, model: ModelSpec, kind: KVKind, compute: Any) -> SlotCache:
        heads, dim = model.kv_heads, model.head_dim
        shapes = [(dim, compute)]
        if kind == "q8":
            shapes = [(dim, mx.int8), (dim // kv_group(dim), mx.float16)]
        arrays = tuple(mx.zeros((1, heads, 0, width), dtype) for width, dtype in shapes)
        return cls([arrays] * layers, [arrays] * layers, compute)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for kept in (*self.keys, *self.values) for array in kept)

    @property
    def arrays(self) -> list[Array]:
        """All of them, to be evaluated."""
        return [array for kept in (*self.keys, *self.values) for array in kept]

    def reserve(self, length: int, context: int) -> None:
        for layers in (self.keys, self.values):
            for i, old in enumerate(layers):
                if old[0].shape[2] < length:
                    capacity = min(context, -(-length // STEP) * STEP)
                    layers[i] = tuple(_grown(array, capacity) for array in old)
                    mx.eval(layers[i])

    def append(
        self, layer: int, keys: Array, values: Array, start: int, window: int = 0
    ) -> tuple[Array, Array]:
        """Write at `start`; answers everything up to the end of that, or the last `window` of it."""
        stop = start + keys.shape[2]
        self.keys[layer] = _written(self.keys[layer], keys, start)
        self.values[layer] = _written(self.values[layer], values, start)
        span = slice(max(0, stop - window) if window else 0, stop)
        return self._read(self.keys[layer], span), self._read(self.values[layer], span)

    def copy(self, length: int) -> SlotCache:
        """Views; the next `reserve` copies what is seen of them."""
        keys, values = (
            [tuple(array[:, :, :length] for array in arrays) for arrays in layers]
            for layers in (self.keys, self.values)
        )
        mx.eval(keys, values)
        return SlotCache(keys, values, self.compute, length)

    def _read(self, arrays: tuple[Array, ...], span: slice) -> Array:
        if len(arrays) == 1:
            return arrays[0][:, :, span].astype(self.compute)
        codes, scales = (array[:, :, span].astype(self.compute) for array in arrays)
        groups = codes.reshape(*codes.shape[:3], scales.shape[3], -1)
        return (groups * scales[..., None]).reshape(codes.shape)


def _grown(array: Array, capacity: int) -> Array:
    more = mx.zeros((*array.shape[:2], capacity - array.shape[2], array.shape[3]), array.dtype)
    return mx.concatenate([array, more], axis=2)


def _written(arrays: tuple[Array, ...], x: Array, start: int) -> tuple[Array, ...]:
    at = mx.array([start])
    if len(arrays) == 1:
        return (mx.slice_update(arrays[0], x.astype(arrays[0].dtype), at, axes=(2,)),)
    codes, scales = arrays
    groups = x.astype(mx.float32).reshape(*x.shape[:3], scales.shape[3], -1)
    scale = mx.minimum(mx.abs(groups).max(axis=-1) / 127, LARGEST).astype(mx.float16)
    # A scale of 0 is that of a group of zeros, or of what is too small for halfs.
    divisor = mx.where(scale == 0, mx.inf, scale.astype(mx.float32))
    rounded = mx.clip(mx.round(groups / divisor[..., None]), -127, 127).astype(mx.int8).reshape(x.shape)
    return (
        mx.slice_update(codes, rounded, at, axes=(2,)),
        mx.slice_update(scales, scale, at, axes=(2,)),
    )

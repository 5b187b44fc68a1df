"""Keys and values of the numpy engine's slots: float32, or 8-bit codes with a scale for each group of a head.

What was written in 8 bits is read back as it was rounded, the tokens of a forward their own included, so that
a prompt says the same however it is cut into pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from omninfer.arch import KVKind, ModelSpec, kv_group
from omninfer.engines.fields import F32

STEP: Final = 256
"""Tokens by which a slot's cache grows at least."""
LARGEST: Final = 65504.0
"""The largest half."""


@dataclass(slots=True)
class SlotCache:
    """Keys and values of one slot.

    For each layer the arrays of keys and those of values: float32 [kv heads, capacity, head dim]; or int8 of
    that shape and float16 [kv heads, capacity, groups].
    """

    keys: list[tuple[NDArray[Any], ...]]
    values: list[tuple[NDArray[Any], ...]]
    length: int = 0

    @classmethod
    def empty(cls, layers: int, model: ModelSpec, kind: KVKind) -> SlotCache:
        heads, dim = model.kv_heads, model.head_dim
        if kind == "q8":
            codes, scales = (
                np.zeros((heads, 0, dim), np.int8),
                np.zeros((heads, 0, dim // kv_group(dim)), "<f2"),
            )
            arrays: tuple[NDArray[Any], ...] = (codes, scales)
        else:
            arrays = (np.zeros((heads, 0, dim), np.float32),)
        return cls([arrays] * layers, [arrays] * layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for kept in (*self.keys, *self.values) for array in kept)

    def reserve(self, length: int, context: int) -> None:
        for layers in (self.keys, self.values):
            for i, arrays in enumerate(layers):
                if arrays[0].shape[1] < length:
                    capacity = min(context, -(-length // STEP) * STEP)
                    layers[i] = tuple(_grown(array, capacity) for array in arrays)

    def append(self, layer: int, keys: F32, values: F32, start: int) -> tuple[F32, F32]:
        """Write [kv heads, tokens, head dim] at `start`; answers everything up to the end of that."""
        stop = start + keys.shape[1]
        _write(self.keys[layer], keys, start)
        _write(self.values[layer], values, start)
        return _read(self.keys[layer], stop), _read(self.values[layer], stop)

    def copy(self, length: int) -> SlotCache:
        keys, values = (
            [tuple(array[:, :length].copy() for array in arrays) for arrays in layers]
            for layers in (self.keys, self.values)
        )
        return SlotCache(keys, values, length)


def _grown(array: NDArray[Any], capacity: int) -> NDArray[Any]:
    new = np.zeros((array.shape[0], capacity, array.shape[2]), array.dtype)
    new[:, : array.shape[1]] = array
    return new


def _write(arrays: tuple[NDArray[Any], ...], x: F32, start: int) -> None:
    span = slice(start, start + x.shape[1])
    if len(arrays) == 1:
        arrays[0][:, span] = x
        return
    codes, scales = arrays
    groups = x.reshape(*x.shape[:2], scales.shape[2], -1)
    scale = np.minimum(np.abs(groups).max(axis=-1) / 127, LARGEST).astype("<f2")
    scales[:, span] = scale
    # A scale of 0 is that of a group of zeros, or of what is too small for halfs.
    divisor = np.where(scale == 0, np.inf, scale.astype(np.float32))
    rounded = np.clip(np.rint(groups / divisor[..., None]), -127, 127)
    codes[:, span] = rounded.reshape(x.shape)


def _read(arrays: tuple[NDArray[Any], ...], stop: int) -> F32:
    if len(arrays) == 1:
        plain: F32 = arrays[0][:, :stop]
        return plain
    codes, scales = (array[:, :stop].astype(np.float32) for array in arrays)
    groups = codes.reshape(*codes.shape[:2], scales.shape[2], -1)
    groups *= scales[..., None]
    return groups.reshape(codes.shape)

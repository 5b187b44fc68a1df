"""The numpy engine: the obvious way to compute a transformer, in float32. The oracle of the others.

It prefers being plainly right over being fast. Weights stay packed and are decoded, a slab of rows at
a time, in each product; only a stage whose weights are small in float32 as well is decoded once, at load.
Slabs are spread over a few threads, each with a single-threaded BLAS. No GPU; no batching over slots.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from omninfer.arch import EMBEDDING, HEAD_NORM, ROPE_FREQS, Feature, ModelSpec, RopeKind
from omninfer.engines.blas import limit_blas_to_one_thread
from omninfer.engines.checks import PackedTensor, StageLimits, check_tensors
from omninfer.engines.interface import (
    Engine,
    Hidden,
    Logits,
    Progress,
    StageSpec,
    TensorSource,
    Tokens,
    WhichLogits,
)
from omninfer.engines.packing import F32, Bytes, decode
from omninfer.engines.slots import SlottedStage

DECODED_LIMIT: Final = 128 << 20
"""A stage whose matrices take no more than this in float32 is decoded at load. Within what the engines'
memory rule (1.3 x packed + 300 MB) leaves beside the interpreter and the caches."""
SLAB_WEIGHTS: Final = 1 << 18
"""Weights decoded at a time in a product: 1 MB of float32 stays in a core's cache."""
MAX_THREADS: Final = min(8, os.cpu_count() or 1)
"""Beyond these the memory's bandwidth is the limit."""
CACHE_STEP: Final = 256
"""Tokens by which a slot's cache grows at least."""


class Matrix(Protocol):
    """A weight matrix [outputs, inputs], however it is held."""

    def product(self, x: F32) -> F32:
        """x @ matrix.T"""

    def rows(self, index: Tokens) -> F32: ...


@dataclass(frozen=True, slots=True)
class DecodedMatrix:
    weights: F32

    def product(self, x: F32) -> F32:
        return x @ self.weights.T

    def rows(self, index: Tokens) -> F32:
        return self.weights[index]


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

    def rows(self, index: Tokens) -> F32:
        return decode(self.kind, self.packed[index])


@dataclass(slots=True)
class SlotCache:
    """Keys and values of one slot: per layer [kv heads, capacity, head dim]."""

    keys: list[F32]
    values: list[F32]
    length: int = 0

    @classmethod
    def empty(cls, layers: int, model: ModelSpec) -> SlotCache:
        shape = (model.kv_heads, 0, model.head_dim)
        return cls(
            [np.zeros(shape, np.float32) for _ in range(layers)],
            [np.zeros(shape, np.float32) for _ in range(layers)],
        )

    def reserve(self, length: int, context: int) -> None:
        for arrays in (self.keys, self.values):
            for i, old in enumerate(arrays):
                if old.shape[1] < length:
                    capacity = min(context, -(-length // CACHE_STEP) * CACHE_STEP)
                    arrays[i] = np.zeros((old.shape[0], capacity, old.shape[2]), np.float32)
                    arrays[i][:, : old.shape[1]] = old

    def copy(self) -> SlotCache:
        return SlotCache([k.copy() for k in self.keys], [v.copy() for v in self.values], self.length)


@dataclass(slots=True)
class NumpyStage(SlottedStage[SlotCache]):
    """A stage of the numpy engine."""

    matrices: dict[str, Matrix]
    vectors: dict[str, F32]
    threads: ThreadPoolExecutor
    nbytes: int

    def forward(
        self, x: Tokens | Hidden, *, slot: int, position: int, logits: WhichLogits = "last"
    ) -> Hidden | Logits:
        held = self.length(slot)
        self.limits.check_call(x, position, held)
        model = self.spec.model
        cache = self._caches.get(slot) or SlotCache.empty(self.spec.last - self.spec.first, model)
        cache.reserve(held + len(x), self.limits.context)
        outputs = []
        for piece in self.limits.pieces(len(x), held):
            h = self._enter(x[piece])
            for i in range(self.spec.last - self.spec.first):
                h = self._layer(i, h, cache, held + piece.start)
            if self.spec.head:
                h = h[self.limits.head_rows(logits, piece, len(x))]
                h = rms_norm(h, self.vectors[HEAD_NORM], model.norm_eps)
                h = self.matrices[model.head_tensor].product(h)
            outputs.append(h)
        cache.length = held + len(x)
        self._caches[slot] = cache
        return np.concatenate(outputs)

    def close(self) -> None:
        self._close_slots()
        self.matrices.clear()
        self.vectors.clear()
        self.threads.shutdown()

    def _enter(self, x: Tokens | Hidden) -> F32:
        if self.spec.embed:
            return self.matrices[EMBEDDING].rows(x.astype(np.int32, copy=False))
        return x.astype(np.float32, copy=False)

    def _layer(self, index: int, h: F32, cache: SlotCache, start: int) -> F32:
        """One transformer block over tokens start, start+1, … of a slot."""
        prefix = f"blk.{self.spec.first + index}."
        eps = self.spec.model.norm_eps
        x = rms_norm(h, self.vectors[prefix + "attn_norm.weight"], eps)
        h = h + self._attention(prefix, x, cache.keys[index], cache.values[index], start)
        x = rms_norm(h, self.vectors[prefix + "ffn_norm.weight"], eps)
        gated = silu(self._linear(prefix + "ffn_gate", x)) * self._linear(prefix + "ffn_up", x)
        return h + self._linear(prefix + "ffn_down", gated)

    def _attention(self, prefix: str, x: F32, keys: F32, values: F32, start: int) -> F32:
        model, count = self.spec.model, len(x)
        stop = start + count
        q = self._linear(prefix + "attn_q", x).reshape(count, model.heads, model.head_dim)
        k = self._linear(prefix + "attn_k", x).reshape(count, model.kv_heads, model.head_dim)
        v = self._linear(prefix + "attn_v", x).reshape(count, model.kv_heads, model.head_dim)
        if Feature.QK_NORM in model.features:
            q = rms_norm(q, self.vectors[prefix + "attn_q_norm.weight"], model.norm_eps)
            k = rms_norm(k, self.vectors[prefix + "attn_k_norm.weight"], model.norm_eps)
        angles = rope_angles(model, start, count, self.vectors.get(ROPE_FREQS))
        keys[:, start:stop] = rotate(k, angles, model).transpose(1, 0, 2)
        values[:, start:stop] = v.transpose(1, 0, 2)
        # Neighbouring query heads share a key/value head: [kv heads, queries of a head, tokens, head dim].
        grouped = (
            rotate(q, angles, model).transpose(1, 0, 2).reshape(model.kv_heads, -1, count, model.head_dim)
        )
        scores = grouped @ keys[:, None, :stop].swapaxes(-1, -2) / np.float32(np.sqrt(model.head_dim))
        future = np.arange(stop) > np.arange(start, stop)[:, None]
        scores[..., future] = -np.inf
        mixed = softmax(scores) @ values[:, None, :stop]
        joined = mixed.reshape(model.heads, count, model.head_dim).transpose(1, 0, 2).reshape(count, -1)
        return self._linear(prefix + "attn_output", joined)

    def _linear(self, name: str, x: F32) -> F32:
        y = self.matrices[name + ".weight"].product(x)
        bias = self.vectors.get(name + ".bias")
        return y if bias is None else y + bias


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    scale = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(eps))
    normed: F32 = x / scale * weight
    return normed


def silu(x: F32) -> F32:
    with np.errstate(over="ignore"):  # exp(-x) becomes infinite and the quotient 0, as it should
        gated: F32 = x / (1 + np.exp(-x))
    return gated


def softmax(x: F32) -> F32:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    weights: F32 = e / e.sum(axis=-1, keepdims=True)
    return weights


def rope_angles(model: ModelSpec, start: int, count: int, divisors: F32 | None) -> F32:
    """[tokens, dims / 2], computed in float64: angles grow with the position."""
    rope = model.rope
    frequencies = rope.base ** (-np.arange(0, rope.dims, 2) / rope.dims) / rope.factor
    if divisors is not None:
        frequencies = frequencies / divisors
    return (np.arange(start, start + count)[:, None] * frequencies).astype(np.float32)


def rotate(x: F32, angles: F32, model: ModelSpec) -> F32:
    """Turn the pairs of the leading `rope.dims` elements of each head: x is [tokens, heads, head dim]."""
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
    dims = model.rope.dims
    if model.rope.kind is RopeKind.INTERLEAVED:
        first, second = slice(0, dims, 2), slice(1, dims, 2)
    else:
        first, second = slice(0, dims // 2), slice(dims // 2, dims)
    a, b = x[..., first], x[..., second]
    out = x.copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out


class NumpyEngine:
    """See the module."""

    name = "numpy"

    def unavailable(self) -> str | None:
        return None

    def accelerated(self) -> bool:
        return False

    def load(
        self,
        spec: StageSpec,
        source: TensorSource,
        *,
        context: int,
        slots: int = 1,
        progress: Progress | None = None,
    ) -> NumpyStage:
        limits = StageLimits(spec, context, slots)
        tensors = check_tensors(spec, source)
        limit_blas_to_one_thread()
        threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="numpy-stage")
        total = sum(t.nbytes for t in tensors.values())
        decoded = 4 * sum(t.rows * t.columns for t in tensors.values()) <= DECODED_LIMIT
        matrices: dict[str, Matrix] = {}
        vectors: dict[str, F32] = {}
        done = 0
        for name, tensor in tensors.items():
            if tensor.is_vector:
                vectors[name] = tensor.decoded(source)
            elif decoded or tensor.kind == "F32":
                matrices[name] = DecodedMatrix(tensor.decoded(source))
            else:
                matrices[name] = _packed(tensor, source, threads)
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
        return NumpyStage(limits, matrices, vectors, threads, total)


def _packed(tensor: PackedTensor, source: TensorSource, threads: ThreadPoolExecutor) -> PackedMatrix:
    packed = np.empty((tensor.rows, tensor.nbytes // tensor.rows), dtype=np.uint8)
    for rows, slab in tensor.slabs(source):
        packed[rows] = slab
    return PackedMatrix(tensor.kind, packed, tensor.columns, threads)


def engine() -> Engine:
    return NumpyEngine()

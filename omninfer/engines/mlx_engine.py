"""The mlx engine: packed weights multiplied as they are, on Apple and CUDA GPUs, or slowly on a CPU.

Activations between layers are float32. Products, keys and values are float32 on MLX's CPU build, where
halfs are some thirty times slower, and float16 on a GPU. Nothing lazy survives a call: MLX can not evaluate
in one thread a graph that was built in another, and callers are free to change threads between calls.

No batching over slots. Importing this module imports mlx; `omninfer.engines` does so only when asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx
import numpy as np

from omninfer.arch import EMBEDDING, HEAD_NORM, ROPE_FREQS, Feature, ModelSpec, RopeKind
from omninfer.engines.checks import StageLimits, check_features, check_tensors
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
from omninfer.engines.mlx_weights import Array, Matrix, load_matrix, load_vector
from omninfer.engines.slots import SlottedStage

FEATURES: Final = (
    Feature.QKV_BIAS | Feature.OUTPUT_BIAS | Feature.QK_NORM | Feature.FFN_BIAS | Feature.ROPE_FREQS
)
"""What this engine knows of transformer blocks."""
CACHE_STEP: Final = 256
"""Tokens by which a slot's cache grows at least."""
FREED_LIMIT: Final = 64 << 20
"""Bytes of freed arrays that MLX keeps for reuse on the CPU; its default is most of the machine's memory."""


@dataclass(slots=True)
class SlotCache:
    """Keys and values of one slot: per layer [1, kv heads, capacity, head dim].

    MLX arrays are values: a copied cache shares them until one of the two is written to, and an array
    that only this cache holds is updated in place.
    """

    keys: list[Array]
    values: list[Array]
    length: int = 0

    @classmethod
    def empty(cls, layers: int, model: ModelSpec, dtype: Any) -> SlotCache:
        shape = (1, model.kv_heads, 0, model.head_dim)
        return cls(
            [mx.zeros(shape, dtype) for _ in range(layers)],
            [mx.zeros(shape, dtype) for _ in range(layers)],
        )

    def reserve(self, length: int, context: int) -> None:
        for arrays in (self.keys, self.values):
            for i, old in enumerate(arrays):
                if old.shape[2] < length:
                    capacity = min(context, -(-length // CACHE_STEP) * CACHE_STEP)
                    more = mx.zeros((*old.shape[:2], capacity - old.shape[2], old.shape[3]), old.dtype)
                    arrays[i] = mx.concatenate([old, more], axis=2)
                    mx.eval(arrays[i])

    def append(self, layer: int, keys: Array, values: Array, start: int) -> tuple[Array, Array]:
        """Write at `start`, and answer everything up to the end of what was written."""
        at = mx.array([start])
        self.keys[layer] = mx.slice_update(self.keys[layer], keys, at, axes=(2,))
        self.values[layer] = mx.slice_update(self.values[layer], values, at, axes=(2,))
        stop = start + keys.shape[2]
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]

    def copy(self) -> SlotCache:
        return SlotCache(list(self.keys), list(self.values), self.length)


@dataclass(slots=True)
class MlxStage(SlottedStage[SlotCache]):
    """A stage of the mlx engine."""

    compute: Any
    matrices: dict[str, Matrix]
    vectors: dict[str, Array]
    nbytes: int

    def forward(
        self, x: Tokens | Hidden, *, slot: int, position: int, logits: WhichLogits = "last"
    ) -> Hidden | Logits:
        held = self.length(slot)
        self.limits.check_call(x, position, held)
        model = self.spec.model
        layers = self.spec.last - self.spec.first
        cache = self._caches.get(slot) or SlotCache.empty(layers, model, self.compute)
        cache.reserve(held + len(x), self.limits.context)
        outputs = []
        for piece in self.limits.pieces(len(x), held):
            h = mx.array(x[piece])
            if self.spec.embed:
                h = self.matrices[EMBEDDING].rows(h)
            for i in range(layers):
                h = self._layer(i, h, cache, held + piece.start)
            if self.spec.head:
                h = self._head(h[self.limits.head_rows(logits, piece, len(x))])
            mx.eval(h, cache.keys, cache.values)
            outputs.append(np.array(h, dtype=np.float32))
        cache.length = held + len(x)
        self._caches[slot] = cache
        return np.concatenate(outputs)

    def close(self) -> None:
        self._close_slots()
        self.matrices.clear()
        self.vectors.clear()
        mx.clear_cache()

    def _head(self, h: Array) -> Array:
        model = self.spec.model
        if h.shape[0] == 0:
            return mx.zeros((0, model.vocab))
        normed = mx.fast.rms_norm(h, self.vectors[HEAD_NORM], model.norm_eps)
        return self.matrices[model.head_tensor].product(normed)

    def _layer(self, index: int, h: Array, cache: SlotCache, start: int) -> Array:
        """One transformer block over tokens start, start+1, … of a slot."""
        prefix = f"blk.{self.spec.first + index}."
        eps = self.spec.model.norm_eps
        x = mx.fast.rms_norm(h, self.vectors[prefix + "attn_norm.weight"], eps)
        h = h + self._attention(index, x, cache, start)
        x = mx.fast.rms_norm(h, self.vectors[prefix + "ffn_norm.weight"], eps)
        gate = self._linear(prefix + "ffn_gate", x)
        gated = gate * mx.sigmoid(gate) * self._linear(prefix + "ffn_up", x)
        return h + self._linear(prefix + "ffn_down", gated)

    def _attention(self, index: int, x: Array, cache: SlotCache, start: int) -> Array:
        prefix = f"blk.{self.spec.first + index}."
        model, count = self.spec.model, x.shape[0]
        q = self._linear(prefix + "attn_q", x).reshape(1, count, model.heads, model.head_dim)
        k = self._linear(prefix + "attn_k", x).reshape(1, count, model.kv_heads, model.head_dim)
        v = self._linear(prefix + "attn_v", x).reshape(1, count, model.kv_heads, model.head_dim)
        if Feature.QK_NORM in model.features:
            q = mx.fast.rms_norm(q, self.vectors[prefix + "attn_q_norm.weight"], model.norm_eps)
            k = mx.fast.rms_norm(k, self.vectors[prefix + "attn_k_norm.weight"], model.norm_eps)
        q = self._rotate(q.transpose(0, 2, 1, 3), start).astype(self.compute)
        k = self._rotate(k.transpose(0, 2, 1, 3), start).astype(self.compute)
        keys, values = cache.append(index, k, v.transpose(0, 2, 1, 3).astype(self.compute), start)
        mixed = mx.fast.scaled_dot_product_attention(
            q, keys, values, scale=model.head_dim**-0.5, mask="causal" if count > 1 else None
        )
        joined = mixed.transpose(0, 2, 1, 3).reshape(count, -1).astype(mx.float32)
        return self._linear(prefix + "attn_output", joined)

    def _rotate(self, x: Array, start: int) -> Array:
        """x is [1, heads, tokens, head dim]."""
        rope = self.spec.model.rope
        return mx.fast.rope(
            x,
            rope.dims,
            traditional=rope.kind is RopeKind.INTERLEAVED,
            base=None,
            scale=1.0,
            offset=start,
            freqs=self.vectors[ROPE_FREQS],
        )

    def _linear(self, name: str, x: Array) -> Array:
        y = self.matrices[name + ".weight"].product(x)
        bias = self.vectors.get(name + ".bias")
        return y if bias is None else y + bias


def rope_wavelengths(model: ModelSpec, divisors: Array | None) -> Array:
    """[dims / 2]: what a position is divided by to give each pair's angle (`freqs` of mx.fast.rope)."""
    rope = model.rope
    wavelengths = rope.base ** (np.arange(0, rope.dims, 2) / rope.dims) * rope.factor
    if divisors is not None:
        wavelengths = wavelengths * np.array(divisors)
    return mx.array(wavelengths.astype(np.float32))


class MlxEngine:
    """See the module. `compute` is the type of products; None picks the device's best."""

    name = "mlx"

    def __init__(self, compute: Any = None) -> None:
        self._compute = compute

    def unavailable(self) -> str | None:
        return None

    def accelerated(self) -> bool:
        return bool(mx.default_device() != mx.Device(mx.cpu))

    def load(
        self,
        spec: StageSpec,
        source: TensorSource,
        *,
        context: int,
        slots: int = 1,
        progress: Progress | None = None,
    ) -> MlxStage:
        limits = StageLimits(spec, context, slots)
        check_features(spec.model, FEATURES, self.name)
        tensors = check_tensors(spec, source)
        if not self.accelerated():
            mx.set_cache_limit(FREED_LIMIT)
        compute = self._compute or (mx.float16 if self.accelerated() else mx.float32)
        total = sum(t.nbytes for t in tensors.values())
        matrices: dict[str, Matrix] = {}
        vectors: dict[str, Array] = {}
        done = 0
        for name, tensor in tensors.items():
            if tensor.is_vector:
                vectors[name] = load_vector(tensor, source)
            else:
                matrices[name] = load_matrix(tensor, source, compute)
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
        vectors[ROPE_FREQS] = rope_wavelengths(spec.model, vectors.get(ROPE_FREQS))
        mx.eval(vectors)
        return MlxStage(limits, compute, matrices, vectors, total)


def engine() -> Engine:
    return MlxEngine()

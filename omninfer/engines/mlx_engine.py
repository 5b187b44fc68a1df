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

from omninfer.arch import EMBEDDING, HEAD_NORM, KV_KINDS, Feature, KVKind
from omninfer.engines.checks import StageLimits, check_tensors
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
from omninfer.engines.mlx_cache import SlotCache
from omninfer.engines.mlx_math import (
    activated,
    capped,
    capped_attention,
    mask,
    rotate,
    route,
    wavelengths,
)
from omninfer.engines.mlx_weights import Array, Matrix, load_matrix, load_vector
from omninfer.engines.slots import SlottedStage

WAVES: Final = "wavelengths"
LOCAL_WAVES: Final = "local wavelengths"
"""Names of what is kept with the vectors and is in no file: see `wavelengths`."""
FREED_LIMIT: Final = 64 << 20
"""Bytes of freed arrays that MLX keeps for reuse on the CPU; its default is most of the machine's memory."""


@dataclass(slots=True)
class MlxStage(SlottedStage[SlotCache]):
    """A stage of the mlx engine."""

    compute: Any
    kv: KVKind
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
        cache = self._caches.get(slot) or SlotCache.empty(layers, model, self.kv, self.compute)
        cache.reserve(held + len(x), self.limits.context)
        outputs = []
        for piece in self.limits.pieces(len(x), held):
            h = mx.array(x[piece])
            if self.spec.embed:
                h = self.matrices[EMBEDDING].rows(h) * model.embedding_scale
            for i in range(layers):
                h = self._layer(i, h, cache, held + piece.start)
            if self.spec.head:
                h = self._head(h[self.limits.head_rows(logits, piece, len(x))])
            mx.eval(h, cache.arrays)
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
        return capped(self.matrices[model.head_tensor].product(normed), model.logit_cap)

    def _layer(self, index: int, h: Array, cache: SlotCache, start: int) -> Array:
        """One transformer block over tokens start, start+1, … of a slot."""
        model, prefix = self.spec.model, f"blk.{self.spec.first + index}."
        x = self._norm(prefix + "attn_norm", h)
        added = self._attention(index, x, cache, start)
        if Feature.POST_NORMS in model.features:
            added = self._norm(prefix + "post_attention_norm", added)
        h = h + added
        x = self._norm(prefix + model.ffn_norm.removesuffix(".weight"), h)
        added = self._experts(prefix, x) if model.experts else self._feed_forward(prefix, "", x)
        if Feature.POST_NORMS in model.features:
            added = self._norm(prefix + "post_ffw_norm", added)
        return h + added

    def _attention(self, index: int, x: Array, cache: SlotCache, start: int) -> Array:
        model, layer, count = self.spec.model, self.spec.first + index, x.shape[0]
        prefix, rope = f"blk.{layer}.", model.rope_of(layer)
        waves = self.vectors[LOCAL_WAVES if model.windowed[layer] else WAVES]
        q, k, v = self._queries_keys_values(prefix, x)
        q = rotate(q.transpose(0, 2, 1, 3), rope, waves, start).astype(self.compute)
        k = rotate(k.transpose(0, 2, 1, 3), rope, waves, start).astype(self.compute)
        window = model.window_of(layer)
        v = v.transpose(0, 2, 1, 3).astype(self.compute)
        # What a single token does not see need not be masked, nor read.
        keys, values = cache.append(index, k, v, start, window if count == 1 else 0)
        seen = mask(count, keys.shape[2], window)
        if model.attention_cap:
            mixed = capped_attention(q, keys, values, model.attention_scale, model.attention_cap, seen)
        else:
            sinks = self.vectors.get(prefix + "attn_sinks.weight")
            sinks = None if sinks is None else sinks.astype(self.compute)
            mixed = mx.fast.scaled_dot_product_attention(
                q, keys, values, scale=model.attention_scale, mask=seen, sinks=sinks
            )
        joined = mixed.transpose(0, 2, 1, 3).reshape(count, -1).astype(mx.float32)
        return self._linear(prefix + "attn_output", joined)

    def _queries_keys_values(self, prefix: str, x: Array) -> tuple[Array, Array, Array]:
        """Each [1, tokens, heads, head dim], not rotated yet."""
        model, count = self.spec.model, x.shape[0]
        if Feature.FUSED_QKV in model.features:
            edges = [model.q_width, model.q_width + model.kv_width]
            parts: list[Array] = list(mx.split(self._linear(prefix + "attn_qkv", x), edges, axis=-1))
        else:
            parts = [self._linear(prefix + name, x) for name in ("attn_q", "attn_k", "attn_v")]
        q, k, v = (part.reshape(1, count, -1, model.head_dim) for part in parts)
        if Feature.QK_NORM in model.features:
            q, k = self._norm(prefix + "attn_q_norm", q), self._norm(prefix + "attn_k_norm", k)
        return q, k, v

    def _feed_forward(self, prefix: str, kind: str, x: Array) -> Array:
        """The dense feed-forward, or that of the shared expert (`_shexp`)."""
        features = self.spec.model.features
        up = self._linear(f"{prefix}ffn_up{kind}", x)
        if Feature.FUSED_GATE_UP in features:
            gate, up = mx.split(up, 2, axis=-1)
        else:
            gate = self._linear(f"{prefix}ffn_gate{kind}", x)
        return self._linear(f"{prefix}ffn_down{kind}", activated(features, gate, up))

    def _experts(self, prefix: str, x: Array) -> Array:
        """Each token through the experts that its router picks."""
        model = self.spec.model
        assert model.experts is not None
        chosen, weights = route(self._linear(prefix + "ffn_gate_inp", x), model.experts)
        own = x[:, None]
        gate, up = (self._of_experts(prefix + name, own, chosen) for name in ("ffn_gate", "ffn_up"))
        answers = self._of_experts(prefix + "ffn_down", activated(model.features, gate, up), chosen)
        out = (answers * weights[..., None]).sum(axis=1)
        if Feature.SHARED_EXPERT in model.features:
            opened = mx.sigmoid(x @ self.vectors[prefix + "ffn_gate_inp_shexp.weight"])
            out = out + self._feed_forward(prefix, "_shexp", x) * opened[:, None]
        return out

    def _of_experts(self, name: str, x: Array, chosen: Array) -> Array:
        """x [tokens, 1 or used, inputs] through experts [tokens, used]: [tokens, used, outputs]."""
        assert self.spec.model.experts is not None
        matrix = self.matrices[f"{name}_exps.weight"]
        y = matrix.of_parts(x, chosen, self.spec.model.experts.count)
        biases = self.matrices.get(f"{name}_exps.bias")
        return y if biases is None else y + biases.rows(chosen)

    def _norm(self, name: str, x: Array) -> Array:
        return mx.fast.rms_norm(x, self.vectors[name + ".weight"], self.spec.model.norm_eps)

    def _linear(self, name: str, x: Array) -> Array:
        y = self.matrices[name + ".weight"].product(x)
        bias = self.vectors.get(name + ".bias")
        return y if bias is None else y + bias


class MlxEngine:
    """See the module. `compute` is the type of products; None picks the device's best."""

    name = "mlx"
    features = ~Feature.NONE
    kv_kinds = KV_KINDS

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
        kv: KVKind = "full",
        progress: Progress | None = None,
    ) -> MlxStage:
        limits = StageLimits(spec, context, slots)
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
        for waves, rope in ((WAVES, spec.model.rope), (LOCAL_WAVES, spec.model.local_rope)):
            vectors[waves] = wavelengths(rope, vectors.get(rope.divisors(context) or ""))
        mx.eval(vectors)
        return MlxStage(limits, compute, kv, matrices, vectors, total)


def engine() -> Engine:
    return MlxEngine()

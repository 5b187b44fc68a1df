"""The numpy engine: the obvious way to compute a transformer, in float32. The oracle of the others.

It prefers being plainly right over being fast. Weights stay packed and are decoded, a slab of rows at
a time, in each product; only a stage whose weights are small in float32 as well is decoded once, at load.
Slabs are spread over a few threads, each with a single-threaded BLAS. No GPU; no batching over slots.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from omninfer.arch import EMBEDDING, HEAD_NORM, KV_KINDS, Feature, KVKind, Rope
from omninfer.engines.blas import limit_blas_to_one_thread
from omninfer.engines.checks import StageLimits, check_tensors
from omninfer.engines.fields import F32
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
from omninfer.engines.numpy_cache import SlotCache
from omninfer.engines.numpy_math import (
    activated,
    capped,
    rms_norm,
    rope_angles,
    rotate,
    route,
    sigmoid,
    softmax,
    softmax_with_sink,
)
from omninfer.engines.numpy_weights import DecodedMatrix, Matrix, packed_matrix
from omninfer.engines.packing import DECODABLE
from omninfer.engines.slots import SlottedStage

DECODED_LIMIT: Final = 128 << 20
"""A stage whose matrices take no more than this in float32 is decoded at load. Within what the engines'
memory rule (1.3 x packed + 300 MB) leaves beside the interpreter and the caches."""
MAX_THREADS: Final = min(8, os.cpu_count() or 1)
"""Beyond these the memory's bandwidth is the limit."""


@dataclass(slots=True)
class NumpyStage(SlottedStage[SlotCache]):
    """A stage of the numpy engine."""

    kv: KVKind
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
        cache = self._caches.get(slot) or SlotCache.empty(self.spec.last - self.spec.first, model, self.kv)
        cache.reserve(held + len(x), self.limits.context)
        outputs = []
        for piece in self.limits.pieces(len(x), held):
            h = self._enter(x[piece])
            for i in range(self.spec.last - self.spec.first):
                h = self._layer(i, h, cache, held + piece.start)
            if self.spec.head:
                h = h[self.limits.head_rows(logits, piece, len(x))]
                h = rms_norm(h, self.vectors[HEAD_NORM], model.norm_eps)
                h = capped(self.matrices[model.head_tensor].product(h), model.logit_cap)
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
            rows = self.matrices[EMBEDDING].rows(x.astype(np.int32, copy=False))
            return rows * np.float32(self.spec.model.embedding_scale)
        return x.astype(np.float32, copy=False)

    def _layer(self, index: int, h: F32, cache: SlotCache, start: int) -> F32:
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

    def _attention(self, index: int, x: F32, cache: SlotCache, start: int) -> F32:
        model, layer, count = self.spec.model, self.spec.first + index, len(x)
        prefix, stop, rope = f"blk.{layer}.", start + count, model.rope_of(layer)
        q, k, v = self._queries_keys_values(prefix, x)
        angles = rope_angles(rope, start, count, self._divisors(rope))
        k = rotate(k, angles, rope).transpose(1, 0, 2)
        keys, values = cache.append(index, k, v.transpose(1, 0, 2), start)
        # Neighbouring query heads share a key/value head: [kv heads, queries of a head, tokens, head dim].
        grouped = (
            rotate(q, angles, rope).transpose(1, 0, 2).reshape(model.kv_heads, -1, count, model.head_dim)
        )
        scores = grouped @ keys[:, None].swapaxes(-1, -2) * np.float32(model.attention_scale)
        scores = capped(scores, model.attention_cap)
        distance = np.arange(start, stop)[:, None] - np.arange(stop)
        window = model.window_of(layer) or stop
        scores[..., (distance < 0) | (distance >= window)] = -np.inf
        if Feature.SINKS in model.features:
            weights = softmax_with_sink(scores, self.vectors[prefix + "attn_sinks.weight"])
        else:
            weights = softmax(scores)
        mixed = weights @ values[:, None]
        joined = mixed.reshape(model.heads, count, model.head_dim).transpose(1, 0, 2).reshape(count, -1)
        return self._linear(prefix + "attn_output", joined)

    def _queries_keys_values(self, prefix: str, x: F32) -> tuple[F32, F32, F32]:
        """Each [tokens, heads, head dim], not rotated yet."""
        model, count = self.spec.model, len(x)
        if Feature.FUSED_QKV in model.features:
            edges = [model.q_width, model.q_width + model.kv_width]
            parts = np.split(self._linear(prefix + "attn_qkv", x), edges, axis=-1)
        else:
            parts = [self._linear(prefix + name, x) for name in ("attn_q", "attn_k", "attn_v")]
        q, k, v = (part.reshape(count, -1, model.head_dim) for part in parts)
        if Feature.QK_NORM in model.features:
            q, k = self._norm(prefix + "attn_q_norm", q), self._norm(prefix + "attn_k_norm", k)
        return q, k, v

    def _divisors(self, rope: Rope) -> F32 | None:
        name = rope.divisors(self.limits.context)
        return None if name is None else self.vectors[name]

    def _feed_forward(self, prefix: str, kind: str, x: F32) -> F32:
        """The dense feed-forward, or that of the shared expert (`_shexp`)."""
        features = self.spec.model.features
        up = self._linear(f"{prefix}ffn_up{kind}", x)
        if Feature.FUSED_GATE_UP in features:
            gated, up = np.split(up, 2, axis=-1)
        else:
            gated = self._linear(f"{prefix}ffn_gate{kind}", x)
        return self._linear(f"{prefix}ffn_down{kind}", activated(features, gated, up))

    def _experts(self, prefix: str, x: F32) -> F32:
        """Each token through the experts that its router picks; only those are decoded."""
        model = self.spec.model
        assert model.experts is not None
        chosen, weights = route(self._linear(prefix + "ffn_gate_inp", x), model.experts)
        out = np.zeros_like(x)
        for expert in np.unique(chosen):
            tokens, place = np.nonzero(chosen == expert)
            own = x[tokens]
            gated, up = (self._of_expert(prefix + name, expert, own) for name in ("ffn_gate", "ffn_up"))
            answer = self._of_expert(prefix + "ffn_down", expert, activated(model.features, gated, up))
            out[tokens] += answer * weights[tokens, place, None]
        if Feature.SHARED_EXPERT in model.features:
            shared = self._feed_forward(prefix, "_shexp", x)
            opened = sigmoid(x @ self.vectors[prefix + "ffn_gate_inp_shexp.weight"])
            out += shared * opened[:, None]
        return out

    def _of_expert(self, name: str, expert: int, x: F32) -> F32:
        matrix = self.matrices[f"{name}_exps.weight"]
        assert self.spec.model.experts is not None
        rows = self.spec.model.tensor_shape(f"{name}_exps.weight")[1]
        y = matrix.part(slice(expert * rows, (expert + 1) * rows)).product(x)
        biases = self.matrices.get(f"{name}_exps.bias")
        return y if biases is None else y + biases.rows(np.array([expert]))

    def _norm(self, name: str, x: F32) -> F32:
        return rms_norm(x, self.vectors[name + ".weight"], self.spec.model.norm_eps)

    def _linear(self, name: str, x: F32) -> F32:
        y = self.matrices[name + ".weight"].product(x)
        bias = self.vectors.get(name + ".bias")
        return y if bias is None else y + bias


class NumpyEngine:
    """See the module."""

    name = "numpy"
    features = ~Feature.NONE
    kv_kinds = KV_KINDS

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
        kv: KVKind = "full",
        progress: Progress | None = None,
    ) -> NumpyStage:
        limits = StageLimits(spec, context, slots)
        tensors = check_tensors(spec, source, DECODABLE)
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
                matrices[name] = packed_matrix(tensor, source, threads)
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
        return NumpyStage(limits, kv, matrices, vectors, threads, total)


def engine() -> Engine:
    return NumpyEngine()

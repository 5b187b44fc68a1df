"""The mlx engine's arithmetic between the matrices: activations, routing, attention, rotation."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from omninfer.arch import Experts, Feature, Rope, RopeKind, Routing
from omninfer.engines.mlx_weights import Array


def activated(features: Feature, gate: Array, up: Array) -> Array:
    """What goes into a feed-forward's last matrix."""
    if Feature.CLAMPED_SWIGLU in features:
        gate = mx.minimum(gate, 7)
        return gate * mx.sigmoid(1.702 * gate) * (mx.clip(up, -7, 7) + 1)
    if Feature.GELU in features:  # the tanh form
        inner = (2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + mx.tanh(inner)) * up
    return gate * mx.sigmoid(gate) * up


def capped(x: Array, cap: float) -> Array:
    """Soft cap: cap * tanh(x / cap); 0 for none."""
    return cap * mx.tanh(x / cap) if cap else x


def route(logits: Array, experts: Experts) -> tuple[Array, Array]:
    """The experts that each token goes through and their weights, both [tokens, used]."""
    chosen = mx.argsort(-logits, axis=-1)[:, : experts.used]
    if experts.routing is Routing.CHOSEN:
        return chosen, mx.softmax(mx.take_along_axis(logits, chosen, axis=-1), axis=-1)
    weights = mx.take_along_axis(mx.softmax(logits, axis=-1), chosen, axis=-1)
    if experts.routing is Routing.NORMALISED:
        # The floor is the least positive half, as llama.cpp has it.
        weights = weights / mx.maximum(weights.sum(axis=-1, keepdims=True), 2.0**-14)
    return chosen, weights


def mask(count: int, stop: int, window: int) -> Any:
    """What positions stop-count … stop-1 see, as attention takes it: None for everything."""
    if not window or stop <= window:
        return "causal" if count > 1 else None
    distance = mx.arange(stop - count, stop)[:, None] - mx.arange(stop)
    return (distance >= 0) & (distance < window)


def capped_attention(q: Array, keys: Array, values: Array, scale: float, cap: float, seen: Any) -> Array:
    """As the fast one, [1, heads, tokens, head dim], with soft-capped scores, which that one lacks."""
    count, stop = q.shape[2], keys.shape[2]
    grouped = q.reshape(1, keys.shape[1], -1, count, q.shape[3])
    scores = capped(scale * (grouped @ keys[:, :, None].swapaxes(-1, -2)).astype(mx.float32), cap)
    if isinstance(seen, str):
        seen = mx.arange(stop - count, stop)[:, None] >= mx.arange(stop)
    if seen is not None:
        scores = mx.where(seen, scores, -mx.inf)
    mixed = mx.softmax(scores, axis=-1).astype(values.dtype) @ values[:, :, None]
    return mixed.reshape(q.shape)


def wavelengths(rope: Rope, divisors: Array | None) -> Array:
    """[dims / 2]: what a position is divided by to give each pair's angle (`freqs` of mx.fast.rope)."""
    frequencies = rope.frequencies(None if divisors is None else np.array(divisors))
    return mx.array((1 / frequencies).astype(np.float32))


def rotate(x: Array, rope: Rope, waves: Array, start: int) -> Array:
    """x is [1, heads, tokens, head dim]."""
    turned = mx.fast.rope(
        x,
        rope.dims,
        traditional=rope.kind is RopeKind.INTERLEAVED,
        base=None,
        scale=1.0,
        offset=start,
        freqs=waves,
    )
    if rope.magnitude == 1:
        return turned
    scaled = rope.magnitude * turned[..., : rope.dims]
    return mx.concatenate([scaled, turned[..., rope.dims :]], axis=-1) if rope.dims < x.shape[-1] else scaled

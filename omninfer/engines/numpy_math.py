"""The numpy engine's arithmetic between the matrices, as the papers write it, in float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from omninfer.arch import Experts, Feature, Rope, RopeKind, Routing
from omninfer.engines.fields import F32


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    scale = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(eps))
    normed: F32 = x / scale * weight
    return normed


def sigmoid(x: F32) -> F32:
    with np.errstate(over="ignore"):  # exp(-x) becomes infinite and the quotient 0, as it should
        opened: F32 = np.reciprocal(1 + np.exp(-x))
    return opened


def silu(x: F32) -> F32:
    return x * sigmoid(x)


def gelu(x: F32) -> F32:
    """The tanh form (arXiv:1606.08415), which Gemma was trained with."""
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)
    gated: F32 = np.float32(0.5) * x * (1 + np.tanh(inner))
    return gated


def activated(features: Feature, gate: F32, up: F32) -> F32:
    """What goes into a feed-forward's last matrix."""
    if Feature.CLAMPED_SWIGLU in features:
        gate = np.minimum(gate, np.float32(7))
        return gate * sigmoid(np.float32(1.702) * gate) * (np.clip(up, -7, 7) + 1)
    return (gelu(gate) if Feature.GELU in features else silu(gate)) * up


def softmax(x: F32) -> F32:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    weights: F32 = e / e.sum(axis=-1, keepdims=True)
    return weights


def softmax_with_sink(scores: F32, sinks: F32) -> F32:
    """Softmax over the scores of each head and its sink, which takes its share and has no value.

    `scores` is [kv heads, queries of a head, tokens, positions], `sinks` [heads].
    """
    sink = np.broadcast_to(sinks.reshape(*scores.shape[:2], 1, 1), (*scores.shape[:3], 1))
    return softmax(np.concatenate((scores, sink), axis=-1))[..., :-1]


def capped(x: F32, cap: float) -> F32:
    """Soft cap: cap * tanh(x / cap); 0 for none."""
    return np.float32(cap) * np.tanh(x / np.float32(cap)) if cap else x


def route(logits: F32, experts: Experts) -> tuple[NDArray[np.intp], F32]:
    """The experts that each token goes through and their weights, both [tokens, used]."""
    chosen = np.argsort(-logits, axis=-1, kind="stable")[:, : experts.used]
    if experts.routing is Routing.CHOSEN:
        return chosen, softmax(np.take_along_axis(logits, chosen, axis=-1))
    weights = np.take_along_axis(softmax(logits), chosen, axis=-1)
    if experts.routing is Routing.NORMALISED:
        # The floor is the least positive half, as llama.cpp has it.
        weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), np.float32(2**-14))
    return chosen, weights


def rope_angles(rope: Rope, start: int, count: int, divisors: F32 | None) -> F32:
    """[tokens, dims / 2], computed in float64: angles grow with the position."""
    frequencies = rope.frequencies(divisors)
    return (np.arange(start, start + count)[:, None] * frequencies).astype(np.float32)


def rotate(x: F32, angles: F32, rope: Rope) -> F32:
    """Turn the pairs of the leading `rope.dims` elements of each head: x is [tokens, heads, head dim]."""
    magnitude = np.float32(rope.magnitude)
    cos, sin = magnitude * np.cos(angles)[:, None, :], magnitude * np.sin(angles)[:, None, :]
    dims = rope.dims
    if rope.kind is RopeKind.INTERLEAVED:
        first, second = slice(0, dims, 2), slice(1, dims, 2)
    else:
        first, second = slice(0, dims // 2), slice(dims // 2, dims)
    a, b = x[..., first], x[..., second]
    out = x.copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out

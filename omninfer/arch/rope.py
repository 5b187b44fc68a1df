"""Rotary position embeddings: how fast each pair of a head's elements turns, and by what it is scaled.

Linear scaling divides positions; YaRN does so for the slow pairs alone (arXiv:2309.00071, in the form of
ggml); Llama 3 and Phi 3 bring a divisor for every pair in a tensor. All engines take their
frequencies from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from omninfer.arch.features import ROPE_FREQS, ROPE_LONG, ROPE_SHORT, Feature
from omninfer.arch.keys import MAX_CONTEXT, MAX_FACTOR, MAX_HEAD_DIM, Keys, shown
from omnistore.errors import MalformedGGUF, UnsupportedModel


class RopeKind(Enum):
    """Which elements of a head rotate together."""

    INTERLEAVED = "interleaved"
    """Elements 2i and 2i+1 (llama-family files, whose Q and K rows are permuted for it)."""
    NEOX = "neox"
    """Elements i and i + dims/2 (qwen, gemma, phi, gpt-oss)."""


@dataclass(frozen=True, slots=True)
class Yarn:
    """Which pairs are scaled: those that turn less than `slow` times in the original context; those that turn
    more than `fast` times are left alone, and in between it goes over linearly by the pair's number."""

    original_context: int
    fast: float = 32.0
    slow: float = 1.0

    def unscaled(self, base: float, dims: int) -> NDArray[np.float64]:
        """[dims / 2], from 0 (scaled) to 1 (left alone)."""

        def pair(turns: float) -> float:
            """The pair that turns so often in the original context."""
            return dims * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = max(0, math.floor(pair(self.fast))), min(dims - 1, math.ceil(pair(self.slow)))
        ramp = (np.arange(dims // 2) - low) / max(0.001, high - low)
        return 1 - np.clip(ramp, 0, 1)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding."""

    kind: RopeKind
    base: float
    dims: int
    """How many leading elements of each head rotate; even."""
    factor: float = 1.0
    """Positions are divided by this; 1 for none."""
    has_freqs: bool = False
    """The file holds `rope_freqs.weight`, which divides the frequencies (Llama 3)."""
    long_after: int = 0
    """The file holds divisors for contexts up to this many tokens and others for longer ones; 0: none."""
    yarn: Yarn | None = None
    magnitude: float = 1.0
    """What rotates is multiplied by this; queries and keys both, so that scores are by its square."""

    def divisors(self, context: int) -> str | None:
        """The tensor [dims / 2] that divides the frequencies where slots hold up to `context` tokens."""
        if self.has_freqs:
            return ROPE_FREQS
        if self.long_after:
            return ROPE_LONG if context > self.long_after else ROPE_SHORT
        return None

    def frequencies(self, divisors: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
        """[dims / 2]: the angle, in radians, by which each pair turns from one position to the next."""
        own = self.base ** (-np.arange(0, self.dims, 2) / self.dims)
        if divisors is not None:
            own = own / divisors
        scaled = own / self.factor
        if self.yarn is None:
            return scaled
        kept = self.yarn.unscaled(self.base, self.dims)
        return scaled * (1 - kept) + own * kept


def read_rope(keys: Keys, kind: RopeKind, features: Feature, *, head_dim: int, context: int) -> Rope:
    """The rotary embedding of a model; `context` is its context length."""
    dims = keys.integer("rope.dimension_count", 2, MAX_HEAD_DIM, default=head_dim)
    if dims > head_dim or dims % 2:
        raise MalformedGGUF(f"{keys.name('rope.dimension_count')} is {dims}, of a head of {head_dim}")
    factor = keys.real("rope.scaling.factor", 0.0, MAX_FACTOR, default=0.0)
    factor = factor or keys.real("rope.scale_linear", 0.0, MAX_FACTOR, default=0.0) or 1.0
    if factor < 1 / MAX_FACTOR:
        raise MalformedGGUF(f"{keys.name('rope.scaling.factor')} is {factor:.6g}")
    keys.refuse_unless("rope.scaling.yarn_log_multiplier", (0.0,))
    keys.refuse_unless("rope.scaling.yarn_ext_factor", (1.0, -1.0))
    keys.refuse_unless("rope.scaling.yarn_attn_factor", (1.0,))
    base = keys.real("rope.freq_base", 1.0, 1e12, default=10000.0)
    magnitude = keys.real("rope.scaling.attn_factor", 1e-3, 1e3, default=1.0)
    original = keys.integer("rope.scaling.original_context_length", 1, MAX_CONTEXT, default=context)
    rope = Rope(kind, base, dims, factor, has_freqs=Feature.ROPE_FREQS in features, magnitude=magnitude)
    if Feature.LONG_ROPE in features:
        rope = replace(rope, long_after=original)
    scaling = keys.get("rope.scaling.type")
    if scaling == "none":
        return replace(rope, factor=1.0)
    if scaling == "yarn":
        return _with_yarn(rope, keys, original)
    if scaling == "longrope" and Feature.LONG_ROPE not in features:
        raise MalformedGGUF(f"{keys.name('rope.scaling.type')} is longrope, but there is no {ROPE_LONG}")
    if scaling not in (None, "linear", "longrope"):
        raise UnsupportedModel(
            f"{keys.name('rope.scaling.type')} = {shown(scaling)} is not supported",
            remedy="supported rope scalings: none, linear, yarn, longrope, and rope_freqs.weight",
        )
    return rope


def _with_yarn(rope: Rope, keys: Keys, original: int) -> Rope:
    if rope.base <= 1:
        raise MalformedGGUF(f"{keys.name('rope.freq_base')} is 1, with which yarn means nothing")
    fast = keys.real("rope.scaling.yarn_beta_fast", 1e-3, MAX_FACTOR, default=32.0)
    slow = keys.real("rope.scaling.yarn_beta_slow", 1e-3, MAX_FACTOR, default=1.0)
    # The softmax gets the temperature of the paper's section 3.4, but never for a context made shorter.
    temperature = 1 + 0.1 * math.log(rope.factor) if rope.factor > 1 else 1.0
    return replace(rope, yarn=Yarn(original, fast, slow), magnitude=rope.magnitude * temperature)

"""The table of architectures: adding one is adding a row, if its block has no new feature.

What each row says was read from llama.cpp's graphs and is held against its logits (`make parity`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from omninfer.arch.experts import Routing
from omninfer.arch.features import Feature as F
from omninfer.arch.rope import RopeKind


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the architecture table."""

    rope: RopeKind
    always: F = F.NONE
    """Features that every model of the family has."""
    sometimes: F = F.NONE
    """Features that a model has if and only if its file holds their tensors; EXPERTS if and only if it counts
    experts, WINDOW if and only if it has a window."""
    routing: Routing = Routing.NORMALISED
    """How a router's logits become weights."""
    window: int = 0
    """The window of a file that names none; 0 where it must."""
    window_period: int = 1
    """Without a pattern in the file, the last of so many layers sees everything, the others their window."""
    local_rope_base: float = 0.0
    """Rotary base of the layers with a window, which then scale nothing; 0: as in all layers."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the square root of the width."""
    attention_cap: float = 0.0
    """Of a file that names none, where the family has `ATTENTION_CAP`."""
    logit_cap: float = 0.0
    """Of a file that names none: logits l become cap * tanh(l / cap); 0 for none."""
    wide_query_layers: int = 0
    """Models of so many layers divide scores by the root of width / heads instead of the head's dimension.
    GGUF has no key for it: llama.cpp knows these models by their layers, too."""


FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family(
        RopeKind.INTERLEAVED,
        sometimes=F.QKV_BIAS | F.OUTPUT_BIAS | F.FFN_BIAS | F.EXPERTS | F.ROPE_FREQS | F.LONG_ROPE,
    ),
    "qwen2": Family(RopeKind.NEOX, always=F.QKV_BIAS),
    "qwen2moe": Family(
        RopeKind.NEOX, always=F.QKV_BIAS | F.EXPERTS | F.SHARED_EXPERT, routing=Routing.SOFTMAX
    ),
    "qwen3": Family(RopeKind.NEOX, always=F.QK_NORM),
    "qwen3moe": Family(RopeKind.NEOX, always=F.QK_NORM | F.EXPERTS),
    "gemma": Family(RopeKind.NEOX, always=F.GELU, scaled_embedding=True),
    "gemma2": Family(
        RopeKind.NEOX,
        always=F.POST_NORMS | F.GELU | F.WINDOW | F.ATTENTION_CAP,
        window=4096,
        window_period=2,
        scaled_embedding=True,
        attention_cap=50.0,
        logit_cap=30.0,
        wide_query_layers=46,
    ),
    "gemma3": Family(
        RopeKind.NEOX,
        always=F.POST_NORMS | F.GELU | F.QK_NORM,
        sometimes=F.WINDOW,
        window_period=6,
        local_rope_base=10000.0,
        scaled_embedding=True,
        wide_query_layers=62,
    ),
    "phi3": Family(RopeKind.NEOX, always=F.FUSED_GATE_UP, sometimes=F.FUSED_QKV | F.LONG_ROPE),
    "gpt-oss": Family(
        RopeKind.NEOX,
        always=F.QKV_BIAS
        | F.OUTPUT_BIAS
        | F.SINKS
        | F.NORM_AFTER_ATTENTION
        | F.WINDOW
        | F.EXPERTS
        | F.EXPERT_BIAS
        | F.CLAMPED_SWIGLU,
        routing=Routing.CHOSEN,
        window_period=2,
    ),
}

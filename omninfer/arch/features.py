"""Features of a transformer block, and the tensors that belong to each.

A feature without tensors of its own is arithmetic alone. An engine declares the features it has
(`omninfer.engines.checks.check_features`), and a model that needs another is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Flag, auto
from typing import Final

EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"
HEAD_NORM: Final = "output_norm.weight"
ROPE_FREQS: Final = "rope_freqs.weight"
ROPE_LONG: Final = "rope_factors_long.weight"
ROPE_SHORT: Final = "rope_factors_short.weight"

FFN_NORM: Final = "ffn_norm.weight"
POST_ATTENTION_NORM: Final = "post_attention_norm.weight"
POST_FFN_NORM: Final = "post_ffw_norm.weight"


class Feature(Flag):
    """What a transformer block may have beyond RMS norm, rotary grouped-query attention and SwiGLU."""

    NONE = 0
    QKV_BIAS = auto()
    OUTPUT_BIAS = auto()
    QK_NORM = auto()
    """RMS norm of each head's queries and keys before they rotate."""
    FUSED_QKV = auto()
    """One matrix whose rows are queries, then keys, then values."""
    FUSED_GATE_UP = auto()
    """`ffn_up` has the gate's rows before its own."""
    FFN_BIAS = auto()
    POST_NORMS = auto()
    """RMS norm of what attention and feed-forward answer, before it is added."""
    NORM_AFTER_ATTENTION = auto()
    """The norm before the feed-forward is called `post_attention_norm`; nothing else differs."""
    SINKS = auto()
    """A logit per head that takes part in the softmax of the scores and has no value."""
    WINDOW = auto()
    """Some layers see the last `ModelSpec.window` positions only."""
    ATTENTION_CAP = auto()
    """Scores s become cap * tanh(s / cap)."""
    GELU = auto()
    """The gate's activation is GELU (tanh form) instead of SiLU."""
    CLAMPED_SWIGLU = auto()
    """gate = min(g, 7); (clip(u, -7, 7) + 1) * gate * sigmoid(1.702 * gate): gpt-oss."""
    EXPERTS = auto()
    """A router picks the few of many feed-forwards that a token goes through."""
    EXPERT_BIAS = auto()
    """Biases of the router and of every expert."""
    SHARED_EXPERT = auto()
    """One more feed-forward for every token, under a sigmoid gate of its own."""
    ROPE_FREQS = auto()
    """`rope_freqs.weight` divides the rotary frequencies (Llama 3)."""
    LONG_ROPE = auto()
    """`rope_factors_*.weight` divide them, one set for short contexts and one for long (Phi 3)."""


_COMMON: Final = (
    "attn_norm.weight",
    "attn_q.weight",
    "attn_k.weight",
    "attn_v.weight",
    "attn_output.weight",
    FFN_NORM,
    "ffn_gate.weight",
    "ffn_up.weight",
    "ffn_down.weight",
)

# The tensors of a feature, as suffixes behind "blk.N.".
FEATURE_TENSORS: Final[Mapping[Feature, tuple[str, ...]]] = {
    Feature.QKV_BIAS: ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    Feature.OUTPUT_BIAS: ("attn_output.bias",),
    Feature.QK_NORM: ("attn_q_norm.weight", "attn_k_norm.weight"),
    Feature.FUSED_QKV: ("attn_qkv.weight",),
    Feature.FFN_BIAS: ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"),
    Feature.POST_NORMS: (POST_ATTENTION_NORM, POST_FFN_NORM),
    Feature.NORM_AFTER_ATTENTION: (POST_ATTENTION_NORM,),
    Feature.SINKS: ("attn_sinks.weight",),
    Feature.EXPERTS: (
        "ffn_gate_inp.weight",
        "ffn_gate_exps.weight",
        "ffn_up_exps.weight",
        "ffn_down_exps.weight",
    ),
    Feature.EXPERT_BIAS: (
        "ffn_gate_inp.bias",
        "ffn_gate_exps.bias",
        "ffn_up_exps.bias",
        "ffn_down_exps.bias",
    ),
    Feature.SHARED_EXPERT: (
        "ffn_gate_inp_shexp.weight",
        "ffn_gate_shexp.weight",
        "ffn_up_shexp.weight",
        "ffn_down_shexp.weight",
    ),
}

# What a feature's tensors take the place of.
_REPLACED: Final[Mapping[Feature, tuple[str, ...]]] = {
    Feature.FUSED_QKV: ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    Feature.FUSED_GATE_UP: ("ffn_gate.weight",),
    Feature.NORM_AFTER_ATTENTION: (FFN_NORM,),
    Feature.EXPERTS: ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"),
}

# Tensors of the whole model, held by every stage that has layers.
MODEL_TENSORS: Final[Mapping[Feature, tuple[str, ...]]] = {
    Feature.ROPE_FREQS: (ROPE_FREQS,),
    Feature.LONG_ROPE: (ROPE_LONG, ROPE_SHORT),
}


def layer_suffixes(features: Feature) -> tuple[str, ...]:
    """The tensors of a layer with these features, without their `blk.N.`."""
    replaced = {s for feature, names in _REPLACED.items() if feature in features for s in names}
    extra = [s for feature, names in FEATURE_TENSORS.items() if feature in features for s in names]
    return (*(s for s in _COMMON if s not in replaced), *extra)


def model_tensors(features: Feature) -> tuple[str, ...]:
    """The tensors outside the layers that the layers of a model with these features read."""
    return tuple(s for feature, names in MODEL_TENSORS.items() if feature in features for s in names)

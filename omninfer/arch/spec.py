"""`ModelSpec`: the shape and features of one model, and how they are read from a file's metadata."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Final

from omninfer.arch.experts import Experts, read_experts
from omninfer.arch.families import FAMILIES, Family
from omninfer.arch.features import (
    EMBEDDING,
    FEATURE_TENSORS,
    FFN_NORM,
    HEAD,
    HEAD_NORM,
    MODEL_TENSORS,
    POST_ATTENTION_NORM,
    POST_FFN_NORM,
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    Feature,
    layer_suffixes,
    model_tensors,
)
from omninfer.arch.keys import (
    MAX_CONTEXT,
    MAX_FACTOR,
    MAX_FFN_WIDTH,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    Keys,
)
from omninfer.arch.rope import Rope, read_rope
from omnistore.errors import MalformedGGUF, UnsupportedModel

# Keys that some exporters write and that change the arithmetic, with the values that mean "no change".
# Anything else is a model we would run wrongly.
_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.scale": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "use_parallel_residual": (False,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
}

_LAYER_NAME: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape and features of one model: all that an engine or a planner needs beside the weights."""

    architecture: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    """Of the dense feed-forward; where there are only experts, what the file says, or 0."""
    vocab: int
    context_length: int
    norm_eps: float
    rope: Rope
    """Of the layers that see everything."""
    local_rope: Rope
    """Of the layers with a window."""
    features: Feature
    tied_head: bool
    """No `output.weight`: the embedding is used as the head too."""
    window: int
    """A layer with a window sees this many positions, its own included; 0 if no layer has one."""
    windowed: tuple[bool, ...]
    """Which layers have one."""
    experts: Experts | None
    attention_scale: float
    """What scores are multiplied by."""
    attention_cap: float
    """Then scores s become cap * tanh(s / cap); 0 for no cap."""
    logit_cap: float
    """The same of logits."""
    embedding_scale: float
    """What embeddings are multiplied by on their way into the first layer."""

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys (or values) in one layer."""
        return self.kv_heads * self.head_dim

    @property
    def head_tensor(self) -> str:
        return EMBEDDING if self.tied_head else HEAD

    @property
    def ffn_norm(self) -> str:
        """The norm before the feed-forward, without its `blk.N.`."""
        return POST_ATTENTION_NORM if Feature.NORM_AFTER_ATTENTION in self.features else FFN_NORM

    def window_of(self, layer: int) -> int:
        """How many positions a layer sees, its own included; 0 for all."""
        return self.window if self.windowed[layer] else 0

    def rope_of(self, layer: int) -> Rope:
        return self.local_rope if self.windowed[layer] else self.rope

    def layer_suffixes(self) -> tuple[str, ...]:
        """The tensors of every layer, without their `blk.N.`."""
        return layer_suffixes(self.features)

    def model_tensors(self) -> tuple[str, ...]:
        """The tensors outside the layers that every stage with layers reads."""
        return model_tensors(self.features)

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """The shape (ne[0], the input dimension, first) that tensor `name` must have in this model."""
        match = _LAYER_NAME.fullmatch(name)
        suffix = match[2] if match else name
        return (self._attention_shapes() | self._ffn_shapes() | self._expert_shapes())[suffix]

    def active_share(self) -> float:
        """How much of a layer's weights one token goes through, as if all were of one type."""
        sizes = {suffix: prod(self.tensor_shape(f"blk.0.{suffix}")) for suffix in self.layer_suffixes()}
        idle = 0.0
        if self.experts is not None:
            unused = 1 - self.experts.used / self.experts.count
            idle = unused * sum(size for suffix, size in sizes.items() if "_exps." in suffix)
        return 1 - idle / sum(sizes.values())

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        width, q, kv = self.width, self.q_width, self.kv_width
        return {
            EMBEDDING: (width, self.vocab),
            HEAD: (width, self.vocab),
            HEAD_NORM: (width,),
            ROPE_FREQS: (self.rope.dims // 2,),
            ROPE_LONG: (self.rope.dims // 2,),
            ROPE_SHORT: (self.rope.dims // 2,),
            "attn_norm.weight": (width,),
            "attn_q.weight": (width, q),
            "attn_k.weight": (width, kv),
            "attn_v.weight": (width, kv),
            "attn_qkv.weight": (width, q + 2 * kv),
            "attn_output.weight": (q, width),
            "attn_q.bias": (q,),
            "attn_k.bias": (kv,),
            "attn_v.bias": (kv,),
            "attn_output.bias": (width,),
            "attn_q_norm.weight": (self.head_dim,),
            "attn_k_norm.weight": (self.head_dim,),
            "attn_sinks.weight": (self.heads,),
            POST_ATTENTION_NORM: (width,),
        }

    def _ffn_shapes(self) -> dict[str, tuple[int, ...]]:
        width, inner = self.width, self.ffn_width
        return {
            FFN_NORM: (width,),
            POST_FFN_NORM: (width,),
            "ffn_gate.weight": (width, inner),
            "ffn_up.weight": (width, inner * (2 if Feature.FUSED_GATE_UP in self.features else 1)),
            "ffn_down.weight": (inner, width),
            "ffn_gate.bias": (inner,),
            "ffn_up.bias": (inner,),
            "ffn_down.bias": (width,),
        }

    def _expert_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.experts is None:
            return {}
        width, count, inner, shared = (
            self.width,
            self.experts.count,
            self.experts.width,
            self.experts.shared_width,
        )
        return {
            "ffn_gate_inp.weight": (width, count),
            "ffn_gate_exps.weight": (width, inner, count),
            "ffn_up_exps.weight": (width, inner, count),
            "ffn_down_exps.weight": (inner, width, count),
            "ffn_gate_inp.bias": (count,),
            "ffn_gate_exps.bias": (inner, count),
            "ffn_up_exps.bias": (inner, count),
            "ffn_down_exps.bias": (width, count),
            "ffn_gate_inp_shexp.weight": (width,),
            "ffn_gate_shexp.weight": (width, shared),
            "ffn_up_shexp.weight": (width, shared),
            "ffn_down_shexp.weight": (shared, width),
        }

    @classmethod
    def from_metadata_untrusted(
        cls, metadata: Mapping[str, object], tensor_names: Collection[str]
    ) -> ModelSpec:
        """Read a model's spec from its GGUF metadata and the names of all its tensors.

        Raises `MalformedGGUF` for values that make no sense and `UnsupportedModel` for a model that
        makes sense but that no engine here can run.
        """
        names = frozenset(tensor_names)
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise MalformedGGUF("the metadata have no general.architecture")
        family = FAMILIES.get(architecture)
        if family is None:
            raise UnsupportedModel(
                f"architecture {architecture[:64]!r} is not supported",
                remedy=f"supported architectures: {', '.join(FAMILIES)}",
            )
        keys = Keys(metadata, architecture)
        spec = _read(keys, family, names)
        _check_heads(spec, keys)
        _check_names(spec, names)
        return spec


def _read(keys: Keys, family: Family, names: frozenset[str]) -> ModelSpec:
    for key, neutral in _NEUTRAL.items():
        keys.refuse_unless(key, neutral)
    features = _features(keys, family, names)
    layers = keys.integer("block_count", 1, MAX_LAYERS)
    width = keys.integer("embedding_length", 1, MAX_WIDTH)
    heads = keys.integer("attention.head_count", 1, MAX_HEADS)
    head_dim = keys.integer("attention.key_length", 2, MAX_HEAD_DIM, default=width // heads)
    context = keys.integer("context_length", 1, MAX_CONTEXT)
    has_experts, shared = Feature.EXPERTS in features, Feature.SHARED_EXPERT in features
    # A file of experts alone need not say how wide a feed-forward it has not would be.
    least = {"low": 0, "default": 0} if has_experts else {"low": 1}
    ffn_width = keys.integer("feed_forward_length", high=MAX_FFN_WIDTH, **least)
    rope = read_rope(keys, family.rope, features, head_dim=head_dim, context=context)
    window, windowed = _windows(keys, family, features, layers)
    return ModelSpec(
        architecture=keys.architecture,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=keys.integer("attention.head_count_kv", 1, heads, default=heads),
        head_dim=head_dim,
        ffn_width=ffn_width,
        vocab=_vocab(keys),
        context_length=context,
        norm_eps=keys.real("attention.layer_norm_rms_epsilon", 1e-12, 0.1),
        rope=rope,
        local_rope=_local_rope(keys, family, rope) if window else rope,
        features=features,
        tied_head=HEAD not in names,
        window=window,
        windowed=windowed,
        experts=read_experts(keys, family.routing, ffn_width=ffn_width, shared=shared)
        if has_experts
        else None,
        attention_scale=(width // heads if layers == family.wide_query_layers else head_dim) ** -0.5,
        attention_cap=_cap(
            keys, "attn_logit_softcapping", Feature.ATTENTION_CAP in features, family.attention_cap
        ),
        logit_cap=_cap(keys, "final_logit_softcapping", family.scaled_embedding, family.logit_cap),
        embedding_scale=width**0.5 if family.scaled_embedding else 1.0,
    )


def _features(keys: Keys, family: Family, names: frozenset[str]) -> Feature:
    features = family.always
    for feature, suffixes in FEATURE_TENSORS.items():
        if feature in family.sometimes and any(f"blk.0.{s}" in names for s in suffixes):
            features |= feature
    for feature, tensors in MODEL_TENSORS.items():
        if feature in family.sometimes and any(name in names for name in tensors):
            features |= feature
    if Feature.EXPERTS in family.sometimes and keys.get("expert_count") not in (None, 0):
        features |= Feature.EXPERTS
    if Feature.EXPERTS not in features:
        keys.refuse_unless("expert_count", (0,))
    if Feature.WINDOW in family.sometimes and keys.get("attention.sliding_window") not in (None, 0):
        features |= Feature.WINDOW
    return features


def _windows(keys: Keys, family: Family, features: Feature, layers: int) -> tuple[int, tuple[bool, ...]]:
    """The window, and which layers have it.

    Other families' `attention.sliding_window` is left alone, as llama.cpp leaves it: of phi3 it is known
    to be written wrongly.
    """
    if Feature.WINDOW not in features:
        return 0, (False,) * layers
    window = keys.integer("attention.sliding_window", 1, MAX_CONTEXT, default=family.window or None)
    pattern = keys.flags("attention.sliding_window_pattern", layers)
    if pattern is None:
        period = keys.integer("attention.sliding_window_pattern", 0, MAX_LAYERS, default=family.window_period)
        pattern = tuple(period == 0 or n % period < period - 1 for n in range(layers))
    return window, pattern


def _local_rope(keys: Keys, family: Family, rope: Rope) -> Rope:
    base = keys.real("rope.freq_base_swa", 1.0, 1e12, default=family.local_rope_base or rope.base)
    keys.refuse_unless("rope.dimension_count_swa", (rope.dims,))
    if not family.local_rope_base:
        return replace(rope, base=base)
    # Gemma 3 stretches the layers that see everything, and only those.
    return replace(rope, base=base, factor=1.0, yarn=None, magnitude=1.0)


def _cap(keys: Keys, key: str, known: bool, default: float) -> float:
    if known:
        return keys.real(key, 0.0, MAX_FACTOR, default=default)
    keys.refuse_unless(key, (0.0,))
    return 0.0


def _vocab(keys: Keys) -> int:
    """The token list decides, as it does elsewhere; `vocab_size` serves files without a tokenizer."""
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Sequence) and not isinstance(tokens, str) and len(tokens):
        if len(tokens) > MAX_VOCAB:
            raise MalformedGGUF(f"tokenizer.ggml.tokens has {len(tokens)} entries, more than {MAX_VOCAB}")
        return len(tokens)
    return keys.integer("vocab_size", 1, MAX_VOCAB)


def _check_heads(spec: ModelSpec, keys: Keys) -> None:
    if spec.heads % spec.kv_heads:
        raise MalformedGGUF(f"{spec.heads} heads can not share {spec.kv_heads} key/value heads")
    for key in ("attention.value_length", "attention.value_length_swa", "attention.key_length_swa"):
        length = keys.integer(key, 1, MAX_HEAD_DIM, default=spec.head_dim)
        if length != spec.head_dim:
            raise UnsupportedModel(f"{keys.name(key)} {length} is not the key length {spec.head_dim}")


def _check_names(spec: ModelSpec, names: frozenset[str]) -> None:
    """Every tensor the block needs is there, and no tensor that it would have to ignore."""
    suffixes = frozenset(spec.layer_suffixes())
    expected = {f"blk.{n}.{s}" for n in range(spec.layers) for s in suffixes}
    expected |= {EMBEDDING, HEAD_NORM, *spec.model_tensors()}
    missing = expected - names
    if missing:
        raise MalformedGGUF(f"{len(missing)} tensors are missing, first {min(missing)}")
    unknown = names - expected - {HEAD}
    if unknown:
        raise UnsupportedModel(
            f"tensor {min(unknown)[:80]!r} is not part of a supported {spec.architecture} model"
            + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
        )

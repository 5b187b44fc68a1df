"""What a model is, read from GGUF metadata and tensor names alone: `ModelSpec`.

One generic transformer block with features; a table says which features an architecture has, so
that adding an architecture is adding a row to `FAMILIES`. The metadata come from a stranger's file:
every number is bounded here, before anything is allocated from it, and every tensor of every layer
must be one the block knows how to use: a tensor we do not understand changes what the model computes,
so it is refused by name instead of being ignored.

Deliberately not here: tokenizers, reading files, and anything that computes. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import Final

from omnistore.errors import MalformedGGUF, UnsupportedModel

EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"
HEAD_NORM: Final = "output_norm.weight"
ROPE_FREQS: Final = "rope_freqs.weight"

# Inclusive bounds. They are an order of magnitude above any published model: wide enough never to
# refuse a real one, tight enough that no product of two of them overflows or exhausts a machine by itself.
MAX_LAYERS: Final = 1024
MAX_WIDTH: Final = 1 << 17
MAX_HEADS: Final = 1024
MAX_HEAD_DIM: Final = 1024
MAX_FFN_WIDTH: Final = 1 << 20
MAX_VOCAB: Final = 1 << 22
MAX_CONTEXT: Final = 1 << 25


class RopeKind(Enum):
    """Which elements of a head rotate together."""

    INTERLEAVED = "interleaved"
    """Elements 2i and 2i+1 (llama-family files, whose Q and K rows are permuted for it)."""
    NEOX = "neox"
    """Elements i and i + dims/2 (qwen, gemma, phi, gpt-oss)."""


class Feature(Flag):
    """What a transformer block may have beyond RMS norm, rotary grouped-query attention and SwiGLU."""

    NONE = 0
    QKV_BIAS = auto()
    OUTPUT_BIAS = auto()
    QK_NORM = auto()


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the architecture table."""

    rope: RopeKind
    always: Feature = Feature.NONE
    """Features that every model of the family has."""
    sometimes: Feature = Feature.NONE
    """Features that a model has if and only if its file holds their tensors."""


FAMILIES: Final[Mapping[str, Family]] = {
    "llama": Family(RopeKind.INTERLEAVED, sometimes=Feature.QKV_BIAS | Feature.OUTPUT_BIAS),
    "qwen2": Family(RopeKind.NEOX, always=Feature.QKV_BIAS),
    "qwen3": Family(RopeKind.NEOX, always=Feature.QK_NORM),
}

# The tensors of a feature, as suffixes behind "blk.N.".
_FEATURE_TENSORS: Final[Mapping[Feature, tuple[str, ...]]] = {
    Feature.QKV_BIAS: ("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    Feature.OUTPUT_BIAS: ("attn_output.bias",),
    Feature.QK_NORM: ("attn_q_norm.weight", "attn_k_norm.weight"),
}

_COMMON_TENSORS: Final = (
    "attn_norm.weight",
    "attn_q.weight",
    "attn_k.weight",
    "attn_v.weight",
    "attn_output.weight",
    "ffn_norm.weight",
    "ffn_gate.weight",
    "ffn_up.weight",
    "ffn_down.weight",
)

# Keys that some exporters write under these architectures and that change the arithmetic, with the
# value that means "no change". Anything else is a model we would run wrongly.
_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.scale": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "use_parallel_residual": (False,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "expert_count": (0,),
}

_LAYER_NAME: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding."""

    kind: RopeKind
    base: float
    dims: int
    """How many leading elements of each head rotate; even."""
    factor: float
    """Positions are divided by this (linear scaling); 1 for none."""
    has_freqs: bool
    """The file holds `rope_freqs.weight`, which divides the frequencies (Llama 3)."""


def layer_suffixes(features: Feature) -> tuple[str, ...]:
    """The tensors of a layer with these features, without their `blk.N.`."""
    extra = [s for feature, names in _FEATURE_TENSORS.items() if feature in features for s in names]
    return (*_COMMON_TENSORS, *extra)


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
    vocab: int
    context_length: int
    norm_eps: float
    rope: Rope
    features: Feature
    tied_head: bool
    """No `output.weight`: the embedding is used as the head too."""

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

    def layer_suffixes(self) -> tuple[str, ...]:
        """The tensors of every layer, without their `blk.N.`."""
        return layer_suffixes(self.features)

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """The shape (ne[0], the input dimension, first) that tensor `name` must have in this model."""
        shapes: dict[str, tuple[int, ...]] = {
            EMBEDDING: (self.width, self.vocab),
            HEAD: (self.width, self.vocab),
            HEAD_NORM: (self.width,),
            ROPE_FREQS: (self.rope.dims // 2,),
            "attn_norm.weight": (self.width,),
            "attn_q.weight": (self.width, self.q_width),
            "attn_k.weight": (self.width, self.kv_width),
            "attn_v.weight": (self.width, self.kv_width),
            "attn_output.weight": (self.q_width, self.width),
            "attn_q.bias": (self.q_width,),
            "attn_k.bias": (self.kv_width,),
            "attn_v.bias": (self.kv_width,),
            "attn_output.bias": (self.width,),
            "attn_q_norm.weight": (self.head_dim,),
            "attn_k_norm.weight": (self.head_dim,),
            "ffn_norm.weight": (self.width,),
            "ffn_gate.weight": (self.width, self.ffn_width),
            "ffn_up.weight": (self.width, self.ffn_width),
            "ffn_down.weight": (self.ffn_width, self.width),
        }
        match = _LAYER_NAME.fullmatch(name)
        return shapes[match[2] if match else name]

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
        keys = _Keys(metadata, architecture)
        _refuse_unknown_arithmetic(keys)
        width = keys.integer("embedding_length", 1, MAX_WIDTH)
        heads = keys.integer("attention.head_count", 1, MAX_HEADS)
        head_dim = keys.integer("attention.key_length", 2, MAX_HEAD_DIM, default=width // heads)
        spec = cls(
            architecture=architecture,
            layers=keys.integer("block_count", 1, MAX_LAYERS),
            width=width,
            heads=heads,
            kv_heads=keys.integer("attention.head_count_kv", 1, heads, default=heads),
            head_dim=head_dim,
            ffn_width=keys.integer("feed_forward_length", 1, MAX_FFN_WIDTH),
            vocab=_vocab(keys),
            context_length=keys.integer("context_length", 1, MAX_CONTEXT),
            norm_eps=keys.real("attention.layer_norm_rms_epsilon", 1e-12, 0.1),
            rope=_rope(keys, family, head_dim, has_freqs=ROPE_FREQS in names),
            features=_features(family, names),
            tied_head=HEAD not in names,
        )
        _check_heads(spec, keys)
        _check_names(spec, names)
        return spec


@dataclass(frozen=True, slots=True)
class _Keys:
    """Typed, bounded look-ups among the keys of one architecture."""

    metadata: Mapping[str, object]
    architecture: str

    def name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def get(self, key: str) -> object:
        return self.metadata.get(self.name(key))

    def integer(self, key: str, low: int, high: int, *, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            value = default
        if value is None:
            raise MalformedGGUF(f"the metadata have no {self.name(key)}")
        if isinstance(value, Sequence) and not isinstance(value, str):
            raise UnsupportedModel(f"{self.name(key)} differs from layer to layer, which is not supported")
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise MalformedGGUF(f"{self.name(key)} is {_shown(value)}, not an integer from {low} to {high}")
        return value

    def real(self, key: str, low: float, high: float, *, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            value = default
        if value is None:
            raise MalformedGGUF(f"the metadata have no {self.name(key)}")
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise MalformedGGUF(f"{self.name(key)} is {_shown(value)}, not a number from {low} to {high}")
        return float(value)


def _shown(value: object) -> str:
    """A stranger's value, short enough for a message."""
    if isinstance(value, int | float):
        return f"{value:.6g}" if isinstance(value, float) or abs(value) < 1 << 64 else "a huge integer"
    return f"{value[:40]!r}" if isinstance(value, str) else f"a {type(value).__name__}"


def _refuse_unknown_arithmetic(keys: _Keys) -> None:
    for key, neutral in _NEUTRAL.items():
        value = keys.get(key)
        if value is not None and value not in neutral:
            raise UnsupportedModel(f"{keys.name(key)} = {_shown(value)} is not supported")


def _vocab(keys: _Keys) -> int:
    """The token list decides, as it does elsewhere; `vocab_size` serves files without a tokenizer."""
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Sequence) and not isinstance(tokens, str) and len(tokens):
        if len(tokens) > MAX_VOCAB:
            raise MalformedGGUF(f"tokenizer.ggml.tokens has {len(tokens)} entries, more than {MAX_VOCAB}")
        return len(tokens)
    return keys.integer("vocab_size", 1, MAX_VOCAB)


def _rope(keys: _Keys, family: Family, head_dim: int, *, has_freqs: bool) -> Rope:
    dims = keys.integer("rope.dimension_count", 2, MAX_HEAD_DIM, default=head_dim)
    if dims > head_dim or dims % 2:
        raise MalformedGGUF(f"{keys.name('rope.dimension_count')} is {dims}, of a head of {head_dim}")
    factor = keys.real("rope.scaling.factor", 0.0, 1e6, default=0.0)
    factor = factor or keys.real("rope.scale_linear", 0.0, 1e6, default=0.0) or 1.0
    if factor < 1e-6:
        raise MalformedGGUF(f"{keys.name('rope.scaling.factor')} is {factor:.6g}")
    scaling = keys.get("rope.scaling.type")
    if scaling == "none":
        factor = 1.0
    elif scaling not in (None, "linear"):
        raise UnsupportedModel(
            f"{keys.name('rope.scaling.type')} = {_shown(scaling)} is not supported",
            remedy="supported rope scalings: none, linear, and rope_freqs.weight",
        )
    base = keys.real("rope.freq_base", 1.0, 1e12, default=10000.0)
    return Rope(family.rope, base, dims, factor, has_freqs)


def _features(family: Family, names: frozenset[str]) -> Feature:
    features = family.always
    for feature, suffixes in _FEATURE_TENSORS.items():
        if feature in family.sometimes and any(f"blk.0.{s}" in names for s in suffixes):
            features |= feature
    return features


def _check_heads(spec: ModelSpec, keys: _Keys) -> None:
    if spec.heads % spec.kv_heads:
        raise MalformedGGUF(f"{spec.heads} heads can not share {spec.kv_heads} key/value heads")
    value_length = keys.integer("attention.value_length", 1, MAX_HEAD_DIM, default=spec.head_dim)
    if value_length != spec.head_dim:
        raise UnsupportedModel(
            f"{keys.name('attention.value_length')} {value_length} is not the key length {spec.head_dim}"
        )


def _check_names(spec: ModelSpec, names: frozenset[str]) -> None:
    """Every tensor the block needs is there, and no tensor that it would have to ignore."""
    suffixes = frozenset(spec.layer_suffixes())
    expected = {f"blk.{n}.{s}" for n in range(spec.layers) for s in suffixes}
    expected |= {EMBEDDING, HEAD_NORM}
    missing = expected - names
    if missing:
        raise MalformedGGUF(f"{len(missing)} tensors are missing, first {min(missing)}")
    unknown = names - expected - {HEAD, ROPE_FREQS}
    if unknown:
        raise UnsupportedModel(
            f"tensor {min(unknown)[:80]!r} is not part of a supported {spec.architecture} model"
            + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
        )

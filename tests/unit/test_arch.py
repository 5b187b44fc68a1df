"""ModelSpec: what is read from metadata, and every way in which a stranger's metadata can be wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omninfer.arch import (
    EMBEDDING,
    FAMILIES,
    HEAD,
    HEAD_NORM,
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    Feature,
    ModelSpec,
    RopeKind,
    layer_suffixes,
)
from omninfer.arch.features import model_tensors
from omnistore.errors import MalformedGGUF, UnsupportedModel


def metadata(architecture: str = "llama", **changes: Any) -> dict[str, object]:
    """A good model's metadata; `changes` replace keys (`__` for `.`), None removes one."""
    values: dict[str, object] = {
        "block_count": 2,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": 100,
    }
    values.update({key.replace("__", "."): value for key, value in changes.items()})
    kept = {f"{architecture}.{key}": value for key, value in values.items() if value is not None}
    return {"general.architecture": architecture, **kept}


def names(features: Feature = Feature.NONE, layers: int = 2, *extra: str) -> set[str]:
    blocks = {f"blk.{n}.{suffix}" for n in range(layers) for suffix in layer_suffixes(features)}
    return {EMBEDDING, HEAD, HEAD_NORM, *blocks, *extra}


read = ModelSpec.from_metadata_untrusted


def test_a_llama() -> None:
    spec = read(metadata(rope__freq_base=5e5, rope__dimension_count=6), names())
    assert (spec.architecture, spec.layers, spec.width, spec.heads, spec.kv_heads) == ("llama", 2, 64, 8, 4)
    assert (spec.head_dim, spec.q_width, spec.kv_width, spec.ffn_width) == (8, 64, 32, 128)
    assert (spec.vocab, spec.context_length, spec.norm_eps) == (100, 512, 1e-5)
    assert (spec.rope.kind, spec.rope.base, spec.rope.dims) == (RopeKind.INTERLEAVED, 5e5, 6)
    assert (spec.rope.factor, spec.rope.has_freqs, spec.tied_head) == (1.0, False, False)
    assert spec.features == Feature.NONE


@pytest.mark.parametrize(
    ("architecture", "kind", "features"),
    [
        ("llama", RopeKind.INTERLEAVED, Feature.NONE),
        ("qwen2", RopeKind.NEOX, Feature.QKV_BIAS),
        ("qwen3", RopeKind.NEOX, Feature.QK_NORM),
    ],
)
def test_the_table(architecture: str, kind: RopeKind, features: Feature) -> None:
    spec = read(metadata(architecture), names(features))
    assert spec.rope.kind is kind and spec.features == features


def test_features_that_a_file_may_have() -> None:
    features = Feature.QKV_BIAS | Feature.OUTPUT_BIAS
    assert read(metadata(), names(features)).features == features
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.attn_output\.bias"):
        read(metadata("qwen3"), names(Feature.QK_NORM | Feature.OUTPUT_BIAS))


def test_a_tied_head_and_rope_frequencies() -> None:
    spec = read(metadata(), names(Feature.NONE, 2, ROPE_FREQS) - {HEAD})
    assert spec.tied_head and spec.head_tensor == EMBEDDING and spec.rope.has_freqs


def test_defaults() -> None:
    spec = read(metadata(attention__head_count_kv=None), names())
    assert (spec.kv_heads, spec.rope.base, spec.rope.dims) == (8, 10000.0, 8)


def test_heads_wider_than_the_width_over_their_number() -> None:
    spec = read(
        metadata("qwen3", attention__key_length=32, attention__value_length=32), names(Feature.QK_NORM)
    )
    assert (spec.head_dim, spec.q_width, spec.rope.dims) == (32, 256, 32)
    assert spec.tensor_shape("blk.1.attn_output.weight") == (256, 64)


def test_the_token_list_decides_the_vocabulary() -> None:
    values = metadata(vocab_size=None) | {"tokenizer.ggml.tokens": ["a", "b", "c"]}
    assert read(values, names()).vocab == 3


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 4.0}, {"factor": 4.0}])
def test_linear_rope_scaling(scaling: dict[str, Any]) -> None:
    spec = read(metadata(**{f"rope__scaling__{key}": value for key, value in scaling.items()}), names())
    assert spec.rope.factor == 4.0


def test_no_rope_scaling() -> None:
    spec = read(metadata(rope__scaling__type="none", rope__scaling__factor=4.0), names())
    assert spec.rope.factor == 1.0
    assert read(metadata(rope__scale_linear=2.0), names()).rope.factor == 2.0


def test_an_unknown_architecture_says_what_is_supported() -> None:
    with pytest.raises(UnsupportedModel) as raised:
        read(metadata("mamba"), names())
    assert all(family in (raised.value.remedy or "") for family in FAMILIES)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope__scaling__type": 3},
        {"rope__scaling__yarn_log_multiplier": 0.1},
        {"attention__head_count_kv": (4, 2)},
        {"attention__value_length": 16},
        {"attention__causal": False},
        {"final_logit_softcapping": 30.0},
        {"logit_scale": 0.5},
    ],
)
def test_what_no_engine_can_run(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel):
        read(metadata(**changes), names())


@pytest.mark.parametrize(
    "changes",
    [
        {"block_count": 0},
        {"block_count": 1 << 40},
        {"block_count": "2"},
        {"block_count": True},
        {"block_count": 2.0},
        {"block_count": None},
        {"context_length": -1},
        {"embedding_length": 0},
        {"embedding_length": 1 << 60},
        {"embedding_length": 7},
        {"feed_forward_length": 0},
        {"vocab_size": 0},
        {"vocab_size": None},
        {"attention__head_count": 0},
        {"attention__head_count_kv": 0},
        {"attention__head_count_kv": 3},
        {"attention__head_count_kv": 16},
        {"attention__key_length": 1 << 20},
        {"attention__layer_norm_rms_epsilon": float("nan")},
        {"attention__layer_norm_rms_epsilon": -1.0},
        {"attention__layer_norm_rms_epsilon": None},
        {"rope__dimension_count": 7},
        {"rope__dimension_count": 10},
        {"rope__freq_base": 0.0},
        {"rope__freq_base": float("inf")},
        {"rope__scaling__factor": float("nan")},
        {"rope__scaling__factor": -2.0},
        {"rope__scaling__factor": 1e-9},
    ],
)
def test_nonsense(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedGGUF):
        read(metadata(**changes), names())


@pytest.mark.parametrize("architecture", [None, 7, ["llama"]])
def test_no_architecture(architecture: object) -> None:
    with pytest.raises(MalformedGGUF):
        read(metadata() | {"general.architecture": architecture}, names())


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(MalformedGGUF, match=r"blk\.1\.ffn_up\.weight"):
        read(metadata(), names() - {"blk.1.ffn_up.weight"})


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_sinks.weight", "blk.2.attn_q.weight", "blk.00.attn_q.weight", "output.bias", "x" * 999],
)
def test_a_tensor_that_would_have_to_be_ignored_is_named(name: str) -> None:
    with pytest.raises(UnsupportedModel) as raised:
        read(metadata(), names(Feature.NONE, 2, name))
    assert name[:70] in raised.value.message and len(raised.value.message) < 250


def whole(
    architecture: str, extra: Feature = Feature.NONE, **changes: Any
) -> tuple[dict[str, object], set[str]]:
    """Metadata and names of a good model of any family."""
    features = FAMILIES[architecture].always | extra
    values: dict[str, Any] = {}
    if Feature.EXPERTS in features:
        values = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 128}
    if Feature.WINDOW in features:
        values["attention__sliding_window"] = 16
    found = names(features) | set(model_tensors(features))
    return metadata(architecture, **{**values, **changes}), found


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_tensor_has_a_shape(architecture: str) -> None:
    extra = FAMILIES[architecture].sometimes
    values, found = whole(architecture, extra)
    spec = read(values, found)
    assert spec.features == FAMILIES[architecture].always | extra
    for name in found:
        assert all(n >= 1 for n in spec.tensor_shape(name))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_least_of_every_family(architecture: str) -> None:
    spec = read(*whole(architecture))
    assert spec.features == FAMILIES[architecture].always
    with pytest.raises(UnsupportedModel, match=r"blk\.1\.attn_extra"):
        read(*(lambda v, n: (v, n | {"blk.1.attn_extra.weight"}))(*whole(architecture)))


def test_windows_follow_the_family_or_the_file() -> None:
    assert read(*whole("gemma2", block_count=2)).windowed == (True, False)
    gemma3 = read(*whole("gemma3", Feature.WINDOW, attention__sliding_window=4))
    assert (gemma3.window, gemma3.windowed, gemma3.window_of(1)) == (4, (True, True), 4)
    assert gemma3.local_rope.base == 10000.0
    pattern = read(*whole("gpt-oss", attention__sliding_window_pattern=(False, True)))
    assert (pattern.window_of(0), pattern.window_of(1)) == (0, 16)
    assert read(*whole("gemma3")).window == 0


def test_a_token_goes_through_the_experts_it_was_sent_to() -> None:
    assert read(*whole("llama")).active_share() == 1
    # Per layer: 3 * 64 * 128 weights an expert of which 2 of 8 are read, and 12,928 outside them.
    share = read(*whole("llama", Feature.EXPERTS, expert_count=8, expert_used_count=2)).active_share()
    assert share == pytest.approx((2 * 24576 + 12928) / (8 * 24576 + 12928))


def test_gemma_s_numbers() -> None:
    spec = read(*whole("gemma2"))
    assert (spec.attention_cap, spec.logit_cap, spec.embedding_scale) == (50.0, 30.0, 8.0)
    assert spec.attention_scale == 8**-0.5
    assert read(*whole("gemma2", attn_logit_softcapping=20.0)).attention_cap == 20.0


def test_yarn_and_longrope() -> None:
    scaling = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    yarn = read(*whole("llama", **scaling, rope__scaling__original_context_length=128)).rope
    assert yarn.yarn is not None and yarn.yarn.original_context == 128
    assert yarn.magnitude == pytest.approx(1 + 0.1 * math.log(4))
    phi3 = read(*whole("phi3", Feature.LONG_ROPE, rope__scaling__original_context_length=64))
    assert phi3.rope.divisors(64) == ROPE_SHORT and phi3.rope.divisors(65) == ROPE_LONG
    with pytest.raises(MalformedGGUF, match="longrope"):
        read(*whole("phi3", rope__scaling__type="longrope"))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("qwen3moe", {"expert_count": 0}),
        ("qwen3moe", {"expert_count": 1 << 20}),
        ("qwen3moe", {"expert_used_count": 9}),
        ("qwen3moe", {"expert_used_count": 0}),
        ("qwen3moe", {"expert_feed_forward_length": -1}),
        ("qwen3moe", {"expert_feed_forward_length": 0, "feed_forward_length": 0}),
        ("gemma2", {"attention__sliding_window": 0}),
        ("gemma2", {"attention__sliding_window": 1 << 40}),
        ("gemma2", {"attention__sliding_window_pattern": (True,)}),
        ("gemma2", {"attention__sliding_window_pattern": -1}),
        ("gemma2", {"attn_logit_softcapping": -1.0}),
        ("gemma2", {"final_logit_softcapping": float("nan")}),
        ("gpt-oss", {"attention__sliding_window": None}),
        ("llama", {"rope__scaling__type": "yarn", "rope__scaling__original_context_length": 0}),
        ("llama", {"rope__scaling__type": "yarn", "rope__scaling__yarn_beta_fast": float("inf")}),
        ("llama", {"rope__scaling__type": "yarn", "rope__freq_base": 1.0}),
        ("llama", {"rope__scaling__attn_factor": 1e9}),
    ],
)
def test_nonsense_of_the_newer_features(architecture: str, changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedGGUF):
        read(*whole(architecture, **changes))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("qwen2", {"expert_count": 8}),
        ("qwen3moe", {"expert_weights_norm": False}),
        ("qwen3moe", {"expert_gating_func": 2}),
        ("qwen3moe", {"expert_group_count": 4}),
        ("qwen3moe", {"leading_dense_block_count": 1}),
        ("gemma3", {"attn_logit_softcapping": 50.0}),
    ],
)
def test_arithmetic_that_no_engine_has(architecture: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel):
        read(*whole(architecture, **changes))


KEYS = [
    *sorted(key.partition(".")[2] for key in metadata()),
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "attention.key_length",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "final_logit_softcapping",
]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.sampled_from([1, 2, 8, 64, 1024, 1e-5, "linear", "yarn", "longrope"]),
)


@given(
    st.sampled_from(sorted(FAMILIES)),
    st.dictionaries(st.sampled_from(KEYS), VALUES),
)
def test_any_metadata_are_read_or_refused(architecture: str, changes: dict[str, object]) -> None:
    values, found = whole(architecture)
    values |= {f"{architecture}.{key}": value for key, value in changes.items()}
    try:
        spec = read(values, found)
    except (MalformedGGUF, UnsupportedModel):
        return
    assert spec.heads % spec.kv_heads == 0 and spec.rope.dims <= spec.head_dim

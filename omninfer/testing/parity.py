"""Small models of noise, one for each architecture and quantisation, whose logits llama.cpp was asked for.

The files are made from nothing but names and seeds, so only llama.cpp's answers are kept
(`tests/conformance/parity`). Blocks of quantisations are random bits with scales of a sensible size: every
field of every block matters then, which of quantised numbers would not be so.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from numpy.typing import NDArray

from omninfer.arch import Feature
from omninfer.testing.noise import noise_model
from omninfer.testing.routing import decided

TOKENS: Final = 24
VOCAB: Final = 96
EXACT: Final = ("F32", "F16")
QUANTISED: Final = (
    "BF16",
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4",
)  # fmt: skip
SMALL: Final[dict[str, Any]] = {
    "block_count": 2,
    "embedding_length": 256,
    "feed_forward_length": 256,
    "vocab_size": VOCAB,
    "context_length": 256,
    "attention__head_count": 4,
}
MODELS: Final[Mapping[str, Any]] = {
    "llama": partial(noise_model, "llama"),
    "llama3": partial(noise_model, "llama", rope_freqs=True, rope__freq_base=5e5),
    "llama-linear": partial(
        noise_model, "llama", rope__scaling__type="linear", rope__scaling__factor=4.0, extra=Feature.FFN_BIAS
    ),
    "llama-yarn": partial(
        noise_model,
        "llama",
        rope__scaling__type="yarn",
        rope__scaling__factor=8.0,
        rope__scaling__original_context_length=32,
    ),
    "mixtral": partial(noise_model, "llama", extra=Feature.EXPERTS, expert_feed_forward_length=256),
    "qwen2": partial(noise_model, "qwen2"),
    "qwen2moe": partial(
        noise_model, "qwen2moe", expert_feed_forward_length=256, expert_shared_feed_forward_length=512
    ),
    "qwen3": partial(noise_model, "qwen3", attention__key_length=128, attention__value_length=128),
    "qwen3moe": partial(noise_model, "qwen3moe", expert_feed_forward_length=256),
    "gemma": partial(noise_model, "gemma", tied_head=True),
    "gemma2": partial(noise_model, "gemma2", tied_head=True, attn_logit_softcapping=5.0),
    "gemma3": partial(
        noise_model,
        "gemma3",
        block_count=7,
        tied_head=True,
        attention__sliding_window=8,
        rope__freq_base=1e6,
        rope__scaling__type="linear",
        rope__scaling__factor=8.0,
    ),
    "phi3": partial(noise_model, "phi3", extra=Feature.FUSED_QKV),
    "phi3-longrope": partial(
        noise_model,
        "phi3",
        extra=Feature.FUSED_QKV | Feature.LONG_ROPE,
        rope__scaling__original_context_length=16,
        rope__scaling__attn_factor=1.19,
        rope__dimension_count=48,
    ),
    "gpt-oss": partial(
        noise_model,
        "gpt-oss",
        expert_feed_forward_length=256,
        attention__key_length=64,
        attention__value_length=64,
        rope__scaling__type="yarn",
        rope__scaling__factor=32.0,
        rope__scaling__original_context_length=32,
        rope__freq_base=150000.0,
    ),
}


DECIDED: Final = {f"{name}-top2": name for name in ("mixtral", "qwen2moe", "qwen3moe", "gpt-oss")}
"""Two experts of eight for each token, by routers whose choice no rounding changes
(`omninfer.testing.routing`)."""
EVERY: Final = (*MODELS, *DECIDED)
ROUTED: Final = ("mixtral", "qwen2moe", "qwen3moe", "gpt-oss")
CASES: Final = (
    *((model, "F32") for model in MODELS),
    *(("llama", kind) for kind in ("F16", *QUANTISED)),
    *((model, kind) for model in DECIDED for kind in ("F32", "Q8_0", "Q4_K", "MXFP4")),
    *((model, kind) for model in ("mixtral", "gpt-oss") for kind in ("F16", "Q8_0", "Q4_K", "Q6_K", "MXFP4")),
)
"""Model and type of matrices: those of which llama.cpp's answers are kept."""


def tokens() -> NDArray[np.int32]:
    return (np.arange(TOKENS, dtype=np.int32) * 37 + 5) % VOCAB


LEAST: Final = 0.999
"""Cosine of logits where llama.cpp rounds activations."""
TWO_LEAST: Final = 0.998
"""The same of an engine that rounds activations too, in groups of its own: two roundings differ by both."""
ROUNDING_LEAST: Final = 0.9995
"""The same where they are rounded here too: what is left is a code now and then that falls the other way."""


def agrees(
    kind: str, logits: NDArray[np.float32], expected: NDArray[np.float32], least: float = LEAST
) -> bool:
    """Whether logits [tokens, vocab] are llama.cpp's.

    It multiplies quantised weights, and BF16, with activations rounded to as many bits: there only
    directions can be compared, by a cosine of at least `least`.
    """
    if kind in EXACT:
        same = bool(np.array_equal(logits.argmax(axis=-1), expected.argmax(axis=-1)))
        return same and float(np.abs(logits - expected).max()) < 0.01
    return cosine(logits, expected) > least


def agrees_rounding(
    kind: str, logits: NDArray[np.float32], expected: NDArray[np.float32], exact: NDArray[np.float32]
) -> bool:
    """The same of an engine that rounds activations itself: it may be as far from llama.cpp as both roundings
    together go, but no further than one from `exact`, the numpy engine's logits."""
    if agrees(kind, logits, expected):
        return True
    return kind not in EXACT and cosine(logits, expected) > TWO_LEAST and cosine(logits, exact) > LEAST


def cosine(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The least over the positions."""
    norms = np.linalg.norm(logits, axis=-1) * np.linalg.norm(expected, axis=-1)
    return float(((logits * expected).sum(axis=-1) / norms).min())


TEXT: Final = (
    "Once upon a time, there was a little girl named Lily. She liked to play outside in the park with her "
    "dog. One day, they saw a big red ball under a tree. Lily wanted the ball, but it was too high. The dog "
    "barked and jumped. Then a kind boy came and said, I can help you. He took the ball and gave it to Lily. "
    "She was very happy. They played together until the sun went down, and then they all went home to eat."
)
"""What perplexity is measured on."""


def perplexity(logits: NDArray[np.float32], ids: NDArray[np.int32]) -> float:
    """Of all tokens but the first; `logits` [tokens, vocab] are those after each of `ids`."""
    wide = logits[:-1].astype(np.float64)
    peak = wide.max(axis=-1, keepdims=True)
    total = np.log(np.exp(wide - peak).sum(axis=-1)) + peak[:, 0]
    return float(np.exp((total - wide[np.arange(len(wide)), ids[1:]]).mean()))


def write_model(path: Path, model: str, kind: str) -> None:
    """The model as a GGUF file, by the gguf package's writer."""
    name = DECIDED.get(model, model)
    shape = {key: value for key, value in SMALL.items() if key not in MODELS[name].keywords}
    if model in DECIDED:
        shape |= {"expert_count": 8, "expert_used_count": 2}
    elif kind not in EXACT and model in ROUTED:
        # A choice of experts is no continuous function: where activations are rounded, all are chosen.
        shape["expert_used_count"] = shape["expert_count"] = 4
    if kind not in EXACT:
        shape["block_count"] = 2  # llama.cpp's rounding of activations adds up over layers
    spec, source = MODELS[name](kind=kind, **shape)
    if model in DECIDED:
        decided(spec, source, tokens())
    architecture = str(source.metadata["general.architecture"])
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in source.metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str() if key != "general.architecture":
                writer.add_string(key, value)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    for name, shape in source.shapes.items():
        of = source.types[name]
        data = np.frombuffer(source.read(name), dtype=np.uint8)
        rows = data.reshape(*reversed(shape[1:]), -1)
        if of in ("F32", "F16"):
            writer.add_tensor(name, rows.view({"F32": "<f4", "F16": "<f2"}[of]))
        else:
            writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[of])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

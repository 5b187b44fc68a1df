"""Every engine says what llama.cpp says, within the tolerances that the reference files come with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omninfer.arch import ModelSpec
from omninfer.engines import Engine, FileTensorSource, Stage, StageSpec, get_engine
from omninfer.testing.noise import noise_model

EXACT = ("llama.gguf", "llama-F16.gguf", "qwen2_bias.gguf", "qwen3_qknorm.gguf")
QUANTISED = ("llama-Q8_0.gguf", "llama-Q4_0.gguf", "llama-Q4_K_M.gguf", "llama-Q6_K.gguf")


@pytest.fixture(params=["numpy", "numpy-packed", "mlx", "ort"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    if request.param == "numpy-packed":
        monkeypatch.setattr("omninfer.engines.numpy_engine.DECODED_LIMIT", 0)
    return get_engine(request.param.partition("-")[0])


def reference(path: Path) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    with np.load(path.with_suffix(".npz")) as arrays:
        return arrays["tokens"].astype(np.int32), arrays["logits"]


def all_logits(engine: Engine, path: Path, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    source = FileTensorSource(path)
    stage = engine.load(StageSpec.whole(source.model()), source, context=len(tokens))
    return stage.forward(tokens, slot=0, position=0, logits="all")


@pytest.mark.parametrize("name", EXACT)
def test_logits_of_exact_weights(shared: Path, engine: Engine, name: str) -> None:
    tokens, expected = reference(shared / "parity" / name)
    logits = all_logits(engine, shared / "parity" / name, tokens)
    assert np.abs(logits - expected).max() < 0.01
    assert np.array_equal(logits.argmax(axis=-1), expected.argmax(axis=-1))


@pytest.mark.parametrize("name", QUANTISED)
def test_logits_of_quantised_weights(shared: Path, engine: Engine, name: str) -> None:
    tokens, expected = reference(shared / "parity" / name)
    logits = all_logits(engine, shared / "parity" / name, tokens)
    cosine = (logits * expected).sum(-1) / np.linalg.norm(logits, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() > 0.999


def test_every_reference_file_is_compared(shared: Path) -> None:
    assert {path.name for path in (shared / "parity").glob("*.gguf")} == {*EXACT, *QUANTISED}


def pipeline(engine: Engine, path: Path, stages: int, slots: int) -> list[Stage]:
    """The model in that many stages, as evenly as its layers allow."""
    source = FileTensorSource(path)
    model = source.model()
    cuts = [model.layers * i // stages for i in range(stages + 1)]
    return [
        engine.load(
            StageSpec(model, first, last, embed=first == 0, head=last == model.layers),
            source,
            context=128,
            slots=slots,
        )
        for first, last in pairwise(cuts)
    ]


def step(stages: Sequence[Stage], tokens: Sequence[int], slot: int, position: int) -> NDArray[np.float32]:
    """The logits after the last of `tokens`."""
    x: NDArray[Any] = np.array(tokens, np.int32)
    for stage in stages:
        x = stage.forward(x, slot=slot, position=position)
    return x[0]


def references(shared: Path, name: str) -> list[dict[str, Any]]:
    cases = json.loads((shared / "models" / "reference.json").read_text())[name]
    assert len(cases) == 4
    return list(cases)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("name", ["stories260K-F32.gguf", "stories260K-F16.gguf"])
def test_greedy_tokens(shared: Path, engine: Engine, name: str, stages: int) -> None:
    line = pipeline(engine, shared / "models" / name, stages, slots=4)
    for slot, case in enumerate(references(shared, name)):
        said: list[int] = []
        tokens, position = case["prompt_tokens"], 0
        for _ in case["tokens"]:
            logits = step(line, tokens, slot, position)
            position += len(tokens)
            said.append(int(logits.argmax()))
            tokens = said[-1:]
        assert said == case["tokens"], case["prompt"]


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("stories260K-F32.gguf", 0.01),
        ("stories260K-F16.gguf", 0.01),
        ("stories260K-Q8_0.gguf", 0.25),
        ("stories260K-Q4_0.gguf", 0.25),
    ],
)
def test_log_probabilities(shared: Path, engine: Engine, name: str, tolerance: float) -> None:
    """llama.cpp's own tokens are fed, so that a near tie early on does not end the comparison."""
    line = pipeline(engine, shared / "models" / name, 1, slots=4)
    for slot, case in enumerate(references(shared, name)):
        tokens, position = case["prompt_tokens"], 0
        for token, likeliest in zip(case["tokens"], case["top5_first8"], strict=False):
            logits = step(line, tokens, slot, position).astype(np.float64)
            position += len(tokens)
            ours = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            for other, theirs in likeliest:
                assert abs(np.exp(ours[other]) - np.exp(theirs)) < tolerance / 5
                assert abs(ours[other] - theirs) < tolerance, (case["prompt"], position, other)
            tokens = [token]


KINDS = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
VARIANTS = {
    "llama": partial(noise_model),
    "llama with scaled, partial rope": partial(
        noise_model, rope_freqs=True, rope__scaling__factor=2.0, rope__dimension_count=16, tied_head=True
    ),
    "llama without sharing of heads": partial(noise_model, attention__head_count_kv=8),
    "qwen2": partial(noise_model, "qwen2"),
    "qwen3 with wide heads": partial(
        noise_model, "qwen3", attention__key_length=64, attention__value_length=64
    ),
}


def both(
    model: tuple[ModelSpec, Any], engine: str = "mlx"
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    tokens = np.arange(40, dtype=np.int32) * 7 % 320
    spec = StageSpec.whole(model[0])
    oracle, other = (get_engine(name).load(spec, model[1], context=64) for name in ("numpy", engine))
    return (
        oracle.forward(tokens, slot=0, position=0, logits="all"),
        other.forward(tokens, slot=0, position=0, logits="all"),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_mlx_agrees_with_numpy_on_every_variant(variant: str) -> None:
    expected, logits = both(VARIANTS[variant]())
    assert np.abs(logits - expected).max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_agrees_with_numpy_on_every_type(kind: str) -> None:
    # The scales of K-quants are rounded to halfs; random scales and minimums make the most of that.
    expected, logits = both(noise_model(kind=kind))
    assert np.abs(logits - expected).max() < (0.1 if kind.endswith("_K") else 1e-4)
    cosine = (logits * expected).sum(-1) / np.linalg.norm(logits, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() > 0.9995


ORT_VARIANTS = VARIANTS | {
    "gemma": partial(noise_model, "gemma"),
    "gemma2": partial(noise_model, "gemma2"),
    "gemma3": partial(noise_model, "gemma3", block_count=7),
    "phi3": partial(noise_model, "phi3"),
    "qwen2moe": partial(noise_model, "qwen2moe"),
    "qwen3moe": partial(noise_model, "qwen3moe"),
    "gpt-oss": partial(noise_model, "gpt-oss"),
    "heads that are padded": partial(
        noise_model, attention__key_length=24, attention__value_length=24, rope__dimension_count=24
    ),
}


@pytest.mark.parametrize("variant", ORT_VARIANTS)
def test_ort_agrees_with_numpy_on_every_variant(variant: str) -> None:
    expected, logits = both(ORT_VARIANTS[variant](), "ort")
    assert np.abs(logits - expected).max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_ort_agrees_with_numpy_on_every_type(kind: str) -> None:
    # Activations are 8 bits wide in products with quantised weights. Minimums of noise are far larger beside
    # their scales than a quantiser's, which makes the most of the rounding of their rests.
    expected, logits = both(noise_model(kind=kind), "ort")
    minimums = kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
    assert np.abs(logits - expected).max() < (1e-4 if kind in ("F16", "BF16") else 0.2 if minimums else 0.1)
    cosine = (logits * expected).sum(-1) / np.linalg.norm(logits, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() > 0.999

"""Every architecture and type of weights says what llama.cpp says (`tests/parity/logits.py --write`)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from omninfer.engines import FileTensorSource, StageSpec, get_engine
from omninfer.testing.parity import (
    CASES,
    EXACT,
    ROUNDING_LEAST,
    agrees,
    agrees_rounding,
    cosine,
    perplexity,
    tokens,
    write_model,
)
from omninfer.testing.rounding import rounding_logits
from tests.parity.logits import ours, text_ids, trained

VECTORS = Path(__file__).parent / "parity" / "llama_cpp.npz"


@pytest.mark.parametrize(("model", "kind"), CASES)
@pytest.mark.parametrize("name", ["numpy", "numpy-packed", "mlx", "ort"])
def test_logits(name: str, model: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "numpy-packed":
        monkeypatch.setattr("omninfer.engines.numpy_engine.DECODED_LIMIT", 0)
    path = tmp_path / "model.gguf"
    write_model(path, model, kind)
    source = FileTensorSource(path)
    stage = get_engine(name.partition("-")[0]).load(
        StageSpec.whole(source.model()), source, context=len(tokens())
    )
    logits = stage.forward(tokens(), slot=0, position=0, logits="all")
    with np.load(VECTORS) as answers:
        expected = answers[f"{model}/{kind}"]
    if name == "ort":
        good = agrees_rounding(kind, logits, expected, ours("numpy", path, tokens()))
    else:
        good = agrees(kind, logits, expected)
    assert good, (np.abs(logits - expected).max(), cosine(logits, expected))


@pytest.mark.parametrize(("model", "kind"), [case for case in CASES if case[1] not in EXACT])
def test_rounding_activations_too_leaves_next_to_nothing(model: str, kind: str, tmp_path: Path) -> None:
    """So what else differs by is llama.cpp's rounding, and no weight, router or position."""
    path = tmp_path / "model.gguf"
    write_model(path, model, kind)
    source = FileTensorSource(path)
    logits = rounding_logits(StageSpec.whole(source.model()), source, tokens())
    with np.load(VECTORS) as answers:
        assert cosine(logits, answers[f"{model}/{kind}"]) > ROUNDING_LEAST


def test_every_answer_is_compared() -> None:
    with np.load(VECTORS) as answers:
        assert set(answers) == {f"{model}/{kind}" for model, kind in CASES}


FIGURES = json.loads(VECTORS.with_name("perplexity.json").read_text())


@pytest.mark.parametrize("model", FIGURES)
@pytest.mark.parametrize("name", ["numpy", "mlx"])
def test_perplexity(name: str, model: str, request: pytest.FixtureRequest) -> None:
    """Within half a percent of llama.cpp's, of weights that were trained."""
    if not model.startswith("omni-demo"):
        request.getfixturevalue("shared")  # skips where those models are not
    path = trained()[model]
    ids = text_ids(path)
    assert perplexity(ours(name, path, ids), ids) == pytest.approx(FIGURES[model], rel=0.005)


@pytest.mark.parametrize("model", FIGURES)
@pytest.mark.parametrize("name", ["numpy", "mlx"])
def test_perplexity_with_keys_and_values_in_8_bits(
    name: str, model: str, request: pytest.FixtureRequest
) -> None:
    """Heads of 24 (demo) and of 8 elements: the bounds that the README gives."""
    demo = model.startswith("omni-demo")
    if not demo:
        request.getfixturevalue("shared")  # skips where those models are not
    path = trained()[model]
    ids = text_ids(path)
    full, q8 = ours(name, path, ids), ours(name, path, ids, "q8")
    assert perplexity(q8, ids) == pytest.approx(perplexity(full, ids), rel=0.0005 if demo else 0.005)
    assert 0 < np.abs(q8 - full).max() < (0.4 if demo else 1.5)
    assert cosine(q8, full) > (0.998 if demo else 0.996)

"""Routers that are fitted choose as they were told, with a margin, and everybody gets tokens."""

from __future__ import annotations

import numpy as np
import pytest

from omninfer.engines import StageSpec, get_engine
from omninfer.engines.fields import F32
from omninfer.engines.numpy_engine import NumpyStage
from omninfer.testing.noise import noise_model
from omninfer.testing.parity import DECIDED, MODELS, SMALL, tokens
from omninfer.testing.routing import GAIN, decided


@pytest.mark.parametrize("model", DECIDED)
def test_routers_choose_two_of_eight_with_a_margin(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where 3 % of noise is added to what reaches them, each token still goes to the same two."""
    make = MODELS[DECIDED[model]]
    shape = {key: value for key, value in SMALL.items() if key not in make.keywords}
    spec, source = make(kind="Q4_K", **{**shape, "expert_count": 8, "expert_used_count": 2})
    margins = decided(spec, source, tokens())
    assert len(margins) == spec.layers
    assert min(margins.values()) == pytest.approx(2 * GAIN, rel=1e-3)
    chosen: list[set[tuple[int, ...]]] = []
    through, rng = NumpyStage._experts, np.random.default_rng(3)

    def watched(stage: NumpyStage, prefix: str, x: F32) -> F32:
        bias = stage.vectors.get(prefix + "ffn_gate_inp.bias", np.zeros(8, np.float32))
        noisy = x + 0.03 * np.abs(x).mean() * rng.standard_normal(x.shape, dtype=np.float32)
        pairs = [
            np.sort(np.argsort(stage.matrices[prefix + "ffn_gate_inp.weight"].product(y) + bias)[:, -2:])
            for y in (x, noisy)
        ]
        assert np.array_equal(*pairs)
        chosen.append({tuple(pair) for pair in pairs[0].tolist()})
        return through(stage, prefix, x)

    monkeypatch.setattr(NumpyStage, "_experts", watched)
    stage = get_engine("numpy").load(StageSpec.whole(spec), source, context=len(tokens()))
    stage.forward(tokens(), slot=0, position=0, logits="none")
    assert len(chosen) == spec.layers
    for pairs in chosen:
        assert {expert for pair in pairs for expert in pair} == set(range(8)) and len(pairs) > 4


def test_other_models_are_refused() -> None:
    for model in (noise_model(), noise_model("qwen3moe")):
        with pytest.raises(ValueError, match="two experts"):
            decided(*model, tokens())

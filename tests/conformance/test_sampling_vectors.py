"""Probabilities that llama.cpp's samplers gave (`make parity-tokens`): each step, and their default order."""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np
import pytest

from omninfer.sampling import distribution
from tests.parity.sampling import STEPS, VECTORS, params_of

DOCUMENT: Final[dict[str, Any]] = json.loads(VECTORS.read_text())


def test_every_step_has_vectors() -> None:
    assert [case["params"] for case in DOCUMENT["cases"][:: len(DOCUMENT["logits"])]] == list(STEPS)


@pytest.mark.parametrize("step", range(len(STEPS)), ids=lambda place: ",".join(STEPS[place]) or "none")
def test_probabilities_are_those_of_llama_cpp(step: int) -> None:
    cases = [case for case in DOCUMENT["cases"] if case["params"] == STEPS[step]]
    assert len(cases) >= len(DOCUMENT["logits"])
    for case in cases:
        logits = np.array(DOCUMENT["logits"][case["logits"]], dtype=np.float32)
        ids, own = distribution(logits, DOCUMENT["history"], params_of(case["params"]))
        found = np.zeros(len(logits))
        found[ids] = own
        expected = np.zeros(len(logits))
        for id_, probability in case["probabilities"]:
            expected[id_] = probability
        assert np.abs(found - expected).max() < 2e-6

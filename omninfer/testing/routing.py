"""Routers that choose with a margin, so that models with experts can be compared where activations are
rounded.

A router of noise is nearly undecided somewhere, and the last bit of an activation then picks another expert:
two right answers have nothing in common. `decided` fits the routers of a noise model to what really reaches
them: each token goes to two experts of its own, whose logits stand `2 * GAIN` above those of all others.
Layer by layer, since what a router decides changes what the next one sees.
"""

from __future__ import annotations

from typing import Final
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from omninfer.arch import ModelSpec
from omninfer.engines import StageSpec, get_engine
from omninfer.engines.fields import F32
from omninfer.engines.numpy_engine import NumpyStage
from omninfer.engines.numpy_weights import DecodedMatrix
from omninfer.testing.noise import NoiseSource

GAIN: Final = 2.0
"""Of logits: the chosen have about this, the others its negative."""


def decided(model: ModelSpec, source: NoiseSource, tokens: NDArray[np.int32]) -> dict[str, float]:
    """Replace the routers in `source`, for a prompt of `tokens`; the least margin in each of them.

    There have to be fewer tokens than a hidden state has numbers. Raises `ValueError` for a model that
    chooses other than two.
    """
    if model.experts is None or model.experts.used != 2:
        raise ValueError("routers are fitted for two experts a token")
    count, margins = model.experts.count, dict[str, float]()
    through = NumpyStage._experts

    def fitted(stage: NumpyStage, prefix: str, x: F32) -> F32:
        name = prefix + "ffn_gate_inp.weight"
        layer = len(margins)
        targets = np.full((len(x), count), -GAIN, np.float32)
        for n in range(len(x)):
            first = (n * 3 + layer) % count
            targets[n, [first, (first + 1 + (n + layer) % (count - 1)) % count]] = GAIN
        bias = stage.vectors.get(prefix + "ffn_gate_inp.bias", np.zeros(count, np.float32))
        weights = np.linalg.lstsq(x.astype(np.float64), (targets - bias).astype(np.float64), rcond=None)[0]
        router = np.ascontiguousarray(weights.T, dtype=np.float32)
        source.given[name] = router.astype("<f4").tobytes()
        stage.matrices[name] = DecodedMatrix(router)
        ranked = np.sort(x @ router.T + bias, axis=-1)
        margins[name] = float((ranked[:, -2] - ranked[:, -3]).min())
        return through(stage, prefix, x)

    with patch.object(NumpyStage, "_experts", fitted):
        stage = get_engine("numpy").load(StageSpec.whole(model), source, context=len(tokens))
        stage.forward(tokens, slot=0, position=0, logits="none")
    return margins

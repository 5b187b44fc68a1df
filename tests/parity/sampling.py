"""Each step of sampling against llama.cpp's own sampler, and their whole chain in its default order.

`make parity-tokens` compares; with --write, what llama.cpp answered becomes the vectors of
`tests/conformance/test_sampling_vectors.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

from omninfer.sampling import SamplingParams, distribution
from tests.parity.peer import Peer

VECTORS: Final = Path(__file__).resolve().parent.parent / "conformance" / "vectors" / "sampling.json"
OFF: Final = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
STEPS: Final[tuple[dict[str, Any], ...]] = (
    {},
    *({"temperature": value} for value in (0.2, 0.8, 3.0)),
    *({"top_k": value} for value in (1, 5, 40, 1000)),
    *({"typical_p": value} for value in (0.1, 0.37, 0.8, 0.95)),
    *({"top_p": value} for value in (0.05, 0.5, 0.9, 0.965)),
    *({"min_p": value} for value in (0.02, 0.1, 0.6)),
    *({"repeat_penalty": value} for value in (0.7, 1.3, 2.0)),
    *({"presence_penalty": value} for value in (-1.0, 1.5)),
    *({"frequency_penalty": value} for value in (-0.5, 0.75)),
    {"repeat_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.4, "repeat_last_n": 5},
    {"repeat_penalty": 1.2, "repeat_last_n": 0},
    {"logit_bias": [[3, 4.0], [11, -7.5], [0, -10000.0]]},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    {
        "temperature": 0.7, "top_k": 30, "typical_p": 0.9, "top_p": 0.92, "min_p": 0.03,
        "repeat_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1, "logit_bias": [[7, 1.5]],
    },
)  # fmt: skip
HISTORY: Final = [5, 9, 9, 30, 2, 9, 17, 5, 44, 2]


def params_of(step: dict[str, Any]) -> SamplingParams:
    values = OFF | step
    values["logit_bias"] = tuple(tuple(pair) for pair in values.get("logit_bias", ()))
    return SamplingParams(**values)


def logit_vectors() -> list[list[float]]:
    """Sharp, flat and long: what models answer, roughly. No two are equal: llama.cpp ranks such by chance."""
    rng = np.random.default_rng(7)
    vectors = [rng.normal(0, scale, size) for scale, size in ((2, 50), (0.3, 50), (6, 50), (3, 300))]
    return [[round(float(value), 6) for value in vector] for vector in vectors]


def chain_of(params: SamplingParams, vocabulary: int) -> list[list[Any]]:
    """llama.cpp's samplers, in its default order."""
    penalties = (params.repeat_penalty, params.frequency_penalty, params.presence_penalty)
    return [
        ["logit_bias", *([token, bias] for token, bias in params.logit_bias)],
        ["penalties", vocabulary, params.repeat_last_n, *penalties],
        ["top_k", params.top_k],
        ["typical", params.typical_p, 0],
        ["top_p", params.top_p, 0],
        ["min_p", params.min_p, 0],
        ["temp", params.temperature],
    ]


def probabilities(answer: dict[str, Any]) -> dict[int, float]:
    """Of what llama.cpp left, by id."""
    logits = np.array(answer["logits"], dtype=np.float64)
    weights = np.exp(logits - logits.max())
    return dict(zip(answer["ids"], (weights / weights.sum()).tolist(), strict=True))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--write", action="store_true", help="make the vectors anew")
    asked = arguments.parse_args()
    vectors, cases, failed = logit_vectors(), [], 0
    with Peer() as peer:
        for step in STEPS:
            worst = 0.0
            for number, logits in enumerate(vectors):
                params = params_of(step)
                answer = peer.ask(logits=logits, chain=chain_of(params, len(logits)), history=HISTORY)
                theirs = probabilities(answer)
                ids, own = distribution(np.array(logits, dtype=np.float32), HISTORY, params)
                ours = dict(zip(ids.tolist(), own.tolist(), strict=True))
                for id_ in theirs.keys() | ours.keys():
                    worst = max(worst, abs(theirs.get(id_, 0) - ours.get(id_, 0)))
                kept = [[id_, round(p, 7)] for id_, p in sorted(theirs.items()) if p >= 1e-7]
                cases.append({"logits": number, "params": step, "probabilities": kept})
            failed += worst > 1e-5
            print(f"{json.dumps(step)[:90]:92} largest difference of a probability {worst:.1e}")
    if asked.write:
        document = {"history": HISTORY, "logits": vectors, "cases": cases}
        VECTORS.write_text(json.dumps(document, separators=(",", ":")) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

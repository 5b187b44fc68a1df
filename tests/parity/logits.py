"""Every architecture × every type of weights × every engine against llama.cpp, asked now (`make parity`).

    python -m tests.parity.logits [--write] [--models llama,gpt-oss] [--kinds F32,Q4_K] [--engines numpy,mlx]

Prints for each what differs: the largest difference of a logit for F32 and F16, which must be below 0.01 with
every likeliest token the same; else the least cosine over the positions, which must be above 0.999. An engine
that refuses a model says so and is no miss. Ends with status 1 on a miss. With --write, llama.cpp's answers
to `CASES` become the vectors of `tests/conformance/test_llama_cpp.py`, which need no llama.cpp.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omninfer.engines import FileTensorSource, StageSpec, get_engine
from omninfer.testing.parity import CASES, EXACT, MODELS, QUANTISED, agrees, cosine, tokens, write_model
from omnistore.errors import UnsupportedModel
from tests.parity.peer import HERE, PYTHON

VECTORS = HERE.parent / "conformance" / "parity" / "llama_cpp.npz"


def oracle(path: Path) -> NDArray[np.float32]:
    """[tokens, vocab], from llama.cpp."""
    asked, answered = path.with_suffix(".tokens.npy"), path.with_suffix(".logits.npy")
    np.save(asked, tokens())
    if not PYTHON.exists():
        raise SystemExit(f"{PYTHON} is not here: `make .peers` installs llama-cpp-python beside omni")
    subprocess.run([PYTHON, HERE / "ask_logits.py", path, asked, answered], check=True, timeout=60)
    logits: NDArray[np.float32] = np.load(answered)
    return logits


def write_vectors() -> None:
    answers = {}
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "model.gguf"
        for model, kind in CASES:
            write_model(path, model, kind)
            answers[f"{model}/{kind}"] = oracle(path)
    np.savez_compressed(VECTORS, allow_pickle=False, **answers)


def ours(engine: str, path: Path) -> NDArray[np.float32]:
    source = FileTensorSource(path)
    stage = get_engine(engine).load(StageSpec.whole(source.model()), source, context=len(tokens()))
    return stage.forward(tokens(), slot=0, position=0, logits="all")


def compare(engine: str, path: Path, kind: str, expected: NDArray[np.float32]) -> tuple[str, bool]:
    """What to print, and whether it is a miss."""
    try:
        logits = ours(engine, path)
    except UnsupportedModel:
        return "refused", False
    good = agrees(kind, logits, expected)
    figure = np.abs(logits - expected).max() if kind in EXACT else cosine(logits, expected)
    return f"{figure:.5f}{'' if good else ' MISS'}", not good


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--kinds", default=",".join((*EXACT, *QUANTISED)))
    parser.add_argument("--engines", default="numpy,mlx")
    options = parser.parse_args(arguments)
    if options.write:
        write_vectors()
        return 0
    engines, misses = options.engines.split(","), 0
    print(f"{'architecture':<14} {'type':<8}" + "".join(f" {engine:>14}" for engine in engines))
    with tempfile.TemporaryDirectory() as home:
        for model in options.models.split(","):
            for kind in options.kinds.split(","):
                path = Path(home) / "model.gguf"
                write_model(path, model, kind)
                expected = oracle(path)
                found = [compare(engine, path, kind, expected) for engine in engines]
                misses += sum(miss for _, miss in found)
                print(f"{model:<14} {kind:<8}" + "".join(f" {text:>14}" for text, _ in found), flush=True)
    print(f"{misses} misses")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Every architecture × every type of weights × every engine against llama.cpp, asked now (`make parity`).

    python -m tests.parity.logits [--write] [--models llama,gpt-oss] [--kinds F32,Q4_K] [--engines numpy,mlx]

Prints for each what differs: the largest difference of a logit for F32 and F16, which must be below 0.01 with
every likeliest token the same; else the least cosine over the positions, which must be above 0.999. An engine
that refuses a model says so and is no miss. Ends with status 1 on a miss. With --write, llama.cpp's answers
to `CASES` become the vectors of `tests/conformance/test_llama_cpp.py`, which need no llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from omninfer.arch import KVKind
from omninfer.engines import FileTensorSource, StageSpec, get_engine
from omninfer.testing.parity import (
    CASES,
    EXACT,
    MODELS,
    QUANTISED,
    TEXT,
    agrees,
    cosine,
    perplexity,
    tokens,
    write_model,
)
from omninfer.tokenizer import Tokenizer
from omnistore.errors import UnsupportedModel
from tests.parity.peer import HERE, PYTHON

VECTORS = HERE.parent / "conformance" / "parity" / "llama_cpp.npz"
PERPLEXITIES = VECTORS.with_name("perplexity.json")


def oracle(path: Path, ids: NDArray[np.int32], scratch: Path) -> NDArray[np.float32]:
    """[tokens, vocab], from llama.cpp, by way of files in `scratch`."""
    asked, answered = scratch / "tokens.npy", scratch / "logits.npy"
    np.save(asked, ids)
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
            answers[f"{model}/{kind}"] = oracle(path, tokens(), Path(home))
        figures = {name: theirs(path, Path(home)) for name, path in trained().items()}
    np.savez_compressed(VECTORS, allow_pickle=False, **answers)
    PERPLEXITIES.write_text(json.dumps(figures, indent=1) + "\n")


def trained() -> dict[str, Path]:
    """Models that say something, by name: the demo model, and those beside the repository."""
    root = HERE.parent.parent
    paths = [
        *(root / "manifests" / "demo").glob("*.gguf"),
        *(root.parent / "shared" / "models").glob("*.gguf"),
    ]
    return {path.name: path for path in sorted(paths)}


def text_ids(path: Path) -> NDArray[np.int32]:
    """`TEXT`, or for the demo model, which knows few words, the stories of its own reference."""
    text, reference = TEXT, path.with_name("reference.json")
    if path.name.startswith("omni-demo"):
        text = " ".join(a["prompt"] + a["text"] for a in json.loads(reference.read_text())["answers"])
    source = FileTensorSource(path)
    tokenizer = Tokenizer.from_metadata_untrusted(source.metadata)
    ids = tokenizer.encode(text, add_special=True, parse_special=False)
    return np.array(ids[: source.model().context_length], np.int32)


def theirs(path: Path, scratch: Path) -> float:
    """llama.cpp's perplexity."""
    ids = text_ids(path)
    return perplexity(oracle(path, ids, scratch), ids)


def ours(engine: str, path: Path, ids: NDArray[np.int32], kv: KVKind = "full") -> NDArray[np.float32]:
    source = FileTensorSource(path)
    stage = get_engine(engine).load(StageSpec.whole(source.model()), source, context=len(ids), kv=kv)
    return stage.forward(ids, slot=0, position=0, logits="all")


def compare_perplexities(engines: list[str]) -> int:
    """Print those of every engine; answer how many are off by more than half a percent."""
    misses = 0
    with tempfile.TemporaryDirectory() as home:
        for name, path in trained().items():
            expected, ids = theirs(path, Path(home)), text_ids(path)
            found = [perplexity(ours(engine, path, ids), ids) for engine in engines]
            misses += sum(abs(figure / expected - 1) > 0.005 for figure in found)
            print(f"{name:<24} llama.cpp {expected:.4f}", *(f"{figure:.4f}" for figure in found))
    return misses


def compare(engine: str, path: Path, kind: str, expected: NDArray[np.float32]) -> tuple[str, bool]:
    """What to print, and whether it is a miss."""
    try:
        logits = ours(engine, path, tokens())
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
                expected = oracle(path, tokens(), Path(home))
                found = [compare(engine, path, kind, expected) for engine in engines]
                misses += sum(miss for _, miss in found)
                print(f"{model:<14} {kind:<8}" + "".join(f" {text:>14}" for text, _ in found), flush=True)
    misses += compare_perplexities(engines)
    print(f"{misses} misses")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Every architecture × every type of weights × every engine against llama.cpp, asked now (`make parity`).

    python -m tests.parity.logits [--write] [--models llama,gpt-oss] [--kinds F32,Q4_K] [--engines numpy,mlx]
                                  [--results FILE] [--table FILE]

Prints for each what differs: the largest difference of a logit for F32 and F16, which must be below 0.01 with
every likeliest token the same; else the least cosine over the positions, which must be above 0.999. An engine
that refuses a model says so and is no miss. Ends with status 1 on a miss. With --results, what was compared
is kept in a file, and not compared again by the next run; --table writes the file as a table. With --write,
llama.cpp's answers to `CASES` become the vectors of `tests/conformance/test_llama_cpp.py`, which need no
llama.cpp.
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
    EVERY,
    EXACT,
    QUANTISED,
    ROUNDING_LEAST,
    TEXT,
    agrees,
    agrees_rounding,
    cosine,
    perplexity,
    tokens,
    write_model,
)
from omninfer.testing.rounding import rounding_logits
from omninfer.tokenizer import Tokenizer
from omnistore.errors import UnsupportedModel
from tests.parity.peer import HERE, PYTHON

VECTORS = HERE.parent / "conformance" / "parity" / "llama_cpp.npz"
ROUNDING = "numpy, rounding"
"""The numpy engine with activations rounded as llama.cpp's are."""
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


def rounding(path: Path) -> NDArray[np.float32]:
    source = FileTensorSource(path)
    return rounding_logits(StageSpec.whole(source.model()), source, tokens())


def explained(path: Path, expected: NDArray[np.float32]) -> float:
    """The least cosine that llama.cpp's rounding of activations explains: what it moves the numpy engine by.

    1 where it explains nothing, since numpy that rounds as llama.cpp does says something else than it.
    """
    found = rounding(path)
    if cosine(found, expected) <= ROUNDING_LEAST:
        return 1.0
    return cosine(ours("numpy", path, tokens()), found) - 0.0005


def compare(engine: str, path: Path, kind: str, expected: NDArray[np.float32]) -> str:
    """What differs; ends with MISS where that is too much."""
    try:
        logits = rounding(path) if engine == ROUNDING else ours(engine, path, tokens())
    except UnsupportedModel:
        return "–"
    if engine == ROUNDING:
        good = agrees(kind, logits, expected, ROUNDING_LEAST)
    elif engine == "ort":
        good = agrees_rounding(kind, logits, expected, ours("numpy", path, tokens()))
    else:
        good = agrees(kind, logits, expected) or agrees(kind, logits, expected, explained(path, expected))
    figure = np.abs(logits - expected).max() if kind in EXACT else cosine(logits, expected)
    return f"{figure:.5f}{'' if good else ' MISS'}"


Results = dict[str, dict[str, dict[str, str]]]
"""What differs, by architecture, type and engine."""


def compare_all(models: list[str], kinds: list[str], engines: list[str], kept: Path | None) -> Results:
    """Compare what is not in `kept` yet, and print it as it comes."""
    results: Results = json.loads(kept.read_text()) if kept is not None and kept.exists() else {}
    print(f"{'architecture':<14} {'type':<8}" + "".join(f" {engine:>14}" for engine in engines))
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "model.gguf"
        for model, kind in ((model, kind) for model in models for kind in kinds):
            found = results.setdefault(model, {}).setdefault(kind, {})
            missing = [engine for engine in engines if engine not in found]
            if missing:
                write_model(path, model, kind)
                expected = oracle(path, tokens(), Path(home))
                found |= {engine: compare(engine, path, kind, expected) for engine in missing}
                if kept is not None:
                    kept.write_text(json.dumps(results))
            print(f"{model:<14} {kind:<8}" + "".join(f" {found[e]:>14}" for e in engines), flush=True)
    return results


def table(results: Results) -> str:
    """Markdown: for each engine, what differs of every architecture (down) and type (across)."""
    text = [
        "# Logits beside llama.cpp's",
        "",
        f"`make parity-table` wrote this, with llama-cpp-python {version()}. F32 and F16: the largest",
        "difference of a logit of about 1 (below 0.01, and every likeliest token the same). Others:",
        "the least cosine over 24 tokens, since llama.cpp rounds activations to 8 bits there (above",
        "0.999, or as far as that rounding moves the numpy engine; of ort, which rounds too, in groups",
        "of its own, above 0.998 if it is above 0.999 beside numpy's); where numpy rounds them as",
        "llama.cpp does, above 0.9995: what is left is a code here and there. –: refused, by an error",
        "that says why (see unsupported.md).",
        "`-top2`: two experts of eight, chosen with a margin; other models with experts choose all of",
        "four where activations are rounded.",
    ]
    engines = sorted({engine for kinds in results.values() for found in kinds.values() for engine in found})
    kinds = [kind for kind in (*EXACT, *QUANTISED) if any(kind in found for found in results.values())]
    for engine in engines:
        text += ["", f"## {engine}", "", "| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
        for model in (model for model in EVERY if model in results):
            cells = [results[model].get(kind, {}).get(engine, "") for kind in kinds]
            text.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def version() -> str:
    """Of llama-cpp-python, which says of which llama.cpp."""
    asked = "import importlib.metadata as m; print(m.version('llama-cpp-python'))"
    done = subprocess.run([PYTHON, "-c", asked], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--models", default=",".join(EVERY))
    parser.add_argument("--kinds", default=",".join((*EXACT, *QUANTISED)))
    parser.add_argument("--engines", default="numpy,mlx,ort")
    parser.add_argument("--results", type=Path, metavar="FILE")
    parser.add_argument("--table", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.write:
        write_vectors()
        return 0
    engines = options.engines.split(",")
    compared = [*engines, ROUNDING] if "numpy" in engines else engines
    results = compare_all(options.models.split(","), options.kinds.split(","), compared, options.results)
    cells = [cell for kinds in results.values() for found in kinds.values() for cell in found.values()]
    misses = sum(cell.endswith("MISS") for cell in cells) + compare_perplexities(engines)
    if options.table is not None:
        options.table.write_text(table(results), encoding="utf-8")
    print(f"{misses} misses")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

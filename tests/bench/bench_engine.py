"""The ort engine beside llama.cpp: the same GGUF, the same threads, turn and turn about in one run.

    python -m tests.bench.bench_engine [--types Q4_0 Q8_0 Q4_K_M] [--prompt 64] [--rounds 3]

TinyLlama's shape with random weights. Each measurement is a process of its own; of the rounds the best
counts, and beside it stands the range of the ratios of single rounds. llama.cpp comes from `make .peers`;
without it there are our figures only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.bench.bench_engine_memory import peak_bytes
from tests.bench.make_gguf import tinyllama, write_gguf

ROOT = Path(__file__).resolve().parent.parent.parent
DECODED = 64
CONTEXT = 1024


def measure(model: Path, prompt: int) -> dict[str, float]:
    """Ours, in this process."""
    from omninfer.engines import FileTensorSource, StageSpec, get_engine

    started = time.perf_counter()
    source = FileTensorSource(model)
    stage = get_engine("ort").load(StageSpec.whole(source.model()), source, context=CONTEXT)
    load = time.perf_counter() - started
    seconds = []
    for _ in range(2):
        stage.drop(0)
        at = time.perf_counter()
        stage.forward(np.arange(prompt, dtype=np.int32), slot=0, position=0)
        seconds.append(time.perf_counter() - at)
    at = time.perf_counter()
    for i in range(DECODED):
        stage.forward(np.array([i], np.int32), slot=0, position=prompt + i)
    decode = time.perf_counter() - at
    return {
        "load_s": load,
        "first_s": load + seconds[0],
        "prefill": prompt / min(seconds),
        "decode": DECODED / decode,
        "peak": peak_bytes(),
    }


def answer(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    parsed: dict[str, float] = json.loads(done.stdout)
    return parsed


def compare(kind: str, options: argparse.Namespace, directory: Path) -> None:
    from omninfer.engines.ort_engine import cores

    model, prompt = directory / f"{kind}.gguf", str(options.prompt)
    write_gguf(model, tinyllama(kind))
    ours_command = [sys.executable, "-m", "tests.bench.bench_engine", "--measure", str(model)]
    theirs_command = [options.peers, "tests/bench/llama_cpp_speed.py", str(model), str(cores()), prompt]
    ours, theirs = [], []
    for _ in range(options.rounds):
        ours.append(answer([*ours_command, "--prompt", prompt]))
        if Path(options.peers).exists():
            theirs.append(answer([*theirs_command, str(DECODED)]))
    for what, best in (("prefill", max), ("decode", max), ("load_s", min), ("first_s", min), ("peak", min)):
        mine = best(one[what] for one in ours)
        unit = 1e6 if what == "peak" else 1.0
        line = f"{kind:7} prompt {prompt:>4}  {what:8} ort {mine / unit:8.2f}"
        if theirs:
            limit = best(one[what] for one in theirs)
            rounds = [a[what] / b[what] for a, b in zip(ours, theirs, strict=True)]
            line += f"  llama.cpp {limit / unit:8.2f}  ratio {mine / limit:.2f}"
            line += f"  (rounds {min(rounds):.2f} to {max(rounds):.2f})"
        print(line, flush=True)
    model.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q8_0", "Q4_K_M"])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=str(ROOT / ".peers" / "bin" / "python"), help="llama.cpp's Python")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.prompt)))
        return
    if not Path(options.peers).exists():
        print("llama.cpp is not here to be compared with: make .peers")
    with tempfile.TemporaryDirectory() as directory:
        for kind in options.types:
            compare(kind, options, Path(directory))


if __name__ == "__main__":
    main()

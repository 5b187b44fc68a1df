"""Peak memory of a stage against its limit: 1.3 x its packed weights + 300 MB.

    python -m tests.bench.bench_engine_memory [--engine mlx|ort|numpy] [--only NAME]

Each case loads a model of noise in a fresh process, runs a prompt and a token, and reports the highest
resident size that the process ever had. `file` reads a GGUF that is made for it; the other cases make
their tensors as they are read, so that any mix of types and a stage that is all head need no disk.
Ends with status 1 if a case is over its limit.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FACTOR, ALLOWANCE = 1.3, 300e6
PROMPT = 8
"""Tokens; MLX's CPU build needs about a second for each on these shapes."""
SHAPE = {
    "block_count": 22,
    "embedding_length": 2048,
    "feed_forward_length": 5632,
    "attention__head_count": 32,
    "attention__head_count_kv": 4,
    "vocab_size": 32000,
}
"""TinyLlama's, 1.1 thousand million weights."""
FILE_SIZE = 640 << 20


def q4_k_m(name: str) -> str:
    """llama-quantize's mix: Q6_K for the head, and for values and ffn_down of half the layers."""
    if name == "output.weight":
        return "Q6_K"
    careful = name.endswith(("attn_v.weight", "ffn_down.weight"))
    return "Q6_K" if careful and int(name.split(".")[1]) % 2 == 0 else "Q4_K"


def q4_k_and_q8_0(name: str) -> str:
    return "Q8_0" if name.endswith(("attn_v.weight", "ffn_down.weight", "output.weight")) else "Q4_K"


@dataclass(frozen=True, slots=True)
class Case:
    kind: str | Callable[[str], str]
    shape: dict[str, int]
    head_only: bool = False


CASES = {
    "file": None,
    "Q4_K_M": Case(q4_k_m, SHAPE),
    "Q4_K+Q8_0": Case(q4_k_and_q8_0, SHAPE),
    "Q6_K": Case("Q6_K", SHAPE),
    "F16": Case("F16", {**SHAPE, "block_count": 8}),
    "head": Case(q4_k_m, {**SHAPE, "vocab_size": 400_000}, head_only=True),
}


def peak_bytes() -> int:
    """Of this process. Linux's ru_maxrss would count the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(engine_name: str, case_name: str, file: Path) -> dict[str, float]:
    """Load and run one case, in this process."""
    from omninfer.engines import FileTensorSource, StageSpec, TensorSource, get_engine
    from omninfer.testing.noise import noise_model

    case = CASES[case_name]
    source: TensorSource
    if case is None:
        from_file = FileTensorSource(file)
        spec, source = StageSpec.whole(from_file.model()), from_file
    else:
        model, source = noise_model(kind=case.kind, **case.shape)
        spec = StageSpec.whole(model)
        if case.head_only:
            spec = StageSpec(model, model.layers, model.layers, embed=False, head=True)
    engine = get_engine(engine_name)
    idle = peak_bytes()
    started = time.perf_counter()
    stage = engine.load(spec, source, context=512)
    loaded = time.perf_counter()
    tokens = np.arange(PROMPT + 1, dtype=np.int32)
    x = tokens if spec.embed else np.ones((PROMPT + 1, spec.model.width), np.float32)
    stage.forward(x[:PROMPT], slot=0, position=0)
    stage.forward(x[PROMPT:], slot=0, position=PROMPT)
    return {
        "packed": stage.nbytes,
        "peak": peak_bytes(),
        "idle": idle,
        "load_s": loaded - started,
        "run_s": time.perf_counter() - loaded,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="mlx", choices=["mlx", "ort", "numpy"])
    parser.add_argument("--only", choices=sorted(CASES))
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.engine, options.measure[0], Path(options.measure[1]))))
        return 0
    worst = 0.0
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "noise.gguf"
        for name in [options.only] if options.only else CASES:
            if name == "file":
                maker = [sys.executable, str(Path(__file__).with_name("make_gguf.py")), str(file)]
                subprocess.run([*maker, "--size", str(FILE_SIZE), "--type", "Q4_K"], check=True)
            command = [sys.executable, "-m", "tests.bench.bench_engine_memory", "--engine", options.engine]
            done = subprocess.run(
                [*command, "--measure", name, str(file)], check=True, stdout=subprocess.PIPE, text=True
            )
            result = json.loads(done.stdout)
            packed, peak, idle = (result[key] / 1e6 for key in ("packed", "peak", "idle"))
            ratio = peak / (FACTOR * packed + ALLOWANCE / 1e6)
            worst = max(worst, ratio)
            print(
                f"{options.engine:5} {name:9}  packed {packed:4.0f} MB  peak {peak:4.0f} MB"
                f"  of its limit {ratio:.2f}  (idle {idle:.0f} MB, else {(peak - idle) / packed:.2f} packed,"
                f" load {result['load_s']:.1f} s, {PROMPT + 1} tokens {result['run_s']:.1f} s)",
                flush=True,
            )
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())

"""An engine beside llama.cpp: the same GGUF, the same threads or GPU, turn and turn about in one run.

    python -m tests.bench.bench_engine [--engine ort] [--types Q4_0 …] [--prompts 64 512] [--rounds 2]

TinyLlama's shape with random weights; about 25 seconds a round and type. Each measurement is a process of its
own; of the rounds the best counts, and beside it stands the range of the ratios of single rounds. Starts
are timed from the process's own begin to the first token, the interpreter and its imports included:
"first start" packs the weights and keeps the packed form (ort does), "next start" finds it. llama.cpp comes
from `make peers`; without it there are our figures only. `--gpu` is `make bench-gpu`: mlx, and llama.cpp with
all layers on the GPU that it was built for; it ends with status 1 where MLX finds none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tests.bench.bench_engine_memory import peak_bytes
from tests.bench.make_gguf import tinyllama, write_gguf

ROOT = Path(__file__).resolve().parent.parent.parent
DECODED = 64
CONTEXT = 1024


def measure(engine: str, model: Path, prompts: Sequence[int], began: float) -> dict[str, float]:
    """Ours, in this process, which `began` at that time (seconds since 1970)."""
    from omninfer.engines import FileTensorSource, StageSpec, get_engine

    class Kept(FileTensorSource):
        """What the engine packs is found again by the next process."""

        packed = model.with_suffix(".packed")

        def origin(self, name: str) -> str | None:
            return ".".join(name.split(".")[:2])

    source = Kept(model)
    started = time.perf_counter()
    stage = get_engine(engine).load(StageSpec.whole(source.model()), source, context=CONTEXT)
    result = {"load_s": time.perf_counter() - started}
    for prompt in prompts:
        tokens, seconds = np.arange(prompt, dtype=np.int32), []
        for _ in range(2):
            stage.drop(0)
            at = time.perf_counter()
            stage.forward(tokens, slot=0, position=0)
            seconds.append(time.perf_counter() - at)
            result.setdefault("first_token_s", time.time() - began)
        result[f"prefill {prompt}"] = prompt / min(seconds)
        at = time.perf_counter()
        for i in range(DECODED):
            stage.forward(np.array([i], np.int32), slot=0, position=prompt + i)
        result[f"decode at {prompt}"] = DECODED / (time.perf_counter() - at)
    return {**result, "peak_mb": peak_bytes() / 1e6, "packed_mb": stage.nbytes / 1e6}


def answer(command: list[str]) -> dict[str, float]:
    done = subprocess.run(
        [*command, str(time.time())], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    parsed: dict[str, float] = json.loads(done.stdout)
    return parsed


def compare(kind: str, options: argparse.Namespace, directory: Path) -> None:
    from omninfer.engines.ort_engine import cores

    model, prompts = directory / f"{kind}.gguf", [str(prompt) for prompt in options.prompts]
    write_gguf(model, tinyllama(kind))
    ours_command = [sys.executable, "-m", "tests.bench.bench_engine", "--engine", options.engine]
    theirs_command = [options.peers, "tests/bench/llama_cpp_speed.py", str(model), str(cores()), str(DECODED)]
    theirs_command.append("gpu" if options.gpu else "cpu")
    ours, theirs = [], []
    for _ in range(options.rounds + 1):  # the first packs
        ours.append(answer([*ours_command, "--prompts", *prompts, "--measure", str(model)]))
        if Path(options.peers).is_file():
            theirs.append(answer([*theirs_command, *prompts]))
    first, ours = ours[0], ours[1:]
    if options.engine == "ort":
        unpacked = first["load_s"] - min(one["load_s"] for one in ours)
        rate = first["packed_mb"] / 1e3 / unpacked
        print(f"{kind:7} packing {rate:.2f} GB/s of weights over all cores, to the disk")
    label = f"{kind:7} {{:14}} {options.engine}"
    _show(
        label.format("first start"), [first["first_token_s"]], [one["first_token_s"] for one in theirs], min
    )
    _show(
        label.format("next start"), *([one["first_token_s"] for one in side] for side in (ours, theirs)), min
    )
    for what in ours[0]:
        if what.startswith(("prefill", "decode")):
            _show(label.format(what), *([one[what] for one in side] for side in (ours, theirs[1:])), max)
    _show(
        label.format("peak_mb"), *([one["peak_mb"] for one in side] for side in ([first, *ours], theirs)), max
    )


def _show(label: str, ours: list[float], theirs: list[float], best: Callable[[list[float]], float]) -> None:
    line = f"{label} {best(ours):8.2f}"
    if theirs:
        rounds = [a / b for a, b in zip(ours, theirs, strict=False)]
        line += f"  llama.cpp {best(theirs):8.2f}  ratio {best(ours) / best(theirs):.2f}"
        line += f"  (rounds {min(rounds):.2f} to {max(rounds):.2f})"
    print(line, flush=True)


def gpu() -> str | None:
    """What MLX computes on, if that is a GPU."""
    import mlx.core as mx

    from omninfer.engines import get_engine

    if not get_engine("mlx").accelerated():
        return None
    return str(mx.device_info().get("device_name", mx.default_device()))


def offloads(peers: str) -> bool:
    """Whether that environment's llama.cpp was built for a GPU."""
    ask = "import llama_cpp, sys; sys.exit(not llama_cpp.llama_supports_gpu_offload())"
    return subprocess.run([peers, "-c", ask], stderr=subprocess.DEVNULL).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="ort", choices=["ort", "mlx", "numpy"])
    parser.add_argument("--gpu", action="store_true", help="mlx and llama.cpp, both on the GPU")
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q8_0", "Q4_K_M"])
    parser.add_argument("--prompts", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", default=str(ROOT / ".peers" / "bin" / "python"), help="llama.cpp's Python")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "BEGAN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        file, began = options.measure
        print(json.dumps(measure(options.engine, Path(file), options.prompts, float(began))))
        return 0
    if options.gpu:
        options.engine, device = "mlx", gpu()
        if device is None:
            print("MLX finds no GPU: nothing was measured. For NVIDIA's, on Linux: pip install 'mlx[cuda13]'")
            return 1
        print(f"on {device}")
    if not Path(options.peers).is_file():
        print("llama.cpp is not here to be compared with: make peers")
    elif options.gpu and not offloads(options.peers):
        print("llama.cpp was built for CPUs: left out. For NVIDIA's: CMAKE_ARGS=-DGGML_CUDA=on make peers")
        options.peers = ""
    with tempfile.TemporaryDirectory() as directory:
        for kind in options.types:
            compare(kind, options, Path(directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())

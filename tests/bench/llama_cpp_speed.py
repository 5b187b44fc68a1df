"""llama.cpp's side of bench_engine: prints one JSON object. Runs in the peers' environment, alone.

python tests/bench/llama_cpp_speed.py MODEL.gguf THREADS DECODED cpu|gpu PROMPT… BEGAN
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import llama_cpp as llama


def main(model: str, threads: int, decoded: int, where: str, prompts: list[int], began: float) -> None:
    started = time.perf_counter()
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, None)
    llama.llama_backend_init()
    of_model = llama.llama_model_default_params()
    of_model.n_gpu_layers = 999 if where == "gpu" else 0
    loaded = llama.llama_model_load_from_file(model.encode(), of_model)
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch = 1024, 512
    params.n_threads = params.n_threads_batch = threads
    context = llama.llama_init_from_model(loaded, params)
    result = {"load_s": time.perf_counter() - started}

    def run(tokens: list[int]) -> None:
        array = (llama.llama_token * len(tokens))(*tokens)  # the batch only points to it
        batch = llama.llama_batch_get_one(array, len(tokens))
        if llama.llama_decode(context, batch) != 0:
            raise SystemExit("llama.cpp refused the batch")
        llama.llama_get_logits_ith(context, -1)

    for prompt in prompts:
        seconds = []
        for _ in range(2):  # the first pays for what is made on demand
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            at = time.perf_counter()
            run(list(range(prompt)))
            seconds.append(time.perf_counter() - at)
            result.setdefault("first_token_s", time.time() - began)
        result[f"prefill {prompt}"] = prompt / min(seconds)
        at = time.perf_counter()
        for token in range(decoded):
            run([token])
        result[f"decode at {prompt}"] = decoded / (time.perf_counter() - at)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(json.dumps({**result, "peak_mb": int(peak.split()[1]) * 1024 / 1e6}))


if __name__ == "__main__":
    path, threads, decoded, where, *prompts, began = sys.argv[1:]
    main(path, int(threads), int(decoded), where, list(map(int, prompts)), float(began))

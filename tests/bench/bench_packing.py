"""What the ort engine's repacking costs, type by type, beside a copy of the same bytes.

    python -m tests.bench.bench_packing [--types Q4_0 Q4_K …] [--megabytes 96] [--rounds 3]

Packed noise lies in memory; GB/s are of GGUF bytes. "repacked" takes them apart and throws the operands away,
"written" makes files of them, digests included, that are not waited for; both on as many threads as there are
cores, a part each, as loading does. "copy" is numpy's copy of the same bytes on the same threads in the same
round; of the rounds the best counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from omninfer.engines import ort_packed
from omninfer.engines.checks import PackedTensor
from omninfer.engines.fields import Room
from omninfer.engines.ort_engine import cores
from omninfer.engines.ort_weights import ROOM_BYTES, Matrix
from omninfer.testing.noise import NoiseSource
from omnistore.chunker.ggml import GGMLType, by_name, nbytes

KINDS = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4", "F16", "BF16",
)  # fmt: skip
COLUMNS = 4096


class Held:
    """A source of one tensor, in memory."""

    def __init__(self, kind: str, size: int) -> None:
        self.kind = by_name(kind)
        rows = size // nbytes(self.kind, (COLUMNS,))
        noise = NoiseSource({"w": (COLUMNS, rows)}, {"w": kind})
        self.data = np.frombuffer(noise.read("w"), np.uint8)
        tensor = PackedTensor("w", kind, rows, COLUMNS, is_vector=False, nbytes=self.data.size)
        self.matrix = Matrix((tensor,))

    def names(self) -> Collection[str]:
        return ("w",)

    def info(self, name: str) -> tuple[GGMLType, tuple[int, ...]]:
        tensor = self.matrix.tensors[0]
        return self.kind, (tensor.columns, tensor.rows)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        return self.data[start:stop].data


def seconds(work: Callable[[int], object], threads: ThreadPoolExecutor, count: int) -> float:
    """Of `count` threads that do the same work at once."""
    started = time.perf_counter()
    list(threads.map(work, range(count)))
    return time.perf_counter() - started


def measure(kind: str, size: int, rounds: int, directory: Path) -> dict[str, float]:
    """GB/s of all cores."""
    count = cores()
    sources = [Held(kind, size // count) for _ in range(count)]
    copies = [np.zeros_like(source.data) for source in sources]

    def copy(i: int) -> None:
        np.copyto(copies[i], sources[i].data)

    def repack(i: int) -> None:
        sources[i].matrix.repack(sources[i], lambda *_: None, Room(ROOM_BYTES))

    def write(i: int) -> None:
        part = ort_packed.PackedPart("bench", {"w": sources[i].matrix})
        path = directory / f"{i}.ort"
        ort_packed.write(path, part, sources[i])
        path.unlink()  # in the place of another file the next one would be waited for

    best: dict[str, float] = {}
    with ThreadPoolExecutor(count) as threads:
        for _ in range(rounds):
            for name, work in (("copy", copy), ("repacked", repack), ("written", write)):
                rate = sum(source.data.size for source in sources) / 1e9 / seconds(work, threads, count)
                best[name] = max(best.get(name, 0), rate)
    return best


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--types", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--megabytes", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        for kind in options.types:
            best = measure(kind, options.megabytes << 20, options.rounds, Path(directory))
            shown = "  ".join(f"{name} {rate:5.2f}" for name, rate in best.items())
            print(f"{kind:7} {shown} GB/s  of the copy {best['written'] / best['copy']:.2f}", flush=True)


if __name__ == "__main__":
    main()

"""How fast a GGUF is cut and added, as ratios to one-thread BLAKE3 in the same run; how long a header takes.

    python -m tests.bench.bench_cut [MIB]

`omni add` is the whole process, from starting Python, in a new home each time; a copy is on the disk when it
ends. Rounds alternate between cutting and bare hashing, so that busy neighbours slow both; the best of
each counts. Figures are MB/s of 1e6 bytes, from the page cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from omnistore.chunker.cut import cut
from omnistore.chunker.gguf import read_header_untrusted
from omnistore.chunker.join import join_file
from omnistore.chunker.layout import Placement
from omnistore.testing.tiny_gguf import TinyGGUF, TinyTensor, Typed, pseudo_random

MIB = 1 << 20
ROUNDS = 5
TENSOR = 8 * MIB
CUT_TARGET = 0.9
ADD_TARGET = 0.9
COPY_TARGET = 0.5
HEADER_TARGET_SECONDS = 0.15
TOKENS, MERGES = 128_256, 280_147
"""The size of Llama 3's vocabulary."""


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def hash_plainly(path: Path) -> None:
    """The limit: the same bytes through one BLAKE3, read as cutting reads them."""
    total = blake3()
    buffer = memoryview(bytearray(MIB))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total.update(buffer[:count])
    total.digest()


def omni_add(home: Path, path: Path, *options: str) -> float:
    """Seconds of a whole `omni add` in a new home."""
    shutil.rmtree(home, ignore_errors=True)
    command = [sys.executable, "-m", "omnistore.cli.main", "add", "--quiet", *options, str(path)]
    environ = {**os.environ, "OMNI_HOME": str(home)}
    return seconds(lambda: subprocess.run(command, env=environ, stdout=subprocess.DEVNULL, check=True))


def bench_cut(directory: Path, size: int) -> None:
    pool = pseudo_random("bench", TENSOR + size // TENSOR)
    path = directory / "bench.gguf"
    tensors = [
        TinyTensor(f"blk.{n // 8}.w{n % 8}.weight", "I8", (TENSOR,), pool[n : n + TENSOR])
        for n in range(size // TENSOR)
    ]
    path.write_bytes(TinyGGUF(tensors).build())
    total = path.stat().st_size / 1e6
    home = directory / "home"
    hashing, cutting, adding, copying = [], [], [], []
    for _ in range(ROUNDS):
        hashing.append(seconds(lambda: hash_plainly(path)))
        cutting.append(seconds(lambda: cut([path])))
        adding.append(omni_add(home, path))
        copying.append(omni_add(home, path, "--copy"))
    shutil.rmtree(home)
    limit, ours = total / min(hashing), total / min(cutting)
    print(f"one-thread BLAKE3   {limit:7.0f} MB/s")
    print(f"cut in place        {ours:7.0f} MB/s   {ours / limit:.2f} of BLAKE3 (target {CUT_TARGET})")
    for what, taken, target in (
        ("omni add", min(adding), ADD_TARGET),
        ("omni add --copy", min(copying), COPY_TARGET),
    ):
        speed = total / taken
        print(
            f"{what:<19} {speed:7.0f} MB/s   {speed / limit:.2f} of BLAKE3 (target {target})  {taken:.2f} s"
        )

    placements: list[Placement] = []
    cut([path], sink=placements.extend)
    data = memoryview(path.read_bytes())
    blocks = {p.cid: data[p.offset : p.offset + p.size] for p in placements}
    taken = seconds(lambda: join_file(directory / "out.gguf", len(data), placements, blocks.__getitem__))
    print(f"join, fsync         {total / taken:7.0f} MB/s   {total / taken / limit:.2f} of BLAKE3")


def bench_header() -> None:
    data = TinyGGUF(
        (),
        {
            "tokenizer.ggml.tokens": [f"token{n}" for n in range(TOKENS)],
            "tokenizer.ggml.token_type": Typed("i32", [1] * TOKENS),
            "tokenizer.ggml.merges": [f"left{n} right{n}" for n in range(MERGES)],
        },
    ).build()
    best = min(
        seconds(lambda: read_header_untrusted(data, file_size=len(data), name="bench")) for _ in range(ROUNDS)
    )
    print(f"header, 128k tokens {best * 1000:7.0f} ms     (target {HEADER_TARGET_SECONDS * 1000:.0f} ms)")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        bench_cut(Path(name), int(sys.argv[1]) * MIB if len(sys.argv) > 1 else 512 * MIB)
    bench_header()

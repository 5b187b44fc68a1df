"""What this machine can lend: memory that is free, and a speed measured through the engine itself.

The measurement runs one made-up layer for about a tenth of a second. It is a figure for comparing
machines, not a promise: real weights may be of another type. Synchronous: call it from a thread.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from math import ceil
from typing import Final, Literal

import numpy as np
import psutil

from omninfer.arch import EMBEDDING, HEAD_NORM, ModelSpec
from omninfer.engines import Engine, StageSpec
from omninfer.engines.footprint import ORT_RATIO, SLACK, held_bytes
from omninfer.plan import Held
from omninfer.sources import Description
from omnistore.chunker.ggml import GGMLType, by_name, nbytes
from omnistore.chunker.layout import part_of
from omnistore.manifest import PartKey

RESERVE: Final = 512 << 20
"""Bytes of free memory that are never planned away: the interpreter, activations, other programs."""
MEASURE_SECONDS: Final = 0.1
MEASURE_ROUNDS: Final = 50

_METADATA: Final = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 1024,
    "llama.feed_forward_length": 2816,
    "llama.attention.head_count": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 8,
}


def footprint(engine: str) -> float:
    """Bytes of memory per packed byte of a stage of that engine, whatever the types of its weights."""
    return SLACK * ORT_RATIO if engine == "ort" else SLACK


def held(about: Description, engine: str) -> Held | None:
    """What a model's weights take in an engine, by part; None for an engine that is not known here."""
    sizes: dict[PartKey, float] = {}
    for name, (kind, shape) in about.tensors.items():
        part = part_of(name)
        size = held_bytes(engine, kind, shape, head=part.kind == "head")
        if size is None:
            return None
        sizes[part] = sizes.get(part, 0) + SLACK * size

    def total(kind: Literal["embed", "head", "shared"]) -> int:
        return ceil(sizes.get(PartKey(kind), 0))

    layers = tuple(ceil(sizes.get(PartKey("layer", n), 0)) for n in range(about.spec.layers))
    return Held(layers, total("embed"), total("head"), total("shared"))


def free_memory() -> int:
    """Bytes that stages may take on this machine now."""
    return max(0, int(psutil.virtual_memory().available) - RESERVE)


def measure(engine: Engine) -> float:
    """Packed weight bytes a second that `engine` multiplies with one token here."""
    source = _ZeroLayer()
    spec = StageSpec(source.model, 0, 1, embed=False, head=False)
    stage = engine.load(spec, source, context=MEASURE_ROUNDS + 1)
    try:
        token = np.full((1, source.model.width), 0.5, dtype=np.float32)
        stage.forward(token, slot=0, position=0)  # the first call pays for what is made on demand
        rounds, best, ended = 0, float("inf"), time.perf_counter() + MEASURE_SECONDS
        while rounds < MEASURE_ROUNDS and time.perf_counter() < ended:
            rounds += 1
            started = time.perf_counter()
            stage.forward(token, slot=0, position=rounds)
            # The best round: what else the machine was doing then is no property of it.
            best = min(best, time.perf_counter() - started)
        return stage.nbytes / best
    finally:
        stage.close()


class _ZeroLayer:
    """One layer of zeros in F16: 25 MB, more than processors keep in their caches per core."""

    def __init__(self) -> None:
        names = [f"blk.0.{suffix}" for suffix in _suffixes()]
        self.model = ModelSpec.from_metadata_untrusted(_METADATA, [*names, EMBEDDING, HEAD_NORM])
        self._names = names

    def names(self) -> Collection[str]:
        return self._names

    def info(self, name: str) -> tuple[GGMLType, tuple[int, ...]]:
        shape = self.model.tensor_shape(name)
        return by_name("F32" if len(shape) == 1 else "F16"), shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        size = nbytes(*self.info(name))
        return memoryview(bytes((size if stop is None else stop) - start))


def _suffixes() -> tuple[str, ...]:
    norms = ("attn_norm", "ffn_norm")
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    return tuple(f"{name}.weight" for name in norms + matrices)

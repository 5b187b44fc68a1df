"""Models made of noise: any shape, any quantisation, any size, no file.

`noise_model` answers a `ModelSpec` and a `TensorSource` whose weights are seeded random blocks of a sensible
scale, so that activations neither explode nor vanish. The same arguments give the same weights. What such
a model says is noise; that two engines say the same noise is the point.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from math import prod
from typing import Final
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from omninfer.arch import (
    EMBEDDING,
    FAMILIES,
    HEAD,
    HEAD_NORM,
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    Feature,
    ModelSpec,
    layer_suffixes,
)
from omnistore.chunker.ggml import GGMLType, by_name, nbytes

TILE: Final = 4099
"""Blocks of a type that are made; tensors repeat them, each from its own start. Prime, so rows differ."""

# Where the half-precision fields of a block lie, and what they are for weights of standard deviation 1.
_HALVES: Final[Mapping[str, tuple[tuple[int, float], ...]]] = {
    "Q4_0": ((0, 1 / 4.6),),
    "Q4_1": ((0, 1 / 4.6), (2, -7.5 / 4.6)),
    "Q5_0": ((0, 1 / 9.2),),
    "Q5_1": ((0, 1 / 9.2), (2, -15.5 / 9.2)),
    "Q8_0": ((0, 1 / 74),),
    "Q2_K": ((80, 1 / 12), (82, 1.5 / 12)),
    "Q3_K": ((108, 1 / 43),),
    "Q4_K": ((0, 1 / 250), (2, 7.5 / 250)),
    "Q5_K": ((0, 1 / 500), (2, 15.5 / 500)),
    "Q6_K": ((208, 1 / 1360),),
    "IQ4_NL": ((0, 1 / 71),),
    "IQ4_XS": ((0, 1 / 1310),),
    "IQ1_S": ((0, 1 / 8),),
    "IQ2_XXS": ((0, 1 / 60),),
    "IQ2_XS": ((0, 1 / 60),),
    "IQ2_S": ((0, 1 / 60),),
    "IQ3_XXS": ((0, 1 / 150),),
    "IQ3_S": ((0, 1 / 170),),
    "TQ1_0": ((52, 1.2),),
    "TQ2_0": ((64, 0.9),),
}


def _tile(kind: GGMLType, deviation: float) -> NDArray[np.uint8]:
    """`TILE` blocks of a type, [blocks, bytes of a block]."""
    rng = np.random.default_rng(kind.id)
    if kind.name in ("F32", "F16", "BF16"):
        values = (rng.standard_normal((TILE, 1)) * deviation).astype("<f4")
        if kind.name == "F16":
            return values.astype("<f2").view(np.uint8)
        return values.view(np.uint8) if kind.name == "F32" else values.view(np.uint8)[:, 2:].copy()
    blocks = rng.integers(0, 256, (TILE, kind.type_size), dtype=np.uint8)
    spread = rng.uniform(0.5, 1.5, (TILE, 1))
    for offset, factor in _HALVES.get(kind.name, ()):
        blocks[:, offset : offset + 2] = (spread * factor * deviation).astype("<f2").view(np.uint8)
    if kind.name == "MXFP4":  # an exponent instead of a half: 2**(e - 127), of numbers of about 2.4
        blocks[:, 0] = np.round(np.log2(spread[:, 0] * deviation / 2.4)) + 127
    return blocks


_ADDED: Final = ("attn_output.weight", "ffn_down.weight", "ffn_down_exps.weight", "ffn_down_shexp.weight")


class NoiseSource:
    """Random packed tensors; see the module. `types` and `shapes` may be altered to make a faulty source."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> None:
        self.shapes = dict(shapes)
        self.types = dict(types)
        self.metadata: Mapping[str, object] = {}
        """Of the model that `noise_model` made."""
        self.given: dict[str, bytes] = {}
        """Tensors that are not noise, as they are read."""
        self._tiles: dict[tuple[str, float], NDArray[np.uint8]] = {}

    def names(self) -> Collection[str]:
        return self.shapes.keys()

    def info(self, name: str) -> tuple[GGMLType, tuple[int, ...]]:
        return by_name(self.types[name]), self.shapes[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        kind, shape = self.info(name)
        stop = nbytes(kind, shape) if stop is None else stop
        if name in self.given:
            return memoryview(self.given[name])[start:stop]
        if len(shape) == 1 or name.endswith(".bias"):
            return memoryview(self._vector(name, prod(shape)).tobytes())[start:stop]
        tile = self._tile(kind, name)
        first, last = start // kind.type_size, -(-stop // kind.type_size)
        blocks = (np.arange(first, last) + crc32(name.encode())) % TILE
        data = memoryview(tile[blocks].tobytes())
        return data[start - first * kind.type_size : stop - first * kind.type_size]

    def _tile(self, kind: GGMLType, name: str) -> NDArray[np.uint8]:
        # Layers add less than what goes in, as in a trained model: rounding then stays as small as it was.
        deviation = 0.06
        if name == EMBEDDING and HEAD in self.shapes:
            deviation = 0.5
        elif name.endswith(_ADDED):
            deviation = 0.02
        if (kind.name, deviation) not in self._tiles:
            self._tiles[kind.name, deviation] = _tile(kind, deviation)
        return self._tiles[kind.name, deviation]

    def _vector(self, name: str, length: int) -> NDArray[np.float32]:
        rng = np.random.default_rng(crc32(name.encode()))
        if name in (ROPE_FREQS, ROPE_LONG, ROPE_SHORT):
            return rng.uniform(1, 8, length).astype("<f4")
        centre = 0.0 if name.endswith((".bias", "_shexp.weight", "sinks.weight")) else 1.0
        return (centre + 0.2 * rng.standard_normal(length)).astype("<f4")


_EXPERTS: Final = {
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": 512,
}


def noise_model(
    architecture: str = "llama",
    *,
    kind: str | Callable[[str], str] = "F32",
    tied_head: bool = False,
    rope_freqs: bool = False,
    extra: Feature = Feature.NONE,
    **shape: int | float | str | bool | tuple[bool, ...],
) -> tuple[ModelSpec, NoiseSource]:
    """A model of noise. `kind` is the type of every matrix, or says it by name; vectors are F32. `extra` are
    features that the family only sometimes has.

    `shape` overrides metadata, by GGUF key without the architecture and with `__` for `.`:
    `block_count=4, attention__head_count=8, rope__scaling__factor=2.0`.
    """
    small = {
        "block_count": 3,
        "embedding_length": 256,
        "feed_forward_length": 512,
        "context_length": 2048,
        "vocab_size": 320,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    wanted = {
        **small,
        **(_EXPERTS if Feature.EXPERTS in FAMILIES[architecture].always | extra else {}),
        **(
            {"attention.sliding_window": 8}
            if Feature.WINDOW in FAMILIES[architecture].always | FAMILIES[architecture].sometimes
            else {}
        ),
        **{key.replace("__", "."): value for key, value in shape.items()},
    }
    metadata: dict[str, object] = {f"{architecture}.{key}": value for key, value in wanted.items()}
    metadata["general.architecture"] = architecture
    features = FAMILIES[architecture].always | extra
    layers = int(wanted["block_count"])  # type: ignore[arg-type]  # a caller gives an integer
    names = {EMBEDDING, HEAD_NORM} | ({HEAD} if not tied_head else set())
    names |= {ROPE_FREQS} if rope_freqs else set()
    names |= {ROPE_LONG, ROPE_SHORT} if Feature.LONG_ROPE in extra else set()
    names |= {f"blk.{n}.{suffix}" for n in range(layers) for suffix in layer_suffixes(features)}
    spec = ModelSpec.from_metadata_untrusted(metadata, names)
    shapes = {name: spec.tensor_shape(name) for name in sorted(names)}
    of = kind if callable(kind) else lambda name: kind
    # What exporters leave in F32, and llama.cpp wants so: vectors, tables of biases, routers.
    plain = {n for n, s in shapes.items() if len(s) == 1 or n.endswith((".bias", "ffn_gate_inp.weight"))}
    source = NoiseSource(shapes, {n: "F32" if n in plain else of(n) for n in shapes})
    source.metadata = metadata
    return spec, source

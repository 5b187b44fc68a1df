"""What every engine verifies before it touches a weight or a cache, once for all of them.

Tensors come from files that strangers made, and calls come from frames that peers sent: both are
checked here, so that an engine's own code may assume that shapes, types and positions are right.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Final

import numpy as np

from omninfer.arch import Feature, KVKind, ModelSpec
from omninfer.engines.fields import F32, Bytes
from omninfer.engines.interface import (
    Hidden,
    StageSpec,
    TensorSource,
    Tokens,
    WhichLogits,
    tensors_needed,
)
from omninfer.engines.packing import DECODABLE, SUPPORTED, decode
from omnistore.chunker.ggml import nbytes
from omnistore.errors import (
    BadConfig,
    InferenceError,
    InputError,
    LocalProtocolError,
    MalformedGGUF,
    UnsupportedModel,
)

SLAB_BYTES: Final = 8 << 20
"""Packed bytes read at a time while loading: what a tensor takes beside its final form."""
PIECE_BYTES: Final = 32 << 20
"""Most bytes of attention scores of one layer that a forward pass holds at a time."""
MAX_PIECE: Final = 256
"""Most tokens that go through the layers at once: bounds what activations take beside the weights."""


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor that a stage needs, checked against the model."""

    name: str
    kind: str
    """Name of the ggml type, one of those that the engine asked for."""
    rows: int
    """Of a matrix; of a tensor of experts those of all experts, one expert's after the other's."""
    columns: int
    is_vector: bool
    """A norm's weight or a bias; everything else is a matrix."""
    nbytes: int
    start: int = 0
    """Byte of the tensor at which the rows begin: not 0 for a part of one."""

    def part(self, rows: slice) -> PackedTensor:
        """Some rows of a matrix, as a tensor."""
        stride = self.nbytes // self.rows
        count = rows.stop - rows.start
        return replace(self, rows=count, nbytes=count * stride, start=self.start + rows.start * stride)

    def slabs(self, source: TensorSource) -> Iterator[tuple[slice, Bytes]]:
        """The packed rows [rows, bytes of a row], read a slab of `SLAB_BYTES` at a time."""
        stride = self.nbytes // self.rows
        step = max(1, SLAB_BYTES // stride)
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            data = np.frombuffer(
                source.read(self.name, self.start + start * stride, self.start + stop * stride),
                dtype=np.uint8,
            )
            if data.size != (stop - start) * stride:
                raise MalformedGGUF(f"tensor {self.name} ends after {start * stride + data.size} bytes")
            yield slice(start, stop), data.reshape(stop - start, stride)

    def decoded(self, source: TensorSource) -> F32:
        """The whole tensor as float32: [columns] of a vector, [rows, columns] of a matrix."""
        weights = np.empty((self.rows, self.columns), dtype=np.float32)
        for rows, packed in self.slabs(source):
            weights[rows] = decode(self.kind, packed)
        return weights[0] if self.is_vector else weights


def check_features(model: ModelSpec, known: Feature, engine: str) -> None:
    """Refuse a model that needs what an engine has not."""
    lacking = [str(feature.name) for feature in model.features & ~known]
    if lacking:
        raise UnsupportedModel(
            f"the engine {engine} has no {', '.join(lacking)}, which {model.architecture} needs",
            remedy="try --engine numpy",
        )


def check_kv(kind: KVKind, known: Collection[KVKind], engine: str) -> None:
    """Refuse to keep keys and values as an engine can not."""
    if kind not in known:
        raise BadConfig(
            f"the engine {engine} does not keep keys and values as {kind}",
            remedy=f"Leave out --kv {kind}, or take --engine numpy or --engine mlx, which do.",
        )


def check_tensors(
    spec: StageSpec, source: TensorSource, kinds: Collection[str] = SUPPORTED
) -> dict[str, PackedTensor]:
    """Every tensor of a stage with its type (one of `kinds`) and shape verified; reads no weights.

    The largest come first: what an engine holds twice while it repacks a tensor then never comes on top
    of everything else.
    """
    held = source.names()
    tensors = {}
    for name in tensors_needed(spec):
        if name not in held:
            raise MalformedGGUF(f"tensor {name} is missing", remedy="fetch the parts of this stage first")
        kind, shape = source.info(name)
        if kind.name not in kinds:
            elsewhere = " (the engine numpy can)" if kind.name in DECODABLE else ""
            raise UnsupportedModel(
                f"tensor {name} has type {kind.name}, which this engine can not use{elsewhere}",
                remedy=f"supported types: {', '.join(kinds)}",
            )
        expected = spec.model.tensor_shape(name)
        if shape != expected:
            raise MalformedGGUF(f"tensor {name} has shape {shape} instead of {expected}")
        try:
            size = nbytes(kind, shape)
        except ValueError as error:
            raise MalformedGGUF(f"tensor {name}: {error}") from None
        rows = prod(shape[1:])
        tensors[name] = PackedTensor(name, kind.name, rows, shape[0], len(shape) == 1, size)
    return dict(sorted(tensors.items(), key=lambda item: -item[1].nbytes))


@dataclass(frozen=True, slots=True)
class StageLimits:
    """A stage's spec and the bounds of its slots."""

    spec: StageSpec
    context: int
    slots: int

    def __post_init__(self) -> None:
        longest = self.spec.model.context_length
        if not 1 <= self.context <= longest:
            raise InputError(f"a context of {self.context} tokens; this model allows 1 to {longest}")
        if self.slots < 1:
            raise InputError(f"{self.slots} slots; a stage has at least one")

    def check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise InputError(f"slot {slot} is not among the stage's {self.slots}")

    def check_trim(self, length: int, held: int) -> None:
        if not 0 <= length <= held:
            raise InputError(f"can not trim a slot of {held} tokens to {length}")

    def check_call(self, x: Tokens | Hidden, position: int, held: int) -> None:
        """Refuse input that the stage can not append at `position` to a slot that holds `held` tokens."""
        model = self.spec.model
        wanted: tuple[type, int] = (np.int32, 1) if self.spec.embed else (np.float32, 2)
        if x.dtype != wanted[0] or x.ndim != wanted[1]:
            what = "int32[tokens]" if self.spec.embed else "float32[tokens, width]"
            raise InputError(f"the stage takes {what}, not {x.dtype} with {x.ndim} dimensions")
        if not self.spec.embed and x.shape[1] != model.width:
            raise InputError(f"hidden states are {x.shape[1]} wide; the model's are {model.width}")
        if len(x) < 1:
            raise InputError("there are no tokens")
        if self.spec.embed and not 0 <= int(x.min()) <= int(x.max()) < model.vocab:
            raise InputError(f"a token is not in the vocabulary of {model.vocab}")
        if position != held:
            raise LocalProtocolError(f"tokens for position {position} of a slot that holds {held}")
        if held + len(x) > self.context:
            raise InferenceError(
                f"{held} + {len(x)} tokens do not fit into the context of {self.context}",
                remedy="shorten the prompt or ask for fewer tokens",
            )

    def pieces(self, count: int, held: int) -> Iterator[slice]:
        """How to cut `count` new tokens so that no layer's attention scores outgrow `PIECE_BYTES`."""
        per_token = 4 * self.spec.model.heads * (held + count)
        piece = max(1, min(MAX_PIECE, PIECE_BYTES // per_token))
        for start in range(0, count, piece):
            yield slice(start, min(start + piece, count))

    def head_rows(self, which: WhichLogits, piece: slice, count: int) -> slice:
        """The rows of a piece whose logits were asked for."""
        if which == "all":
            return slice(0, piece.stop - piece.start)
        if which == "last" and piece.stop == count:
            return slice(piece.stop - piece.start - 1, piece.stop - piece.start)
        return slice(0, 0)

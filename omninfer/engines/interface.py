"""The seam between the pipeline and whatever multiplies matrices: sources, engines, stages.

An `Engine` turns a `StageSpec` and a `TensorSource` into a `Stage`; a stage turns tokens or hidden
states into hidden states or logits and keeps one KV cache per slot. Nothing here knows about
tokenizers, sampling, peers or files, and importing this module imports no engine.

A stage is synchronous and is called by one thread at a time, though not always by the same one.
`omninfer.testing.engine_contract` is the contract as code: every engine passes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from omninfer.arch import EMBEDDING, HEAD_NORM, Feature, KVKind, ModelSpec
from omnistore.chunker.ggml import GGMLType
from omnistore.errors import InputError

Tokens = NDArray[np.int32]
Hidden = NDArray[np.float32]
"""[tokens, width]"""
Logits = NDArray[np.float32]
"""[1 or tokens, vocab]"""
WhichLogits = Literal["last", "all", "none"]
Progress = Callable[[int, int], None]
"""Called with (bytes loaded, bytes in all) while a stage loads."""


class TensorSource(Protocol):
    """Where a stage's weights come from: packed GGUF tensors by name."""

    def names(self) -> Collection[str]:
        """The tensors that can be read here."""

    def info(self, name: str) -> tuple[GGMLType, tuple[int, ...]]:
        """Type and shape, ne[0] (the input dimension of a matrix) first."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        """Bytes [start, stop) of a tensor's packed data, or all of it.

        Engines ask for a few MiB at a time, in order, and drop each view before they ask for the next,
        so that no tensor is in memory twice.
        """


@runtime_checkable
class TracedSource(TensorSource, Protocol):
    """A source that knows its tensors' origin, so that what an engine makes of them can be kept."""

    packed: Path | None
    """The directory for it; None to keep nothing."""

    def origin(self, name: str) -> str | None:
        """What names the bytes of the tensor and its neighbours for ever: their part's CID, if known."""


@dataclass(frozen=True, slots=True)
class StageSpec:
    """A contiguous range of a model's layers, perhaps with its embedding or its head."""

    model: ModelSpec
    first: int
    last: int
    """Exclusive: the stage holds layers first … last-1; first == last holds none."""
    embed: bool
    head: bool

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last <= self.model.layers:
            raise InputError(f"layers {self.first} to {self.last} are not among {self.model.layers}")
        if self.embed and self.first != 0:
            raise InputError(f"a stage with the embedding starts at layer 0, not {self.first}")
        if self.head and self.last != self.model.layers:
            raise InputError(f"a stage with the head ends at layer {self.model.layers}, not {self.last}")
        if self.first == self.last and not (self.embed or self.head):
            raise InputError("a stage holds at least one layer, the embedding or the head")

    @classmethod
    def whole(cls, model: ModelSpec) -> StageSpec:
        return cls(model, 0, model.layers, embed=True, head=True)


def tensors_needed(spec: StageSpec) -> tuple[str, ...]:
    """The tensors that a stage reads, in the order in which it reads them; none twice."""
    model = spec.model
    names: list[str] = []
    if spec.embed:
        names.append(EMBEDDING)
    if spec.first < spec.last:
        names.extend(model.model_tensors())
    suffixes = model.layer_suffixes()
    names.extend(f"blk.{n}.{suffix}" for n in range(spec.first, spec.last) for suffix in suffixes)
    if spec.head:
        names.append(HEAD_NORM)
        if model.head_tensor not in names:
            names.append(model.head_tensor)
    return tuple(names)


class Stage(Protocol):
    """A loaded stage. Slots are numbered 0 … slots-1; a slot that was never fed has length 0."""

    @property
    def spec(self) -> StageSpec: ...

    @property
    def nbytes(self) -> int:
        """Packed size of the weights held, as they lie in the GGUF file."""

    def forward(
        self, x: Tokens | Hidden, *, slot: int, position: int, logits: WhichLogits = "last"
    ) -> Hidden | Logits:
        """Append `x` to `slot`; answer its hidden states or, from a stage with the head, logits.

        `x` is int32[n] with the embedding, else float32[n, width]. `logits` counts only with the head:
        "last" answers [1, vocab], "all" [n, vocab], "none" [0, vocab]. Raises `LocalProtocolError` if
        `position` is not the slot's length, `InputError` for a bad slot, shape, type or token,
        `InferenceError` when the slot would grow past the context. A call that raised changed nothing.
        """

    def length(self, slot: int) -> int:
        """Tokens held in the slot's cache."""

    def cache_bytes(self, slot: int) -> int:
        """Memory of a slot's keys and values; it grows in steps, and shrinks when the slot is emptied."""

    def trim(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot."""

    def fork(self, src: int, dst: int, length: int | None = None) -> None:
        """Make slot `dst` continue from the first `length` tokens of `src`, or all of them.

        Whatever `dst` held is dropped. Raises `InputError` if `src` holds fewer.
        """

    def drop(self, slot: int) -> None:
        """Empty a slot and free its memory."""

    def close(self) -> None:
        """Free everything; any other call is an error afterwards. May be repeated."""


class Engine(Protocol):
    """One way of computing."""

    @property
    def name(self) -> str: ...

    @property
    def features(self) -> Feature:
        """What it knows of transformer blocks; `load` refuses a model with more."""

    @property
    def kv_kinds(self) -> tuple[KVKind, ...]:
        """How it can keep keys and values; `load` refuses any other."""

    def unavailable(self) -> str | None:
        """Why this engine can not run on this machine, or None if it can."""

    def accelerated(self) -> bool:
        """Whether it would run on a GPU here; asked only of an available engine."""

    def load(
        self,
        spec: StageSpec,
        source: TensorSource,
        *,
        context: int,
        slots: int = 1,
        kv: KVKind = "full",
        progress: Progress | None = None,
    ) -> Stage:
        """Read the stage's tensors and be ready to run.

        `context` is the most tokens a slot may hold, `kv` how its keys and values are kept. Raises
        `UnsupportedModel` naming the tensor whose type the engine lacks, `MalformedGGUF` naming one of the
        wrong shape or size, `BadConfig` for a `kv` that the engine has not.
        """

"""The ort engine: ONNX Runtime on CPUs, with weights multiplied as they are packed.

Activations are float32 between products and 8 bits inside them (MatMulNBits, accuracy level 4); keys and
values are float32, in buffers of the whole context that attention writes in place. Their pages cost
memory only once they were written. The embedding's rows are decoded here, from their packed form.

All segments of all stages share one pool of threads, so that two stages in one process do not take each
other's cores. No GPU; no batching over slots. Importing this module imports onnxruntime.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any, Final

import numpy as np
import onnxruntime as ort

from omninfer.arch import EMBEDDING, Feature, KVKind
from omninfer.engines.checks import PackedTensor, StageLimits, check_features, check_kv, check_tensors
from omninfer.engines.interface import (
    Engine,
    Hidden,
    Logits,
    Progress,
    StageSpec,
    TensorSource,
    Tokens,
    WhichLogits,
)
from omninfer.engines.numpy_math import rope_angles
from omninfer.engines.ort_graph import ROPE_TABLES, Graph, padded_head, rope_tables
from omninfer.engines.packing import F32, Bytes, decode
from omninfer.engines.slots import SlottedStage

FEATURES: Final = (
    Feature.QKV_BIAS
    | Feature.OUTPUT_BIAS
    | Feature.QK_NORM
    | Feature.FFN_BIAS
    | Feature.ROPE_FREQS
    | Feature.NORM_AFTER_ATTENTION
)
"""What this engine knows of transformer blocks."""
SEGMENT_BYTES: Final = 24 << 20
"""Packed weights of one graph, at least one layer: in memory twice while it loads, in each loading thread."""
LOADERS: Final = 2
"""Segments that load at a time; more would hold more weights twice."""
Value = Any
"""onnxruntime.OrtValue; the library ships no types."""


@cache
def cores() -> int:
    """Cores that this process may use. The threads and the scratch memory that all sessions share are made
    here, once: an arena for each session would keep the largest prompt's activations once for each."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ort.set_global_thread_pool_sizes(count, 1)
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(info, ort.OrtArenaCfg(0, -1, -1, -1))
    return count


@dataclass(frozen=True, slots=True)
class Segment:
    """The session of layers first … last-1."""

    first: int
    last: int
    session: Any


@dataclass(slots=True)
class SlotCache:
    """Keys and values of one slot: per layer [1, kv heads, context, head dim], bound to the sessions."""

    arrays: list[tuple[F32, F32]]
    bindings: list[Any]
    """One for each segment; keeps the buffers bound."""
    length: int = 0
    make: Callable[[], SlotCache] | None = None

    @property
    def nbytes(self) -> int:
        """Of the whole context: pages that were not written yet take no memory."""
        return sum(array.nbytes for pair in self.arrays for array in pair)

    def copy(self, length: int) -> SlotCache:
        assert self.make is not None
        new = self.make()
        for old, mine in zip(self.arrays, new.arrays, strict=True):
            for source, target in zip(old, mine, strict=True):
                target[:, :, :length] = source[:, :, :length]
        new.length = length
        return new


@dataclass(slots=True)
class OrtStage(SlottedStage[SlotCache]):
    """A stage of the ort engine."""

    segments: list[Segment]
    heads: list[Any]
    """Sessions of neighbouring rows of the head, in order."""
    embedding: tuple[str, Bytes] | None
    nbytes: int

    def forward(
        self, x: Tokens | Hidden, *, slot: int, position: int, logits: WhichLogits = "last"
    ) -> Hidden | Logits:
        held = self.length(slot)
        self.limits.check_call(x, position, held)
        slots = self._caches.get(slot) or self._empty()
        outputs = []
        for piece in self.limits.pieces(len(x), held):
            h = self._layers(self._enter(x[piece]), slots, held + piece.start)
            if self.spec.head:
                h = self._head(h[self.limits.head_rows(logits, piece, len(x))])
            outputs.append(h)
        slots.length = held + len(x)
        self._caches[slot] = slots
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def close(self) -> None:
        self._close_slots()
        self.segments.clear()
        self.heads.clear()
        self.embedding = None

    def _enter(self, x: Tokens | Hidden) -> F32:
        if self.embedding is None:
            return np.ascontiguousarray(x, dtype=np.float32)
        kind, packed = self.embedding
        return decode(kind, packed[x]) * np.float32(self.spec.model.embedding_scale)

    def _layers(self, h: F32, slots: SlotCache, start: int) -> F32:
        """Tokens start, start+1, … of a slot through all layers."""
        if not self.segments:
            return h
        total = start + len(h)
        last, whole = _value(np.array([total - 1], np.int32)), _value(np.array([total], np.int32))
        x = _value(h[None])
        for segment, binding in zip(self.segments, slots.bindings, strict=True):
            binding.bind_ortvalue_input("x", x)
            binding.bind_ortvalue_input("last", last)
            binding.bind_ortvalue_input("total", whole)
            binding.bind_output("y", "cpu")
            segment.session.run_with_iobinding(binding)
            x = binding.get_outputs()[-1]
        out: F32 = x.numpy()[0]
        return out

    def _head(self, h: F32) -> F32:
        if not len(h):
            return np.zeros((0, self.spec.model.vocab), np.float32)
        logits: F32 = np.concatenate([head.run(["y"], {"x": h[None]})[0][0] for head in self.heads], axis=1)
        cap = np.float32(self.spec.model.logit_cap)
        return cap * np.tanh(logits / cap) if cap else logits

    def _empty(self) -> SlotCache:
        model = self.spec.model
        shape = (1, model.kv_heads, self.limits.context, padded_head(model))
        layers = range(self.spec.last - self.spec.first)
        arrays = [(np.zeros(shape, np.float32), np.zeros(shape, np.float32)) for _ in layers]
        bindings = []
        for segment in self.segments:
            binding = segment.session.io_binding()
            for n in range(segment.first, segment.last):
                for kind, array in zip(("keys", "values"), arrays[n - self.spec.first], strict=True):
                    value = _value(array)
                    binding.bind_ortvalue_input(f"blk.{n}.past_{kind}", value)
                    binding.bind_ortvalue_output(f"blk.{n}.{kind}", value)
            bindings.append(binding)
        return SlotCache(arrays, bindings, make=self._empty)


def _value(array: Any) -> Value:
    """The same memory as an OrtValue, which keeps the array alive."""
    return ort.OrtValue.ortvalue_from_numpy(array)


class OrtEngine:
    """See the module."""

    name = "ort"
    features = FEATURES
    kv_kinds: tuple[KVKind, ...] = ("full",)

    def unavailable(self) -> str | None:
        return None

    def accelerated(self) -> bool:
        return False

    def load(
        self,
        spec: StageSpec,
        source: TensorSource,
        *,
        context: int,
        slots: int = 1,
        kv: KVKind = "full",
        progress: Progress | None = None,
    ) -> OrtStage:
        limits = StageLimits(spec, context, slots)
        check_features(spec.model, FEATURES, self.name)
        check_kv(kv, self.kv_kinds, self.name)
        tensors = check_tensors(spec, source)
        return _Loading(limits, tensors, source, progress).stage()


class _Loading:
    """One stage being loaded."""

    def __init__(
        self,
        limits: StageLimits,
        tensors: dict[str, PackedTensor],
        source: TensorSource,
        progress: Progress | None,
    ) -> None:
        self._limits = limits
        self._tensors = tensors
        self._source = source
        self._progress = progress
        self._total = sum(t.nbytes for t in tensors.values())
        self._done = 0
        self._lock = Lock()
        self._vectors = {name: t.decoded(source) for name, t in tensors.items() if t.is_vector}
        rope = limits.spec.model.rope
        divisors = rope.divisors(limits.context)
        angles = rope_angles(rope, 0, limits.context, self._vectors.get(divisors or ""))
        self._tables = rope_tables(rope, angles)

    def stage(self) -> OrtStage:
        spec = self._limits.spec
        cores()
        self._loaded([name for name, tensor in self._tensors.items() if tensor.is_vector])
        embedding = self._embedding() if spec.embed else None
        with ThreadPoolExecutor(LOADERS, thread_name_prefix="ort-load") as pool:
            heads = list(pool.map(self._head, self._head_cuts()))
            segments = list(pool.map(self._segment, self._cuts()))
        if spec.head and not (spec.embed and spec.model.tied_head):
            self._loaded([spec.model.head_tensor])
        return OrtStage(self._limits, segments, heads, embedding, self._total)

    def _head_cuts(self) -> list[slice]:
        """Rows of the head in runs of about `SEGMENT_BYTES`; none without a head."""
        if not self._limits.spec.head:
            return []
        tensor = self._tensors[self._limits.spec.model.head_tensor]
        step = max(1, SEGMENT_BYTES * tensor.rows // tensor.nbytes)
        return [slice(at, min(at + step, tensor.rows)) for at in range(0, tensor.rows, step)]

    def _cuts(self) -> list[tuple[int, int]]:
        """Runs of layers of about `SEGMENT_BYTES`, none empty."""
        spec, cuts, size = self._limits.spec, [], 0
        first = spec.first
        for n in range(spec.first, spec.last):
            own = sum(self._tensors[name].nbytes for name in self._of_layers(n, n + 1))
            if size and size + own > SEGMENT_BYTES:
                cuts.append((first, n))
                first, size = n, 0
            size += own
        return [*cuts, (first, spec.last)] if first < spec.last else cuts

    def _of_layers(self, first: int, last: int) -> list[str]:
        suffixes = self._limits.spec.model.layer_suffixes()
        return [f"blk.{n}.{suffix}" for n in range(first, last) for suffix in suffixes]

    def _embedding(self) -> tuple[str, Bytes]:
        tensor = self._tensors[EMBEDDING]
        packed = np.empty((tensor.rows, tensor.nbytes // tensor.rows), dtype=np.uint8)
        for rows, slab in tensor.slabs(self._source):
            packed[rows] = slab
        self._loaded([EMBEDDING])
        return tensor.kind, packed

    def _segment(self, cut: tuple[int, int]) -> Segment:
        graph = self._graph()
        session = self._session(graph, graph.layers(*cut), rope=True)
        self._loaded([name for name in self._of_layers(*cut) if not self._tensors[name].is_vector])
        return Segment(*cut, session)

    def _head(self, rows: slice) -> Any:
        graph = self._graph()
        return self._session(graph, graph.head(rows), rope=False)

    def _graph(self) -> Graph:
        return Graph(
            self._limits.spec.model,
            self._limits.context,
            self._tensors,
            self._source,
            self._vectors,
            self._tables[0],
        )

    def _session(self, graph: Graph, model: bytes, *, rope: bool) -> Any:
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.add_session_config_entry("session.use_env_allocators", "1")
        # The graphs are fused as they are made; folding would only take time and memory.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.log_severity_level = 3
        # Weights come and go with a session: the arena would keep what one no longer needs.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        names = [*graph.external, *(ROPE_TABLES if rope else ())]
        values = [_value(array) for array in graph.external.values()] + (
            [_value(table) for table in self._tables] if rope else []
        )
        options.add_external_initializers(names, values)
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def _loaded(self, names: Sequence[str]) -> None:
        with self._lock:
            self._done += sum(self._tensors[name].nbytes for name in names)
            if self._progress is not None and names:
                self._progress(self._done, self._total)


def engine() -> Engine:
    return OrtEngine()

"""The ort engine: ONNX Runtime on CPUs, with weights multiplied as they are packed.

Activations are float32 between products and 8 bits inside them (MatMulNBits, accuracy level 4); keys and
values are float32, in buffers of the whole context that attention writes in place. Their pages cost
memory only once they were written. The embedding's rows are decoded here, from their packed form.
Weights come out of files that are mapped while they load (`ort_packed`).

All segments of all stages share one pool of threads, so that two stages in one process do not take each
other's cores. No GPU; no batching over slots. Importing this module imports onnxruntime.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from threading import Lock
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from omninfer.arch import EMBEDDING, Feature, KVKind
from omninfer.engines.checks import PackedTensor, StageLimits, check_features, check_kv, check_tensors
from omninfer.engines.fields import F32, Bytes
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
from omninfer.engines.numpy_math import rope_angles, route
from omninfer.engines.ort_graph import Graph, head_part, layer_part, padded_head, rope_names, rope_tables
from omninfer.engines.ort_packed import PackedFolder
from omninfer.engines.packing import decode
from omninfer.engines.slots import SlottedStage
from omnistore.errors import InferenceError, StoreFull

FEATURES: Final = ~Feature.NONE
"""What this engine knows of transformer blocks."""
LOADERS: Final = 2
"""Runs of layers that load at a time: ONNX Runtime packs with one thread."""
RUNS: Final = 4
"""Graphs that the layers are cut into. What a graph has mapped can be let go of only when all of it was
loaded; each costs 50 microseconds a token."""
_FOLDER: Final = "session.model_external_initializers_file_folder_path"
_FAILURES: Final = (ort_state.Fail, ort_state.NoSuchFile, ort_state.RuntimeException, MemoryError)
"""What a session raises that memory, mappings or files run out for; anything else is a mistake of ours."""
_log = logging.getLogger(__name__)
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
    experts: list[Any]
    """Sessions of the experts of `first`, the only layer then."""
    held: dict[str, Value]
    """What the session reads without owning it."""


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
    head: Segment | None
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
        self.head = None
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
            outputs = ("y", "normed", "routed") if segment.experts else ("y",)
            for name in outputs:
                binding.bind_output(name, "cpu")
            segment.session.run_with_iobinding(binding)
            x, *routing = binding.get_outputs()[-len(outputs) :]
            if segment.experts:
                h = self._through_experts(segment, *(one.numpy()[0] for one in (x, *routing)))
                x = _value(h[None])
        # An array over memory that `x` owns, or only shows where it was made of one.
        out: F32 = h if self.segments[-1].experts else x.numpy()[0]
        return out

    def _through_experts(self, segment: Segment, h: F32, normed: F32, routed: F32) -> F32:
        """h with what the experts that the router picked say of each token."""
        assert self.spec.model.experts is not None
        chosen, weights = route(routed, self.spec.model.experts)
        out = h.copy()
        for expert in np.unique(chosen):
            tokens, place = np.nonzero(chosen == expert)
            answer = segment.experts[expert].run(["y"], {"x": normed[tokens][None]})[0][0]
            out[tokens] += answer * weights[tokens, place, None]
        return out

    def _head(self, h: F32) -> F32:
        if not len(h):
            return np.zeros((0, self.spec.model.vocab), np.float32)
        assert self.head is not None
        logits: F32 = self.head.session.run(["y"], {"x": h[None]})[0][0]
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
        folder = PackedFolder(source)
        try:
            return _Loading(limits, tensors, source, folder, progress).stage()
        except StoreFull as error:
            if not folder.kept:
                raise
            _log.warning("%s; nothing is kept for the next start", error.message)
        folder = PackedFolder(source, keep=False)
        return _Loading(limits, tensors, source, folder, progress).stage()


class _Loading:
    """One stage being loaded."""

    def __init__(
        self,
        limits: StageLimits,
        tensors: dict[str, PackedTensor],
        source: TensorSource,
        folder: PackedFolder,
        progress: Progress | None,
    ) -> None:
        self._limits = limits
        self._tensors = tensors
        self._source = source
        self._progress = progress
        self._total = sum(t.nbytes for t in tensors.values())
        self._done = 0
        self._lock = Lock()
        small = [name for name, t in tensors.items() if t.is_vector or name.endswith("_exps.bias")]
        self._vectors = {name: tensors[name].decoded(source) for name in small}
        self._tables: dict[str, F32] = {}
        model = limits.spec.model
        for windowed in sorted({model.windowed[n] for n in range(limits.spec.first, limits.spec.last)}):
            rope = model.local_rope if windowed else model.rope
            divisors = rope.divisors(limits.context)
            angles = rope_angles(rope, 0, limits.context, self._vectors.get(divisors or ""))
            self._tables |= zip(rope_names(windowed), rope_tables(rope, angles), strict=True)
        self._folder = folder

    def stage(self) -> OrtStage:
        spec = self._limits.spec
        cores()
        self._loaded(self._vectors.keys())
        embedding = self._embedding() if spec.embed else None
        with closing(self._folder), ThreadPoolExecutor(LOADERS, thread_name_prefix="ort-load") as pool:
            # The head first: its matrices are the largest, and in memory twice for a moment.
            loads = [pool.submit(self._head)] if spec.head else []
            loads += [pool.submit(self._segment, *run) for run in self._runs()]
            segments = [load.result() for load in loads]
        head = segments.pop(0) if spec.head else None
        return OrtStage(self._limits, segments, head, embedding, self._total)

    def _runs(self) -> list[tuple[int, int]]:
        """The layers in `RUNS` runs, as even as they can be, none empty; each alone where it has experts."""
        first, count = self._limits.spec.first, self._limits.spec.last - self._limits.spec.first
        runs = RUNS if self._limits.spec.model.experts is None else max(1, count)
        edges = [first + count * i // runs for i in range(runs + 1)]
        return [(a, b) for a, b in pairwise(edges) if a < b]

    def _embedding(self) -> tuple[str, Bytes]:
        tensor = self._tensors[EMBEDDING]
        packed = np.empty((tensor.rows, tensor.nbytes // tensor.rows), dtype=np.uint8)
        for rows, slab in tensor.slabs(self._source):
            packed[rows] = slab
        self._loaded([EMBEDDING])
        return tensor.kind, packed

    def _segment(self, first: int, last: int) -> Segment:
        model, run = self._limits.spec.model, f"layers-{first}"
        windowed = {model.windowed[n] for n in range(first, last)}
        held = {name: _value(self._tables[name]) for one in windowed for name in rope_names(one)}
        parts = {}
        for n in range(first, last):
            part = layer_part(model, self._tensors, n)
            parts[n] = part, self._folder.ready(part, run)
            self._loaded({tensor.name for matrix in part.matrices.values() for tensor in matrix.tensors})
        pairs = next(iter(self._tables.values())).shape[1]
        graph = Graph(model, self._limits.context, self._vectors, pairs).layers(parts)
        session = self._session(graph, run, held)
        experts = []
        for e in range(model.experts.count if model.experts is not None else 0):
            graph = Graph(model, 0, self._vectors).expert(first, e, *parts[first])
            experts.append(self._session(graph, run, {}))
        self._folder.let_go(run)
        return Segment(first, last, session, experts, held)

    def _head(self) -> Segment:
        spec = self._limits.spec
        part = head_part(spec.model, self._tensors)
        file = self._folder.ready(part, "head")
        session = self._session(Graph(spec.model, 0, self._vectors).head(part, file), "head", {})
        self._folder.let_go("head")
        if not (spec.embed and spec.model.tied_head):
            self._loaded([spec.model.head_tensor])
        return Segment(spec.last, spec.last, session, [], {})

    def _session(self, model: bytes, run: str, held: dict[str, Value]) -> Any:
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.add_session_config_entry("session.use_env_allocators", "1")
        # The graphs are fused as they are made; folding would only take time and memory.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.log_severity_level = 3
        # Weights come and go with a session: the arena would keep what one no longer needs.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        options.add_session_config_entry(_FOLDER, str(self._folder.path / run))
        if held:
            options.add_external_initializers(list(held), list(held.values()))
        try:
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except _FAILURES as error:
            raise InferenceError(
                f"ONNX Runtime can not load {run}: {error}", remedy="try again, or --engine numpy"
            ) from error

    def _loaded(self, names: Collection[str]) -> None:
        with self._lock:
            self._done += sum(self._tensors[name].nbytes for name in names)
            if self._progress is not None and names:
                self._progress(self._done, self._total)


def engine() -> Engine:
    return OrtEngine()

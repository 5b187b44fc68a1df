"""The ONNX graphs of a stage: a run of transformer blocks, and the head.

A stage is cut into segments, one graph each, of whole layers and about `ort_engine.SEGMENT_BYTES`: while ONNX
Runtime makes its own copy of the weights, only that much is in memory twice. Per layer: norm, one product
for Q, K and V, attention with its rotation inside, one product out, norm with the residual's sum, one
product for gate and up, one down. Weights are external initializers, so the graphs themselves are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from omninfer.arch import HEAD_NORM, Feature, ModelSpec, Rope, RopeKind
from omninfer.engines.checks import PackedTensor
from omninfer.engines.interface import TensorSource
from omninfer.engines.ort_weights import Form, Operands, load_operands
from omninfer.engines.packing import F32
from omnistore.errors import UnsupportedModel

_MICROSOFT: Final = "com.microsoft"
_OPSETS: Final = (("", 21), (_MICROSOFT, 1))
_IR_VERSION: Final = 10
_TYPES: Final = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}
ROPE_TABLES: Final = ("rope.cos", "rope.sin")
HEAD_STEP: Final = 16
"""GroupQueryAttention takes heads of multiples of this; zeros fill up others, and change nothing."""


def padded_head(model: ModelSpec) -> int:
    """Elements of a head in attention and in the caches."""
    return -(-model.head_dim // HEAD_STEP) * HEAD_STEP


def rope_tables(rope: Rope, angles: F32) -> tuple[F32, F32]:
    """Cosines and sines [context, pairs] as attention takes them, from the angles of all pairs.

    It wants a multiple of eight pairs. Where neighbours rotate together, pairs that do not turn are added;
    where halves do, more pairs would be other halves: such a model is refused with `UnsupportedModel`.
    """
    missing = -angles.shape[1] % (HEAD_STEP // 2)
    if missing and rope.kind is not RopeKind.INTERLEAVED:
        raise UnsupportedModel(
            f"a rotation of {rope.dims} elements, which ONNX Runtime's attention does not have",
            remedy="try --engine numpy",
        )
    wide = np.pad(angles, ((0, 0), (0, missing)))
    magnitude = np.float32(rope.magnitude)
    return magnitude * np.cos(wide), magnitude * np.sin(wide)


@dataclass(slots=True)
class Graph:
    """A graph under construction."""

    model: ModelSpec
    context: int
    tensors: dict[str, PackedTensor]
    source: TensorSource
    vectors: dict[str, F32]
    rope: F32
    """One of the rope tables, for its shape."""
    external: dict[str, NDArray[Any]] = field(default_factory=dict)
    """Initializers that go to the session beside the graph."""
    _nodes: list[Any] = field(default_factory=list)
    _initializers: list[Any] = field(default_factory=list)
    _inputs: list[Any] = field(default_factory=list)
    _outputs: list[Any] = field(default_factory=list)

    def layers(self, first: int, last: int) -> bytes:
        """x → y, both [1, tokens, width], through layers first … last-1; the model, serialised."""
        self._input("x", TensorProto.FLOAT, [1, "tokens", self.model.width])
        self._input("last", TensorProto.INT32, [1])
        self._input("total", TensorProto.INT32, [1])
        for name in ROPE_TABLES:
            self._external(name, self.rope, held=False)
        h = "x"
        for n in range(first, last):
            h = self._layer(n, h)
        self._op("Identity", [h], "y")
        self._output("y", [1, "tokens", self.model.width])
        return self._serialised()

    def head(self, rows: slice) -> bytes:
        """x [1, rows, width] → y [1, rows, those of the vocabulary]."""
        self._input("x", TensorProto.FLOAT, [1, "rows", self.model.width])
        normed = self._norm("head.norm", "x", HEAD_NORM)
        matrix = load_operands([self.tensors[self.model.head_tensor].part(rows)], self.source)
        logits = self._multiply("head", normed, matrix)
        self._op("Identity", [logits], "y")
        self._output("y", [1, "rows", rows.stop - rows.start])
        return self._serialised()

    def _layer(self, n: int, h: str) -> str:
        at, model = f"blk.{n}.", self.model
        x = self._norm(at + "normed", h, at + "attn_norm.weight")
        names = [at + f"attn_{part}" for part in "qkv"]
        qkv = self._linear(at + "qkv", x, names)
        mixed = self._attention(n, qkv)
        out = self._linear(at + "out", mixed, [at + "attn_output"])
        x, h = self._residual_norm(at, out, h)
        both = self._linear(at + "gate_up", x, [at + "ffn_gate", at + "ffn_up"])
        gate, up = self._split(at + "ffn", both, [model.ffn_width, model.ffn_width])
        gate = self._op("QuickGelu", [gate], at + "silu", domain=_MICROSOFT, alpha=1.0)
        gated = self._op("Mul", [gate, up], at + "gated")
        down = self._linear(at + "down", gated, [at + "ffn_down"])
        return self._op("Add", [h, down], at + "y")

    def _residual_norm(self, at: str, out: str, h: str) -> tuple[str, str]:
        """The norm of out + h, and out + h itself."""
        names = [at + "ffn_normed", "", "", at + "residual"]
        self._nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [out, h, self._vector(at + self.model.ffn_norm)],
                names,
                domain=_MICROSOFT,
                epsilon=self.model.norm_eps,
            )
        )
        return names[0], names[3]

    def _attention(self, n: int, qkv: str) -> str:
        at, model = f"blk.{n}.", self.model
        normed, padded = Feature.QK_NORM in model.features, padded_head(model) != model.head_dim
        inputs = [qkv, "", ""]
        if normed or padded:
            inputs = self._split(at + "qkv", qkv, [model.q_width, model.kv_width, model.kv_width])
        if normed:
            inputs[:2] = [self._head_norm(at, part, x) for part, x in zip("qk", inputs[:2], strict=True)]
        if padded:
            inputs = [self._padded(f"{at}{part}_wide", x) for part, x in zip("qkv", inputs, strict=True)]
        cache = [1, model.kv_heads, self.context, padded_head(model)]
        for kind in ("keys", "values"):
            self._input(at + "past_" + kind, TensorProto.FLOAT, cache)
            self._output(at + kind, cache)
        self._nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [*inputs, at + "past_keys", at + "past_values", "last", "total", *ROPE_TABLES],
                [at + "mixed", at + "keys", at + "values"],
                domain=_MICROSOFT,
                num_heads=model.heads,
                kv_num_heads=model.kv_heads,
                scale=model.attention_scale,
                do_rotary=1,
                rotary_interleaved=int(model.rope.kind is RopeKind.INTERLEAVED),
            )
        )
        return self._narrowed(at + "narrow", at + "mixed") if padded else at + "mixed"

    def _padded(self, to: str, x: str) -> str:
        missing = padded_head(self.model) - self.model.head_dim
        heads = self._op("Reshape", [x, self._integers([1, 0, -1, self.model.head_dim])], to + ".heads")
        wide = self._op("Pad", [heads, self._integers([0, 0, 0, 0, 0, 0, 0, missing])], to + ".zeros")
        return self._op("Reshape", [wide, self._integers([1, 0, -1])], to)

    def _narrowed(self, to: str, x: str) -> str:
        heads = self._op("Reshape", [x, self._integers([1, 0, -1, padded_head(self.model)])], to + ".heads")
        bounds = [self._integers([n]) for n in (0, self.model.head_dim, 3)]
        return self._op(
            "Reshape", [self._op("Slice", [heads, *bounds], to + ".cut"), self._integers([1, 0, -1])], to
        )

    def _head_norm(self, at: str, part: str, x: str) -> str:
        """Each head of x [1, tokens, heads * head dim] normed by itself."""
        name = at + part + "_norm"
        split = self._op("Reshape", [x, self._integers([1, 0, -1, self.model.head_dim])], name + ".heads")
        # ONNX counts dimension 1 as 0 here: "as it was", the tokens.
        normed = self._norm(name + ".normed", split, f"{at}attn_{part}_norm.weight")
        return self._op("Reshape", [normed, self._integers([1, 0, -1])], name)

    def _linear(self, to: str, x: str, names: Sequence[str]) -> str:
        """The outputs of several matrices side by side, with their biases."""
        y = self._product(to, x, [name + ".weight" for name in names])
        biases = [self.vectors.get(name + ".bias") for name in names]
        if all(bias is None for bias in biases):
            return y
        whole = [
            np.zeros(self.tensors[name + ".weight"].rows, np.float32) if bias is None else bias
            for name, bias in zip(names, biases, strict=True)
        ]
        return self._op("Add", [y, self._constant(to + ".bias", np.concatenate(whole))], to + ".biased")

    def _product(self, to: str, x: str, names: Sequence[str]) -> str:
        """Neighbours of one form become one product; what differs is put beside it."""
        runs: list[list[PackedTensor]] = []
        for tensor in (self.tensors[name] for name in names):
            if runs and Form.of(runs[-1][0]) == Form.of(tensor):
                runs[-1].append(tensor)
            else:
                runs.append([tensor])
        parts = [
            self._multiply(f"{to}.{i}", x, load_operands(run, self.source)) for i, run in enumerate(runs)
        ]
        return parts[0] if len(parts) == 1 else self._op("Concat", parts, to, axis=-1)

    def _multiply(self, to: str, x: str, matrix: Operands) -> str:
        if matrix.codes is None or matrix.scales is None:
            assert matrix.dense is not None
            return self._op("MatMul", [x, self._external(to + ".dense", matrix.dense)], to)
        y = self._op(
            "MatMulNBits",
            [x, self._external(to + ".codes", matrix.codes), self._external(to + ".scales", matrix.scales)],
            to,
            domain=_MICROSOFT,
            K=matrix.columns,
            N=matrix.rows,
            bits=matrix.form.bits,
            block_size=matrix.form.block,
            accuracy_level=4,  # activations in 8 bits, as llama.cpp has them: three times as fast
        )
        if matrix.offsets is None:
            return y
        shape = self._integers([1, 0, -1, matrix.form.block])
        blocks = self._op("Reshape", [x, shape], to + ".blocks")
        sums = self._op("ReduceSum", [blocks, self._integers([-1])], to + ".sums", keepdims=0)
        rest = self._op("MatMul", [sums, self._external(to + ".offsets", matrix.offsets)], to + ".rest")
        return self._op("Add", [y, rest], to + ".sum")

    def _norm(self, to: str, x: str, weight: str) -> str:
        return self._op(
            "SimplifiedLayerNormalization",
            [x, self._vector(weight)],
            to,
            epsilon=self.model.norm_eps,
            axis=-1,
        )

    def _split(self, to: str, x: str, widths: Sequence[int]) -> list[str]:
        names = [f"{to}.part{i}" for i in range(len(widths))]
        self._nodes.append(helper.make_node("Split", [x, self._integers(widths)], names, axis=-1))
        return names

    def _op(self, kind: str, inputs: Sequence[str], to: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(kind, inputs, [to], **attributes))
        return to

    def _vector(self, name: str) -> str:
        return self._constant(name, self.vectors[name])

    def _integers(self, values: Sequence[int]) -> str:
        return self._constant("i." + ".".join(map(str, values)), np.array(values, np.int64))

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        if all(known.name != name for known in self._initializers):
            self._initializers.append(numpy_helper.from_array(values, name))
        return name

    def _external(self, name: str, values: NDArray[Any], *, held: bool = True) -> str:
        """Declare an initializer whose values are handed to the session; not `held`: by someone else."""
        proto = TensorProto(name=name, data_type=_TYPES[values.dtype.name], dims=values.shape)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "memory"), ("offset", "0"), ("length", str(values.nbytes))):
            proto.external_data.add(key=key, value=value)
        self._initializers.append(proto)
        if held:
            self.external[name] = values
        return name

    def _input(self, name: str, kind: int, shape: Sequence[int | str]) -> None:
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))

    def _output(self, name: str, shape: Sequence[int | str]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def _serialised(self) -> bytes:
        graph = helper.make_graph(self._nodes, "stage", self._inputs, self._outputs, self._initializers)
        opsets = [helper.make_opsetid(*opset) for opset in _OPSETS]
        model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        return bytes(model.SerializeToString())

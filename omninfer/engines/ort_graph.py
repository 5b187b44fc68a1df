"""The ONNX graphs of a stage: a run of transformer blocks, and the head.

Per layer: norm, one product for Q, K and V, attention with its rotation inside, one product out, norm with
the residual's sum, one product for gate and up, one down. Weights lie in files beside the graph
(`ort_packed`), so the graphs themselves are small. What the features of a block are made of was chosen by
what ONNX Runtime has a kernel for; that the numbers are the right ones is for parity tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from omninfer.arch import HEAD_NORM, Feature, ModelSpec, Rope, RopeKind
from omninfer.arch.features import POST_ATTENTION_NORM, POST_FFN_NORM
from omninfer.engines.checks import PackedTensor
from omninfer.engines.fields import F32
from omninfer.engines.ort_packed import PackedPart
from omninfer.engines.ort_weights import REST_BLOCK, Form, Matrix, stacked
from omnistore.errors import UnsupportedModel

_MICROSOFT: Final = "com.microsoft"
_OPSETS: Final = (("", 21), (_MICROSOFT, 1))
_IR_VERSION: Final = 10
_TYPES: Final = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}
HEAD_STEP: Final = 16
"""GroupQueryAttention takes heads of multiples of this; zeros fill up others, and change nothing."""
HEAD_BYTES: Final = 16 << 20
"""Packed weights of one product of the head: what may be in memory twice for a moment."""
_CLAMP: Final = 7.0
_SLOPE: Final = 1.702
"""Of gpt-oss's gate: see `Feature.CLAMPED_SWIGLU`."""


def padded_head(model: ModelSpec) -> int:
    """Elements of a head in attention and in the caches."""
    return -(-model.head_dim // HEAD_STEP) * HEAD_STEP


def rope_names(windowed: bool) -> tuple[str, str]:
    """The initializers with cosines and sines of layers that have a window, or of those that have not."""
    return ("rope.local.cos", "rope.local.sin") if windowed else ("rope.cos", "rope.sin")


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


def layer_part(model: ModelSpec, tensors: Mapping[str, PackedTensor], n: int) -> PackedPart:
    """The matrices of layer n, by the products that they belong to."""
    at, features = f"blk.{n}.", model.features
    names = {
        "qkv": ["attn_qkv"] if Feature.FUSED_QKV in features else ["attn_q", "attn_k", "attn_v"],
        "out": ["attn_output"],
    }
    if model.experts is None:
        names["gate_up"] = ["ffn_up"] if Feature.FUSED_GATE_UP in features else ["ffn_gate", "ffn_up"]
        names["down"] = ["ffn_down"]
    else:
        names["router"] = ["ffn_gate_inp"]
    if Feature.SHARED_EXPERT in features:
        names |= {"shared.gate_up": ["ffn_gate_shexp", "ffn_up_shexp"], "shared.down": ["ffn_down_shexp"]}
    products = {name: [tensors[f"{at}{one}.weight"] for one in own] for name, own in names.items()}
    if model.experts is not None:
        for e in range(model.experts.count):
            gate, up, down = (
                _of_expert(tensors[f"{at}ffn_{name}_exps.weight"], e, model.experts.count)
                for name in ("gate", "up", "down")
            )
            products |= {f"expert.{e}.gate_up": [gate, up], f"expert.{e}.down": [down]}
    matrices = {
        f"{product}.{i}": matrix for product, own in products.items() for i, matrix in enumerate(stacked(own))
    }
    return PackedPart(f"layer-{n}", matrices)


def _of_expert(tensor: PackedTensor, expert: int, count: int) -> PackedTensor:
    """One expert's matrix, of a tensor that has all of them one after the other."""
    rows = tensor.rows // count
    return tensor.part(slice(expert * rows, (expert + 1) * rows))


def head_part(model: ModelSpec, tensors: Mapping[str, PackedTensor]) -> PackedPart:
    """The head, cut by rows into matrices of at most `HEAD_BYTES`."""
    tensor = tensors[model.head_tensor]
    step = max(1, HEAD_BYTES * tensor.rows // tensor.nbytes)
    cuts = [slice(at, min(at + step, tensor.rows)) for at in range(0, tensor.rows, step)]
    return PackedPart("head", {f"head.{i}": Matrix((tensor.part(rows),)) for i, rows in enumerate(cuts)})


@dataclass(slots=True)
class Graph:
    """A graph under construction."""

    model: ModelSpec
    context: int
    vectors: Mapping[str, F32]
    pairs: int = 0
    """Columns of the rope tables."""
    _nodes: list[Any] = field(default_factory=list)
    _initializers: list[Any] = field(default_factory=list)
    _inputs: list[Any] = field(default_factory=list)
    _outputs: list[Any] = field(default_factory=list)
    _known: set[str] = field(default_factory=set)

    def layers(self, parts: Mapping[int, tuple[PackedPart, str]]) -> bytes:
        """x → y, both [1, tokens, width], through layers, each with its file; the model, serialised."""
        self._input("x", TensorProto.FLOAT, [1, "tokens", self.model.width])
        self._input("last", TensorProto.INT32, [1])
        self._input("total", TensorProto.INT32, [1])
        for windowed in sorted({self.model.windowed[n] for n in parts}):
            for name in rope_names(windowed):
                self._external(name, "float32", (self.context, self.pairs), "memory", 0)
        h = "x"
        for n, (part, file) in parts.items():
            self._place(f"blk.{n}.", part, file)
            h = self._layer(n, part, h)
        self._op("Identity", [h], "y")
        self._output("y", [1, "tokens", self.model.width])
        return self._serialised()

    def head(self, part: PackedPart, file: str) -> bytes:
        """x [1, rows, width] → y [1, rows, vocab]."""
        self._input("x", TensorProto.FLOAT, [1, "rows", self.model.width])
        self._place("", part, file)
        normed = self._norm("head.norm", "x", HEAD_NORM)
        self._op("Identity", [self._product("", "head", normed, part)], "y")
        self._output("y", [1, "rows", self.model.vocab])
        return self._serialised()

    def expert(self, n: int, e: int, part: PackedPart, file: str) -> bytes:
        """x → y, both [1, tokens, width], through expert e of layer n."""
        assert self.model.experts is not None
        at, own, inner = f"blk.{n}.", f"expert.{e}.", self.model.experts.width
        self._input("x", TensorProto.FLOAT, [1, "tokens", self.model.width])
        self._place(at, part, file, own)
        both = self._product(at, own + "gate_up", "x", part)
        gates, ups, downs = (self.vectors.get(f"{at}ffn_{name}_exps.bias") for name in ("gate", "up", "down"))
        if gates is not None and ups is not None:
            both = self._biased(at + own + "gate_up", both, [gates[e], ups[e]])
        gate, up = self._split(at + own + "ffn", both, [inner, inner])
        y = self._product(at, own + "down", self._gated(at + own, gate, up), part)
        if downs is not None:
            y = self._biased(at + own + "down", y, [downs[e]])
        self._op("Identity", [y], "y")
        self._output("y", [1, "tokens", self.model.width])
        return self._serialised()

    def _before_experts(self, at: str, x: str, h: str, part: PackedPart) -> str:
        """Two more outputs, "normed" for the experts and "routed" to pick them; and h, to which the shared
        expert has added what it says of every token."""
        assert self.model.experts is not None
        self._op("Identity", [x], "normed")
        self._output("normed", [1, "tokens", self.model.width])
        self._op("Identity", [self._linear(at, "router", x, part, ["ffn_gate_inp"])], "routed")
        self._output("routed", [1, "tokens", self.model.experts.count])
        if Feature.SHARED_EXPERT not in self.model.features:
            return h
        both, width = self._product(at, "shared.gate_up", x, part), self.model.experts.shared_width
        gate, up = self._split(at + "shared", both, [width, width])
        down = self._product(at, "shared.down", self._gated(at + "shared.", gate, up), part)
        gates = self.vectors[at + "ffn_gate_inp_shexp.weight"][:, None]
        opened = self._op("MatMul", [x, self._constant(at + "shared.gates", gates)], at + "shared.gate")
        opened = self._op("Sigmoid", [opened], at + "shared.opened")
        return self._op("Add", [h, self._op("Mul", [down, opened], at + "shared.y")], at + "y")

    def _layer(self, n: int, part: PackedPart, h: str) -> str:
        at, post = f"blk.{n}.", Feature.POST_NORMS in self.model.features
        x = self._norm(at + "normed", h, at + "attn_norm.weight")
        mixed = self._attention(n, self._linear(at, "qkv", x, part, ["attn_q", "attn_k", "attn_v"]))
        out = self._linear(at, "out", mixed, part, ["attn_output"])
        if post:
            out = self._norm(at + "out.post", out, at + POST_ATTENTION_NORM)
        x, h = self._residual_norm(at, out, h)
        if self.model.experts is not None:
            return self._before_experts(at, x, h, part)
        down = self._feed_forward(at, x, part)
        if post:
            down = self._norm(at + "down.post", down, at + POST_FFN_NORM)
        return self._op("Add", [h, down], at + "y")

    def _feed_forward(self, at: str, x: str, part: PackedPart) -> str:
        both = self._linear(at, "gate_up", x, part, ["ffn_gate", "ffn_up"])
        gate, up = self._split(at + "ffn", both, [self.model.ffn_width, self.model.ffn_width])
        return self._linear(at, "down", self._gated(at, gate, up), part, ["ffn_down"])

    def _gated(self, at: str, gate: str, up: str) -> str:
        features = self.model.features
        if Feature.CLAMPED_SWIGLU in features:
            low, high = self._real(-_CLAMP), self._real(_CLAMP)
            gate = self._op("Min", [gate, high], at + "gate.clamped")
            gate = self._op("QuickGelu", [gate], at + "gate.active", domain=_MICROSOFT, alpha=_SLOPE)
            up = self._op("Clip", [up, low, high], at + "up.clamped")
            up = self._op("Add", [up, self._real(1.0)], at + "up.moved")
        elif Feature.GELU in features:
            gate = self._op("Gelu", [gate], at + "gate.active", approximate="tanh")
        else:  # x * sigmoid(x)
            gate = self._op("QuickGelu", [gate], at + "gate.active", domain=_MICROSOFT, alpha=1.0)
        return self._op("Mul", [gate, up], at + "gated")

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
        rope = rope_names(model.windowed[n])
        inputs += [at + "past_keys", at + "past_values", "last", "total", *rope]
        if Feature.SINKS in model.features:
            inputs += ["", "", self._vector(at + "attn_sinks.weight")]
        window = model.window_of(n)
        self._nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                inputs,
                [at + "mixed", at + "keys", at + "values"],
                domain=_MICROSOFT,
                num_heads=model.heads,
                kv_num_heads=model.kv_heads,
                scale=model.attention_scale,
                softcap=model.attention_cap,
                local_window_size=window or -1,
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

    def _linear(self, at: str, product: str, x: str, part: PackedPart, names: Sequence[str]) -> str:
        """The outputs of several matrices side by side, with their biases."""
        y = self._product(at, product, x, part)
        biases = [self.vectors.get(f"{at}{name}.bias") for name in names]
        if all(bias is None for bias in biases):
            return y
        whole = [
            np.zeros(self.model.tensor_shape(f"{at}{name}.weight")[1], np.float32) if bias is None else bias
            for name, bias in zip(names, biases, strict=True)
        ]
        return self._biased(at + product, y, whole)

    def _biased(self, to: str, y: str, biases: Sequence[F32]) -> str:
        return self._op("Add", [y, self._constant(to + ".bias", np.concatenate(biases))], to + ".biased")

    def _product(self, at: str, product: str, x: str, part: PackedPart) -> str:
        """Products with several matrices are put beside one another."""
        own = {name: matrix for name, matrix in part.matrices.items() if name.startswith(product + ".")}
        answers = [self._multiply(at + name, x, matrix) for name, matrix in own.items()]
        return answers[0] if len(answers) == 1 else self._op("Concat", answers, at + product, axis=-1)

    def _multiply(self, to: str, x: str, matrix: Matrix) -> str:
        form: Form = matrix.form
        if form.bits == 32:
            return self._op("FusedMatMul", [x, to + ".dense"], to, domain=_MICROSOFT, transB=1)
        operands = [x, to + ".codes", to + ".scales"]
        if not form.minimums:
            return self._by_bits(to, operands, matrix.rows, matrix.columns, form.bits, form.block)
        operands.append(to + ".zeros")
        y = self._by_bits(to + ".codes_only", operands, matrix.rows, matrix.columns, form.bits, form.block)
        rests = [self._block_sums(x, form.block), to + ".rests", to + ".rest_scales"]
        rest = self._by_bits(to + ".rest", rests, matrix.rows, matrix.columns // form.block, 8, REST_BLOCK)
        return self._op("Add", [y, rest], to)

    def _by_bits(
        self, to: str, operands: Sequence[str], rows: int, columns: int, bits: int, block: int
    ) -> str:
        return self._op(
            "MatMulNBits",
            operands,
            to,
            domain=_MICROSOFT,
            K=columns,
            N=rows,
            bits=bits,
            block_size=block,
            accuracy_level=4,  # activations in 8 bits, as llama.cpp has them: three times as fast
        )

    def _block_sums(self, x: str, block: int) -> str:
        """Of the activations, block by block; once for all that multiply the same ones."""
        name = f"{x}.sums{block}"
        if name not in self._known:
            self._known.add(name)
            blocks = self._op("Reshape", [x, self._integers([1, 0, -1, block])], f"{x}.blocks{block}")
            self._op("ReduceSum", [blocks, self._integers([-1])], name, keepdims=0)
        return name

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

    def _real(self, value: float) -> str:
        return self._constant(f"r.{value}", np.array(value, np.float32))

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        if name not in self._known:
            self._known.add(name)
            self._initializers.append(numpy_helper.from_array(values, name))
        return name

    def _place(self, at: str, part: PackedPart, file: str, own: str = "") -> None:
        """Declare the operands of a part, which lie in its file: those of an expert (`own`), or of none."""
        for name, place in part.places.items():
            if name.startswith(own) if own else not name.startswith("expert."):
                operand = place.operand
                self._external(at + name, operand.dtype, operand.shape, file, place.offset)

    def _external(self, name: str, dtype: str, shape: Sequence[int], location: str, offset: int) -> None:
        proto = TensorProto(name=name, data_type=_TYPES[dtype], dims=shape)
        proto.data_location = TensorProto.EXTERNAL
        length = int(np.prod(shape)) * np.dtype(dtype).itemsize
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
            proto.external_data.add(key=key, value=value)
        self._initializers.append(proto)

    def _input(self, name: str, kind: int, shape: Sequence[int | str]) -> None:
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))

    def _output(self, name: str, shape: Sequence[int | str]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def _serialised(self) -> bytes:
        graph = helper.make_graph(self._nodes, "stage", self._inputs, self._outputs, self._initializers)
        opsets = [helper.make_opsetid(*opset) for opset in _OPSETS]
        model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
        return bytes(model.SerializeToString())

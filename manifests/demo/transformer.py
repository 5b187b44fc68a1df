"""A llama-shaped transformer in numpy, with its gradients written out by hand.

Parameters carry their GGUF tensor names and shapes ([out, in], interleaved for the llama family's rope);
matrices which read the same input are kept in one array (`Shape.fused`) and split when the model is written.
This is for training on one CPU core: packed rows and no key/value cache. Inference is omninfer's job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Params = dict[str, Array]
EPSILON = 1e-5
ROPE_BASE = 10000.0


@dataclass(frozen=True, slots=True)
class Shape:
    vocabulary: int
    layers: int = 8
    width: int = 96
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 224
    context: int = 256

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def fused(self) -> dict[str, tuple[tuple[str, int], ...]]:
        """Which tensors one array of a layer holds, with the rows of each."""
        kv = self.kv_heads * self.head_width
        return {
            "qkv": (("attn_q", self.width), ("attn_k", kv), ("attn_v", kv)),
            "attn_output": (("attn_output", self.width),),
            "gate_up": (("ffn_gate", self.hidden), ("ffn_up", self.hidden)),
            "ffn_down": (("ffn_down", self.width),),
        }


def initial(shape: Shape, rng: np.random.Generator) -> Params:
    def normal(rows: int, columns: int, deviation: float) -> Array:
        return (rng.standard_normal((rows, columns), dtype=np.float32) * deviation).astype(np.float32)

    width, hidden, shrink = shape.width, shape.hidden, (2 * shape.layers) ** -0.5
    params = {"token_embd": normal(shape.vocabulary, width, 0.5)}
    qkv = width + 2 * shape.kv_heads * shape.head_width
    for layer in range(shape.layers):
        at = f"blk.{layer}."
        params[at + "attn_norm"] = np.ones(width, np.float32)
        params[at + "qkv"] = normal(qkv, width, width**-0.5)
        params[at + "attn_output"] = normal(width, width, width**-0.5 * shrink)
        params[at + "ffn_norm"] = np.ones(width, np.float32)
        params[at + "gate_up"] = normal(2 * hidden, width, width**-0.5)
        params[at + "ffn_down"] = normal(width, hidden, hidden**-0.5 * shrink)
    params["output_norm"] = np.ones(width, np.float32)
    params["output"] = normal(shape.vocabulary, width, 0.02)
    return params


def rotations(shape: Shape, length: int) -> npt.NDArray[np.complex64]:
    """e^(i·position·frequency): rope turns neighbouring pairs of a head, that is, complex numbers."""
    frequencies = ROPE_BASE ** (-np.arange(0, shape.head_width, 2) / shape.head_width)
    turns: npt.NDArray[np.complex64] = np.exp(1j * np.outer(np.arange(length), frequencies)).astype(
        np.complex64
    )
    return turns


def _rotate(heads: Array, turns: npt.NDArray[np.complex64]) -> Array:
    turned: Array = (heads.view(np.complex64) * turns).view(np.float32)
    return turned


def _norm(x: Array, gain: Array) -> tuple[Array, Array]:
    inverse: Array = 1 / np.sqrt(np.einsum("nd,nd->n", x, x)[:, None] / x.shape[1] + EPSILON)
    return x * inverse * gain, inverse


def _norm_back(dy: Array, x: Array, gain: Array, inverse: Array) -> tuple[Array, Array]:
    unit = x * inverse
    scaled = dy * gain
    inner = np.einsum("nd,nd->n", scaled, unit)[:, None] / x.shape[1]
    return (scaled - unit * inner) * inverse, np.einsum("nd,nd->d", dy, unit)


def _split_heads(qkv: Array, shape: Shape, rows: int) -> tuple[Array, Array, Array]:
    """[tokens, q|k|v] -> q [rows, kv heads, queries per kv head · T, d] and k, v [rows, kv heads, T, d]."""
    length, wide, kv = len(qkv) // rows, shape.head_width, shape.kv_heads
    heads = qkv.reshape(rows, length, shape.heads + 2 * kv, wide).transpose(0, 2, 1, 3)
    q = np.ascontiguousarray(heads[:, : shape.heads])
    k = np.ascontiguousarray(heads[:, shape.heads : shape.heads + kv])
    return q, k, np.ascontiguousarray(heads[:, shape.heads + kv :])


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward pass must remember for its backward pass."""

    shape: Shape
    params: Params
    rows: int
    turns: npt.NDArray[np.complex64]
    tokens: npt.NDArray[np.int64]
    saved: dict[str, tuple[Any, ...]]

    def attend(self, at: str, x: Array) -> Array:
        p, shape, rows = self.params, self.shape, self.rows
        normed, inverse = _norm(x, p[at + "attn_norm"])
        q, k, v = _split_heads(normed @ p[at + "qkv"].T, shape, rows)
        length = q.shape[2]
        grouped = (rows, shape.kv_heads, -1, shape.head_width)
        q = _rotate(q, self.turns).reshape(grouped)
        q *= np.float32(shape.head_width**-0.5)
        k = _rotate(k, self.turns)
        scores = (q @ k.transpose(0, 1, 3, 2)).reshape(rows, shape.heads, length, length)
        scores += np.triu(np.full((length, length), -1e9, np.float32), 1)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        weights = scores.reshape(rows, shape.kv_heads, -1, length)
        seen = np.matmul(weights, v).reshape(rows, shape.heads, length, shape.head_width)
        mixed = seen.transpose(0, 2, 1, 3).reshape(x.shape)
        self.saved[at + "attend"] = (x, normed, inverse, q, k, v, weights, mixed)
        out: Array = mixed @ p[at + "attn_output"].T
        out += x
        return out

    def attend_back(self, at: str, dx: Array, grads: Params) -> Array:
        p, shape, rows = self.params, self.shape, self.rows
        x, normed, inverse, q, k, v, weights, mixed = self.saved.pop(at + "attend")
        length = k.shape[2]
        grads[at + "attn_output"] = dx.T @ mixed
        dmixed = (dx @ p[at + "attn_output"]).reshape(rows, length, shape.heads, shape.head_width)
        dseen = np.ascontiguousarray(dmixed.transpose(0, 2, 1, 3)).reshape(q.shape)
        dv = weights.transpose(0, 1, 3, 2) @ dseen
        dscores = dseen @ v.transpose(0, 1, 3, 2)
        dscores -= np.einsum("rhqk,rhqk->rhq", dscores, weights)[..., None]
        dscores *= weights
        dk = dscores.transpose(0, 1, 3, 2) @ q
        dq = dscores @ k
        dq *= np.float32(shape.head_width**-0.5)
        dq = _rotate(dq.reshape(rows, shape.heads, length, shape.head_width), self.turns.conj())
        dk = _rotate(np.ascontiguousarray(dk), self.turns.conj())
        dheads = np.concatenate([dq, dk, dv], axis=1).transpose(0, 2, 1, 3)
        dqkv = dheads.reshape(rows * length, -1)
        grads[at + "qkv"] = dqkv.T @ normed
        back, grads[at + "attn_norm"] = _norm_back(dqkv @ p[at + "qkv"], x, p[at + "attn_norm"], inverse)
        return dx + back

    def feed(self, at: str, x: Array) -> Array:
        p = self.params
        normed, inverse = _norm(x, p[at + "ffn_norm"])
        both = normed @ p[at + "gate_up"].T
        gate, up = both[:, : self.shape.hidden], both[:, self.shape.hidden :]
        sigmoid: Array = np.exp(-gate)
        sigmoid += 1
        np.reciprocal(sigmoid, out=sigmoid)
        silu = gate * sigmoid
        product = silu * up
        self.saved[at + "feed"] = (x, normed, inverse, up, sigmoid, silu, product)
        out: Array = product @ p[at + "ffn_down"].T
        out += x
        return out

    def feed_back(self, at: str, dx: Array, grads: Params) -> Array:
        p = self.params
        x, normed, inverse, up, sigmoid, silu, product = self.saved.pop(at + "feed")
        grads[at + "ffn_down"] = dx.T @ product
        dproduct = dx @ p[at + "ffn_down"]
        dboth = np.empty((len(x), 2 * self.shape.hidden), np.float32)
        np.multiply(dproduct, silu, out=dboth[:, self.shape.hidden :])
        slope = silu * (1 - sigmoid)
        slope += sigmoid
        slope *= up
        np.multiply(dproduct, slope, out=dboth[:, : self.shape.hidden])
        grads[at + "gate_up"] = dboth.T @ normed
        back, grads[at + "ffn_norm"] = _norm_back(dboth @ p[at + "gate_up"], x, p[at + "ffn_norm"], inverse)
        return dx + back


def forward(shape: Shape, params: Params, tokens: npt.NDArray[np.int64]) -> tuple[Array, Pass]:
    """`tokens` is [rows, length]; the logits are [rows · length, vocabulary]."""
    rows, length = tokens.shape
    run = Pass(shape, params, rows, rotations(shape, length), tokens.ravel(), {})
    x = params["token_embd"][run.tokens]
    for layer in range(shape.layers):
        x = run.feed(f"blk.{layer}.", run.attend(f"blk.{layer}.", x))
    normed, inverse = _norm(x, params["output_norm"])
    run.saved["head"] = (x, normed, inverse)
    logits: Array = normed @ params["output"].T
    return logits, run


def cross_entropy(logits: Array, targets: npt.NDArray[np.int64]) -> tuple[float, Array]:
    """Mean loss in nats, and its gradient by the logits (which are overwritten)."""
    index = np.arange(len(targets))
    logits -= logits.max(axis=1, keepdims=True)
    picked = logits[index, targets].astype(np.float64)
    np.exp(logits, out=logits)
    total = logits.sum(axis=1, keepdims=True)
    loss = float(np.mean(np.log(total[:, 0].astype(np.float64)) - picked))
    logits /= total
    logits[index, targets] -= 1
    logits /= np.float32(len(targets))
    return loss, logits


def backward(run: Pass, dlogits: Array) -> Params:
    params, grads = run.params, Params()
    x, normed, inverse = run.saved.pop("head")
    grads["output"] = dlogits.T @ normed
    dx, grads["output_norm"] = _norm_back(dlogits @ params["output"], x, params["output_norm"], inverse)
    for layer in reversed(range(run.shape.layers)):
        dx = run.attend_back(f"blk.{layer}.", run.feed_back(f"blk.{layer}.", dx, grads), grads)
    grads["token_embd"] = np.zeros_like(params["token_embd"])
    np.add.at(grads["token_embd"], run.tokens, dx)
    return grads

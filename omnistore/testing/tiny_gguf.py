"""Small GGUF files made to order, for tests of this project and of other implementations.

A writer of its own, so that the reader is not tested against itself or against another
library's habits: any order of infos and of data, any padding, any alignment, versions 1 to 3,
either byte order. It checks nothing: what it is told to write may be nonsense.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Final, TypeAlias

from blake3 import blake3

from omnistore.chunker.ggml import by_name, nbytes
from omnistore.chunker.split import split_names

_CODES: Final[Mapping[str, tuple[int, str]]] = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
_STRING: Final = 8
_ARRAY: Final = 9


@dataclass(frozen=True, slots=True)
class Typed:
    """A metadata value of a chosen GGUF type (`u8` … `f64`, `bool`), alone or in an array."""

    type: str
    value: int | float | Sequence[int] | Sequence[float]


@dataclass(frozen=True, slots=True)
class RawValue:
    """A metadata value written as it is: for values that no honest writer makes."""

    type: int
    data: bytes


MetadataValue: TypeAlias = (
    bool | int | float | str | bytes | Sequence[str] | Sequence[int] | Sequence[float] | Typed | RawValue
)
"""Python's int is written as u32, float as f32, bytes as a string that need not be UTF-8."""

Pairs: TypeAlias = Sequence[tuple[str | bytes, MetadataValue]]
Metadata: TypeAlias = Mapping[str, MetadataValue] | Mapping[bytes, MetadataValue] | Pairs


def _pairs(metadata: Metadata) -> list[tuple[str | bytes, MetadataValue]]:
    return list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)


@dataclass(frozen=True, slots=True)
class TinyTensor:
    """A tensor to write; what is None follows from the rest."""

    name: str | bytes
    type: str | int = "F32"
    """A ggml type's name, or a number of which the file is to claim it is one."""
    shape: tuple[int, ...] = (8,)
    data: bytes | None = None
    """By default pseudo-random bytes made from the name."""
    offset: int | None = None
    """From the start of the data; by default the next aligned place in data order."""
    gap: bytes = b""
    """Bytes put before the tensor's data, then padded to the alignment."""

    def payload(self) -> bytes:
        """The bytes of the tensor's data."""
        if self.data is not None:
            return self.data
        size = nbytes(by_name(self.type), self.shape) if isinstance(self.type, str) else 4 * prod(self.shape)
        return pseudo_random(self.name, size)


@dataclass(frozen=True, slots=True)
class TinyGGUF:
    """A file to write: `TinyGGUF(…).build()`, or `tiny_gguf(…)` for short."""

    tensors: Sequence[TinyTensor] = ()
    """In the order of their infos."""
    metadata: Metadata = field(default_factory=dict)
    """A sequence of pairs may repeat a key."""
    version: int = 3
    big_endian: bool = False
    magic: bytes = b"GGUF"
    alignment: int = 32
    """What the data is aligned to; `general.alignment` is written when it is not 32."""
    declare_alignment: bool = True
    data_order: Sequence[int] | None = None
    """Tensor numbers in the order of their data; by default that of the infos."""
    fill: int = 0
    """The byte that padding is made of."""
    tail: bytes = b""
    """Bytes after the last tensor and its padding."""
    pad_end: bool = True
    """Whether the last tensor is padded to the alignment."""
    tensor_count: int | None = None
    """What the header claims; the truth by default."""
    metadata_count: int | None = None

    def build(self) -> bytes:
        """The file's bytes."""
        align = max(self.alignment, 1)
        data = bytearray()
        offsets = [0] * len(self.tensors)
        order = range(len(self.tensors)) if self.data_order is None else self.data_order
        for number in order:
            tensor = self.tensors[number]
            data += tensor.gap
            data += bytes([self.fill]) * (-len(data) % align)
            offsets[number] = len(data) if tensor.offset is None else tensor.offset
            data += tensor.payload()
        if self.pad_end:
            data += bytes([self.fill]) * (-len(data) % align)
        header = self._header(offsets)
        if self.tensors:
            header += bytes([self.fill]) * (-len(header) % align)
        return bytes(header + data + self.tail)

    def _header(self, offsets: Sequence[int]) -> bytearray:
        pairs = _pairs(self.metadata)
        if self.alignment != 32 and self.declare_alignment:
            pairs.append(("general.alignment", self.alignment))
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        metadata_count = len(pairs) if self.metadata_count is None else self.metadata_count
        count = "I" if self.version == 1 else "Q"
        out = bytearray(self.magic)
        out += (
            self._pack("I", self.version)
            + self._pack(count, tensor_count)
            + self._pack(count, metadata_count)
        )
        for key, value in pairs:
            out += self._string(key)
            out += self._value(value)
        for tensor, offset in zip(self.tensors, offsets, strict=True):
            kind = by_name(tensor.type).id if isinstance(tensor.type, str) else tensor.type
            out += self._string(tensor.name) + self._pack("I", len(tensor.shape))
            out += b"".join(self._pack("Q", n) for n in tensor.shape)
            out += self._pack("I", kind) + self._pack("Q", offset)
        return out

    def _pack(self, letter: str, value: object) -> bytes:
        return struct.pack((">" if self.big_endian else "<") + letter, value)

    def _string(self, text: str | bytes) -> bytes:
        raw = text.encode() if isinstance(text, str) else text
        return self._pack("I" if self.version == 1 else "Q", len(raw)) + raw

    def _value(self, value: MetadataValue) -> bytes:
        if isinstance(value, RawValue):
            return self._pack("I", value.type) + value.data
        if isinstance(value, str | bytes):
            return self._pack("I", _STRING) + self._string(value)
        if isinstance(value, bool | int | float):
            return self._value(Typed(_natural(value), value))
        if isinstance(value, Typed):
            code, letter = _CODES[value.type]
            if isinstance(value.value, int | float):
                return self._pack("I", code) + self._pack(letter, value.value)
            packed = b"".join(self._pack(letter, item) for item in value.value)
            return (
                self._pack("I", _ARRAY) + self._pack("I", code) + self._pack("Q", len(value.value)) + packed
            )
        if all(isinstance(item, str | bytes) for item in value):
            strings = b"".join(self._string(item) for item in value if isinstance(item, str | bytes))
            return self._pack("I", _ARRAY) + self._pack("I", _STRING) + self._pack("Q", len(value)) + strings
        numbers = [item for item in value if not isinstance(item, str | bytes)]
        return self._value(Typed(_natural(numbers[0]), numbers))


def _natural(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, float):
        return "f32"
    return "u32" if value >= 0 else "i32"


def pseudo_random(seed: str | bytes, size: int) -> bytes:
    """`size` bytes of BLAKE3's extended output for `seed`: the same everywhere and for ever."""
    raw = seed.encode() if isinstance(seed, str) else seed
    return bytes(blake3(raw).digest(length=size)) if size else b""


def tiny_gguf(tensors: Sequence[TinyTensor] = (), **options: object) -> bytes:
    """The bytes of `TinyGGUF(tensors, **options)`."""
    return TinyGGUF(tensors, **options).build()  # type: ignore[arg-type]  # TinyGGUF's own fields, by name


def block_tensors(layers: int, *, width: int = 32, type: str = "F32") -> list[TinyTensor]:
    """The tensors of a small model without meaning: embedding, `layers` blocks of three, norm, head."""
    names = ["token_embd.weight"]
    names += [f"blk.{n}.{part}.weight" for n in range(layers) for part in ("attn_q", "ffn_up", "ffn_norm")]
    names += ["output_norm.weight", "output.weight", "rope_freqs.weight"]
    return [
        TinyTensor(name, "F32", (width,))
        if "norm" in name or "rope" in name
        else TinyTensor(name, type, (width, 8))
        for name in names
    ]


def split_set(model: TinyGGUF, stem: str, cuts: Sequence[int]) -> dict[str, bytes]:
    """The model as a split set: file name to bytes; `cuts` are the tensor numbers that begin a new file."""
    edges = [0, *cuts, len(model.tensors)]
    names = split_names(stem, len(edges) - 1)
    pairs = _pairs(model.metadata)
    found: dict[str, bytes] = {}
    for number, name in enumerate(names):
        split: list[tuple[str | bytes, MetadataValue]] = [
            ("split.no", Typed("u16", number)),
            ("split.count", Typed("u16", len(names))),
            ("split.tensors.count", Typed("i32", len(model.tensors))),
        ]
        part = replace(
            model,
            tensors=model.tensors[edges[number] : edges[number + 1]],
            metadata=[*(pairs if number == 0 else []), *split],
            data_order=None,
        )
        found[name] = part.build()
    return found


_PIECES: Final = (
    "▁t",
    "he",
    "▁the",
    "an",
    "▁and",
    "▁a",
    "in",
    "er",
    "on",
    "▁w",
    "▁s",
    "ed",
    "▁to",
    "at",
    "is",
)
"""Merged pieces of the tiny model's vocabulary, the most likely first."""


def tiny_model(
    layers: int = 2, *, width: int = 64, tied: bool = False, weight_type: str = "F32", seed: str = "tiny"
) -> TinyGGUF:
    """A llama that runs: sane shapes, deterministic weights, a SentencePiece vocabulary with bytes.

    Four heads, two key/value heads, `weight_type` F32 or F16 for matrices. What it says is
    gibberish, but the same gibberish everywhere.
    """
    tokens, scores, kinds = _vocabulary()
    metadata: dict[str, MetadataValue] = {
        "general.architecture": "llama",
        "general.name": f"tiny-{seed}",
        "general.file_type": 0 if weight_type == "F32" else 1,
        "llama.block_count": layers,
        "llama.context_length": 256,
        "llama.embedding_length": width,
        "llama.feed_forward_length": 2 * width,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": width // 4,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": Typed("f32", scores),
        "tokenizer.ggml.token_type": Typed("i32", kinds),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (width, len(tokens))}
    for n in range(layers):
        block = {
            "attn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (width, width // 2),
            "attn_v": (width, width // 2),
            "attn_output": (width, width),
            "ffn_norm": (width,),
            "ffn_gate": (width, 2 * width),
            "ffn_up": (width, 2 * width),
            "ffn_down": (2 * width, width),
        }
        shapes |= {f"blk.{n}.{name}.weight": shape for name, shape in block.items()}
    shapes["output_norm.weight"] = (width,)
    if not tied:
        shapes["output.weight"] = (width, len(tokens))
    return TinyGGUF([_weights(name, shape, weight_type, seed) for name, shape in shapes.items()], metadata)


def _vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and token types: three special ones, 256 bytes, letters, a few merged pieces."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?'\""]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *letters, *_PIECES]
    scores = [0.0] * 259 + [-100.0 - n for n in range(len(letters))] + [-1.0 - n for n in range(len(_PIECES))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(letters) + len(_PIECES))
    return tokens, scores, kinds


def _weights(name: str, shape: tuple[int, ...], weight_type: str, seed: str) -> TinyTensor:
    """Ones for a norm, else uniform with variance 1/fan-in."""
    count = prod(shape)
    if len(shape) == 1:
        return TinyTensor(name, "F32", shape, struct.pack(f"<{count}f", *[1.0] * count))
    scale = (3 / shape[0]) ** 0.5 / 32768
    raw = struct.unpack(f"<{count}h", pseudo_random(f"{seed}/{name}", 2 * count))
    letter = {"F32": "f", "F16": "e"}[weight_type]
    return TinyTensor(name, weight_type, shape, struct.pack(f"<{count}{letter}", *[x * scale for x in raw]))

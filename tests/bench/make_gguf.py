"""Writes a llama-shaped GGUF of a wanted size, filled with seeded pseudo-random numbers, for benchmarks.

    python tests/bench/make_gguf.py OUT.gguf [--size 1GiB] [--layers 22] [--type Q8_0] [--seed 0]
    python tests/bench/make_gguf.py OUT.gguf --shape tinyllama [--type Q4_K_M] [--seed 0]

Tensors come in the order in which llama-quantize writes them (outside the layers first, then layer by layer,
each sorted by name), cost bounded memory, and hold finite numbers of a sensible scale, so that an engine can
run the file; what it says is noise. There is no tokenizer, unless a shape asks for one. The same arguments
give the same bytes; another seed changes every tensor but the norms.
"""

from __future__ import annotations

import argparse
import math
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ALIGNMENT = 32
PIECE = 8 << 20
"""Bytes made and written at a time."""
WIDTHS = (2048, 1024, 512, 256)
"""Tried from the widest: multiples of 256, which every quantisation below can cut into whole blocks."""
HEAD_WIDTH = 64
SIGN_AND_MANTISSA, TINY_HALF = 0x83, 0x10
"""Applied to the high byte of a half-precision number: what is left lies between 2^-11 and 2^-10, signed."""


@dataclass(frozen=True, slots=True)
class TensorType:
    code: int
    """ggml's number for the type, in the tensor infos."""
    file_type: int
    values: int
    """Weights in one block."""
    size: int
    """Bytes of one block."""
    halves: tuple[int, ...]
    """Where in a block the high bytes of half-precision numbers lie."""


TYPES = {
    "F16": TensorType(1, 1, 1, 2, (1,)),
    "Q4_0": TensorType(2, 2, 32, 18, (1,)),
    "Q8_0": TensorType(8, 7, 32, 34, (1,)),
    "Q4_K": TensorType(12, 15, 256, 144, (1, 3)),
    "Q6_K": TensorType(14, 18, 256, 210, (209,)),
}
MIXES = {"Q4_K_M": "Q4_K"}
"""Mixes of types, and the type of most of their tensors."""
F32_CODE = 0
STRING, UINT8, UINT32, INT32, FLOAT32, ARRAY = 8, 0, 4, 5, 6, 9


@dataclass(frozen=True, slots=True)
class Shape:
    kind: str
    layers: int
    width: int
    hidden: int
    vocabulary: int
    words: bool = False
    """Whether there is a tokenizer: every byte, and made-up words."""

    @property
    def kv_width(self) -> int:
        return max(HEAD_WIDTH, self.width // 8)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names with ggml shapes (the row length first); one dimension means a norm in F32."""
        w, kv, hidden = self.width, self.kv_width, self.hidden
        yield "output.weight", (w, self.vocabulary)
        yield "output_norm.weight", (w,)
        yield "token_embd.weight", (w, self.vocabulary)
        for layer in range(self.layers):
            at = f"blk.{layer}."
            yield at + "attn_k.weight", (w, kv)
            yield at + "attn_norm.weight", (w,)
            yield at + "attn_output.weight", (w, w)
            yield at + "attn_q.weight", (w, w)
            yield at + "attn_v.weight", (w, kv)
            yield at + "ffn_down.weight", (hidden, w)
            yield at + "ffn_gate.weight", (w, hidden)
            yield at + "ffn_norm.weight", (w,)
            yield at + "ffn_up.weight", (w, hidden)

    def kind_of(self, name: str) -> str:
        """The type of a matrix; a mix is llama-quantize's."""
        if self.kind not in MIXES:
            return self.kind
        careful = name.endswith(("attn_v.weight", "ffn_down.weight"))
        if name == "output.weight" or (careful and self._has_more_bits(int(name.split(".")[1]))):
            return "Q6_K"
        return MIXES[self.kind]

    def _has_more_bits(self, layer: int) -> bool:
        """The first and the last eighth of the layers, and every third between."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2

    def bytes_of(self, name: str, dims: tuple[int, ...]) -> int:
        if len(dims) == 1:
            return 4 * dims[0]
        kind = TYPES[self.kind_of(name)]
        return math.prod(dims) // kind.values * kind.size

    def payload(self) -> int:
        return sum(_aligned(self.bytes_of(name, dims)) for name, dims in self.tensors())


def tinyllama(kind: str) -> Shape:
    """TinyLlama's shape: 1.1 thousand million weights."""
    return Shape(kind, layers=22, width=2048, hidden=5632, vocabulary=32000)


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(shape: Shape, filler: int) -> bytes:
    """Everything before the first tensor's data; `filler` bytes of metadata bring the file to its size."""
    heads, kv_heads = shape.width // HEAD_WIDTH, shape.kv_width // HEAD_WIDTH
    integers = {
        "general.file_type": TYPES[MIXES.get(shape.kind, shape.kind)].file_type,
        "llama.context_length": 2048,
        "llama.embedding_length": shape.width,
        "llama.block_count": shape.layers,
        "llama.feed_forward_length": shape.hidden,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.rope.dimension_count": HEAD_WIDTH,
        "llama.vocab_size": shape.vocabulary,
    }
    model = "llama" if shape.words else "no_vocab"
    texts = {"general.architecture": "llama", "general.name": "Noise", "tokenizer.ggml.model": model}
    pairs = [_text(key) + struct.pack("<I", STRING) + _text(value) for key, value in texts.items()]
    pairs += [_text(key) + struct.pack("<II", UINT32, value) for key, value in integers.items()]
    pairs.append(_text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", FLOAT32, 1e-5))
    pairs += _tokenizer(shape.vocabulary) if shape.words else []
    pairs.append(_text("bench.filler") + struct.pack("<IIQ", ARRAY, UINT8, filler) + bytes(filler))
    infos, offset = [], 0
    for name, dims in shape.tensors():
        code = F32_CODE if len(dims) == 1 else TYPES[shape.kind_of(name)].code
        infos.append(_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset))
        offset += _aligned(shape.bytes_of(name, dims))
    data = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs)) + b"".join(pairs) + b"".join(infos)
    return data + bytes(_aligned(len(data)) - len(data))


def _tokenizer(count: int) -> list[bytes]:
    """A SentencePiece vocabulary as metadata."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *[6] * 256] + [1] * (count - len(tokens))
    tokens += [f"▁word{n}" for n in range(count - len(tokens))]

    def array(key: str, code: int, items: list[bytes]) -> bytes:
        return _text(f"tokenizer.ggml.{key}") + struct.pack("<IIQ", ARRAY, code, len(items)) + b"".join(items)

    return [
        array("tokens", STRING, [_text(token) for token in tokens]),
        array("scores", FLOAT32, [struct.pack("<f", -n) for n in range(count)]),
        array("token_type", INT32, [struct.pack("<i", kind) for kind in kinds]),
        *(
            _text(f"tokenizer.ggml.{key}_token_id") + struct.pack("<II", UINT32, number)
            for number, key in enumerate(("unknown", "bos", "eos"))
        ),
    ]


def fitted(size: int, layers: int, kind: str) -> tuple[Shape, int]:
    """A shape that fills `size` bytes, first by its feed-forward, then its vocabulary; and filler."""
    for width in WIDTHS:
        row = width // TYPES[kind].values * TYPES[kind].size
        shape = Shape(kind, layers, width, 0, max(256, min(32000, size // 16 // row)))
        room = size - len(header(shape, 0)) - shape.payload()
        hidden = room // (3 * layers * row) // 256 * 256
        if hidden < width:
            continue
        shape = replace(shape, hidden=hidden)
        room = size - len(header(shape, 0)) - shape.payload()
        shape = replace(shape, vocabulary=shape.vocabulary + max(0, room // (2 * row)))
        return shape, size - len(header(shape, 0)) - shape.payload()
    raise SystemExit(
        f"{size} bytes are too few for {layers} layers in {kind}: fewer --layers or a larger --size"
    )


def numbers(kind: str, count: int, rng: np.random.SFC64) -> Iterator[memoryview]:
    """`count` bytes of random weights, in pieces of whole blocks."""
    block = TYPES[kind]
    limit = PIECE // block.size
    remaining = count // block.size
    while remaining:
        blocks = min(limit, remaining)
        data = rng.random_raw(-(-blocks * block.size // 8)).view(np.uint8)[: blocks * block.size]
        for place in block.halves:
            high = data[place :: block.size]
            high &= SIGN_AND_MANTISSA
            high |= TINY_HALF
        yield data.data
        remaining -= blocks


def make_gguf(
    path: Path, size: int = 1 << 30, *, layers: int = 22, kind: str = "Q8_0", seed: int = 0
) -> Shape:
    """Writes the file, exactly `size` bytes rounded down to the alignment, and says what shape it got."""
    size -= size % ALIGNMENT
    shape, filler = fitted(size, layers, kind)
    write_gguf(path, shape, filler=filler, seed=seed)
    return shape


def write_gguf(path: Path, shape: Shape, *, filler: int = 0, seed: int = 0) -> None:
    """Writes a file of exactly this shape."""
    with path.open("wb") as file:
        file.write(header(shape, filler))
        for index, (name, dims) in enumerate(shape.tensors()):
            count = shape.bytes_of(name, dims)
            if len(dims) == 1:
                file.write(np.ones(dims, "<f4").tobytes())
            else:
                rng = np.random.SFC64(np.random.SeedSequence([seed, index]))
                for piece in numbers(shape.kind_of(name), count, rng):
                    file.write(piece)
            file.write(bytes(_aligned(count) - count))


def parsed_size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]i?B)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; write 1GiB, 512MiB, 100MB or a number of bytes"
        )
    unit = match[2] or "B"
    base = 1024 if "i" in unit else 1000
    return int(match[1]) * int(base ** "BKMG".index(unit[0]))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", type=parsed_size, default=1 << 30)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--type", choices=sorted([*TYPES, *MIXES]), default="Q8_0")
    parser.add_argument("--shape", choices=["tinyllama"], help="instead of a size")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.shape:
        write_gguf(options.output, shape := tinyllama(options.type), seed=options.seed)
    else:
        shape = _sized(parser, options)
    print(f"{options.output}: {options.output.stat().st_size:,} bytes, {shape}")


def _sized(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Shape:
    if options.type in MIXES:
        parser.error(f"{options.type} needs --shape")
    return make_gguf(
        options.output, options.size, layers=options.layers, kind=options.type, seed=options.seed
    )


if __name__ == "__main__":
    main(sys.argv[1:])

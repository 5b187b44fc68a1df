"""Writes spec/vectors/layout.json and gguf-bad.json: `python tests/conformance/write_layout_vectors.py`.

To be run when a vector is added. A CID that changes in a vector that was there before means that
models published by older versions no longer share anything with new ones: don't.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnistore.block import BLOCK_SIZE
from omnistore.chunker.cut import cut
from omnistore.testing.bad_gguf import bad_ggufs
from omnistore.testing.tiny_gguf import TinyGGUF, TinyTensor, block_tensors, pseudo_random, split_set

VECTORS = Path(__file__).resolve().parent.parent.parent / "spec" / "vectors"
LLAMA = {
    "general.architecture": "llama",
    "general.file_type": 0,
    "llama.block_count": 2,
    "llama.context_length": 128,
    "tokenizer.ggml.tokens": ["<unk>", "▁a", "b"],
}
LONGEST_HEX = 256
"""Payloads longer than this are given by the seed they were made from."""
LARGEST_BAD_FILE = 8192


def models() -> dict[str, tuple[str, TinyGGUF, dict[str, bytes]]]:
    """Vector name → (what it shows, the model, its files)."""
    tensors = block_tensors(2)
    # Numbers of: output first, then layer 1 before layer 0, each in two runs.
    runs = [8, 4, 1, 5, 2, 6, 3, 0, 7, 9]
    odd = [
        "blk.01.x", "blk.4096.x", "blk.4095.x", "blk.0", "output_hidden", "token_embd_norm.weight",
        "per_layer_token_embd.weight", "v.blk.0.ln.weight", "Ωmega", "omega", "position_embd.weight",
    ]  # fmt: skip
    big = [
        TinyTensor("blk.0.a.weight", "I8", (BLOCK_SIZE * 2 + BLOCK_SIZE // 2,)),
        TinyTensor("blk.0.b.weight", "I8", (BLOCK_SIZE,)),
        TinyTensor("blk.0.c.weight", "I8", (BLOCK_SIZE + 1,)),
    ]
    quantised = [
        TinyTensor("blk.0.ffn_down.weight", "Q4_K", (512, 2)),
        TinyTensor("blk.0.ffn_up.weight", "Q8_0", (96, 3)),
        TinyTensor("output_norm.weight", "BF16", (5,)),
        TinyTensor("scalar", "F64", ()),
    ]
    found: dict[str, tuple[str, TinyGGUF]] = {
        "one-tensor": ("a header and one shared tensor", TinyGGUF([TinyTensor("x", "F32", (3,))])),
        "no-tensors": (
            "the header is the whole file",
            TinyGGUF((), {"general.architecture": "llama", "n": 1}),
        ),
        "two-layers": ("every kind of part", TinyGGUF(tensors, LLAMA)),
        "output-first": (
            "the tensors of two-layers, layers in separate runs: its parts but the header",
            TinyGGUF(tensors, LLAMA, data_order=runs),
        ),
        "other-template": (
            "the tensors of two-layers under other metadata: its parts but the header",
            TinyGGUF(tensors, {**LLAMA, "tokenizer.chat_template": "{{ messages }}"}),
        ),
        "zero-padding": (
            "the tensors of two-layers with wider gaps and a zero tail, none of it addressed",
            TinyGGUF(tensors, LLAMA, alignment=256, tail=bytes(500)),
        ),
        "nonzero-padding": (
            "gaps that are not zero are listed in the header part, zero ones are not",
            TinyGGUF(
                [
                    TinyTensor("a", "F32", (3,)),
                    TinyTensor("b", "F32", (3,), gap=b"gap"),
                    TinyTensor("c", "F32", (8,)),
                ],
                tail=b"tail",
            ),
        ),
        "version-2-alignment-64": ("GGUF version 2", TinyGGUF(tensors, LLAMA, version=2, alignment=64)),
        "many-blocks": ("extents of 3, 1 and 2 blocks, cut from their own starts", TinyGGUF(big)),
        "quantised": ("types of several sizes, a scalar", TinyGGUF(quantised, {"general.file_type": 15})),
        "odd-names": (
            "names at the edges of the rule, sorted by their UTF-8 bytes",
            TinyGGUF([TinyTensor(name, "F32", (1,)) for name in odd]),
        ),
    }
    files = {name: (shows, model, {"model.gguf": model.build()}) for name, (shows, model) in found.items()}
    whole = TinyGGUF(tensors, LLAMA)
    files["split-set"] = (
        "the tensors of two-layers in three files, layer 0 across two: its parts but the header",
        whole,
        split_set(whole, "model", [3, 6]),
    )
    return files


def segments(data: bytes, model: TinyGGUF) -> list[dict[str, Any]]:
    """The file as pieces of hex and of pseudo-random payloads."""
    places = {}
    for tensor in model.tensors:
        payload = tensor.payload()
        if len(payload) > LONGEST_HEX and (place := data.find(payload)) >= 0:
            places[place] = (tensor.name, len(payload))
    pieces: list[dict[str, Any]] = []
    done = 0
    for place, (seed, size) in sorted(places.items()):
        assert data[place : place + size] == pseudo_random(seed, size)
        pieces += [{"hex": data[done:place].hex()}] if place > done else []
        pieces.append({"blake3_xof_of": seed, "size": size})
        done = place + size
    return pieces + ([{"hex": data[done:].hex()}] if done < len(data) else [])


def vector(name: str, shows: str, model: TinyGGUF, files: Mapping[str, bytes]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / file for file in files]
        for path, data in zip(paths, files.values(), strict=True):
            path.write_bytes(data)
        placements: list[Any] = []
        result = cut(paths, sink=placements.extend)
    return {
        "name": name,
        "shows": shows,
        "model_name": result.manifest.name,
        "files": [
            {"name": file, "size": len(data), "segments": segments(data, model)}
            for file, data in files.items()
        ],
        "manifest": {"cid": str(result.node.cid), "node": bytes(result.node.data).hex()},
        "parts": [
            {
                "kind": part.key.kind,
                "index": part.key.index,
                "size": part.size,
                "cid": str(node.cid),
                "node": bytes(node.data).hex(),
            }
            for part, node in result.parts
        ],
        "blocks": [
            {"file": p.file, "offset": p.offset, "size": p.size, "part": str(p.part), "cid": str(p.cid)}
            for p in placements
        ],
    }


def bad_files() -> list[dict[str, str]]:
    return [
        {"fault": bad.fault, "error": bad.error.__name__, "hex": bad.data.hex()}
        for bad in bad_ggufs()
        if len(bad.data) <= LARGEST_BAD_FILE
    ]


def write(name: str, content: object) -> None:
    (VECTORS / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write("layout.json", [vector(name, *rest) for name, rest in models().items()])
    write("gguf-bad.json", bad_files())

"""What is not supported, each with the very error that it gives: made by trying it.

    python -m tests.parity.unsupported --write

writes `tests/conformance/parity/unsupported.md`, and `tests/conformance/test_unsupported.py` holds the file
against what is said now.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from omninfer.arch import FAMILIES, ModelSpec
from omninfer.engines import ENGINES, StageSpec, get_engine
from omninfer.engines.packing import LATTICES, SUPPORTED
from omninfer.testing.noise import noise_model
from omninfer.tokenizer import Tokenizer
from omnistore.chunker.ggml import by_name
from omnistore.errors import BadConfig, OmniError, UnsupportedModel

FILE: Final = Path(__file__).resolve().parent.parent / "conformance" / "parity" / "unsupported.md"
OTHER_TYPES: Final = ("I8", "I32", "F64")
KEYS: Final[tuple[tuple[str, str, object], ...]] = (
    ("rope.scaling.type", "llama", "dynamic"),
    ("expert_gating_func", "qwen3moe", 2),
    ("expert_weights_norm", "qwen3moe", False),
    ("expert_weights_scale", "qwen3moe", 2.5),
    ("expert_group_count", "qwen3moe", 8),
    ("leading_dense_block_count", "qwen3moe", 1),
    ("interleave_moe_layer_step", "qwen3moe", 2),
    ("expert_count", "qwen2", 8),
    ("attn_logit_softcapping", "llama", 50.0),
    ("final_logit_softcapping", "llama", 30.0),
    ("attention.value_length", "llama", 64),
    ("attention.head_count", "llama", [8, 8, 4]),
    ("attention.head_count_kv", "llama", [2, 2, 1]),
    ("feed_forward_length", "llama", [512, 512, 256]),
)
"""A key, an architecture, and a value that it does not have there."""
TENSORS: Final = ("blk.0.ssm_in.weight", "blk.0.attn_kv_a_mqa.weight", "v.patch_embd.weight")


def said(attempt: Callable[[], object]) -> str:
    """The error of an attempt; the empty string where there is none."""
    try:
        attempt()
    except (UnsupportedModel, BadConfig) as error:
        return f"`{error.message}`"
    except OmniError as error:
        return f"`{type(error).__name__}: {error.message}`"
    return ""


def models() -> Iterator[tuple[str, str]]:
    """What no engine runs: (what, error)."""
    yield (
        "architecture `mamba`",
        said(lambda: ModelSpec.from_metadata_untrusted({"general.architecture": "mamba"}, [])),
    )
    for key, architecture, value in KEYS:
        metadata, names = described(architecture)
        metadata[f"{architecture}.{key}"] = value
        yield (
            f"`{key}` of {architecture}: `{value}`",
            said(lambda m=metadata, n=names: ModelSpec.from_metadata_untrusted(m, n)),  # type: ignore[misc]
        )
    for tensor in TENSORS:
        metadata, names = described("llama")
        yield (
            f"a tensor `{tensor}`",
            said(lambda m=metadata, n=[*names, tensor]: ModelSpec.from_metadata_untrusted(m, n)),  # type: ignore[misc]
        )
    for name in ("bert", "rwkv", "t5"):
        tokenizer = {"tokenizer.ggml.model": name, "tokenizer.ggml.tokens": ["a"]}
        yield f"tokenizer `{name}`", said(lambda t=tokenizer: Tokenizer.from_metadata_untrusted(t))  # type: ignore[misc]


def described(architecture: str) -> tuple[dict[str, Any], list[str]]:
    """Metadata and names of tensors of a model that is supported."""
    _, source = noise_model(architecture)
    return dict(source.metadata), list(source.names())


def of_engine(name: str) -> Iterator[tuple[str, str]]:
    """What one engine lacks: (what, error)."""
    engine = get_engine(name)
    for architecture in FAMILIES:
        spec, source = noise_model(architecture, block_count=1)
        whole = StageSpec.whole(spec)
        yield f"architecture {architecture}", said(lambda w=whole, s=source: engine.load(w, s, context=8))  # type: ignore[misc]
    for kind in (*SUPPORTED, *LATTICES, *OTHER_TYPES):
        spec, source = noise_model("llama", block_count=1)
        source.types["blk.0.ffn_up.weight"] = by_name(kind).name
        whole = StageSpec.whole(spec)
        yield f"type {kind}", said(lambda w=whole, s=source: engine.load(w, s, context=8))  # type: ignore[misc]
    spec, source = noise_model("llama", block_count=1)
    for kept in ("full", "q8"):
        yield (
            f"`--kv {kept}`",
            said(lambda k=kept: engine.load(StageSpec.whole(spec), source, context=8, kv=k)),  # type: ignore[misc]
        )


def text() -> str:
    """The whole list, as Markdown."""
    lines = [
        "# What is not supported, and what is said of it",
        "",
        "Made by `python -m tests.parity.unsupported --write`, which tries each of these on models of",
        "noise; a test holds this file against what is said now. An engine's section names what it",
        "refuses; all else of `tests/parity/unsupported.py` loads.",
        "",
        "## By every engine",
        "",
        *table(models()),
    ]
    for name in sorted(ENGINES):
        lines += ["", f"## By {name}", "", *table(one for one in of_engine(name) if one[1])]
    return "\n".join(lines) + "\n"


def table(rows: Iterator[tuple[str, str]]) -> list[str]:
    return [
        "| what | error |",
        "|---|---|",
        *(f"| {what} | {error.replace('|', chr(92) + '|')} |" for what, error in rows),
    ]


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        FILE.write_text(text(), encoding="utf-8")
    else:
        print(text(), end="")

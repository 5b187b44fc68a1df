"""Token ids against llama.cpp: its own test vocabularies, and what it said for the reference model."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from omninfer.tokenizer import Tokenizer
from omnistore.chunker.gguf import read_header_untrusted

VOCABULARIES = ["gpt-2", "llama-bpe", "llama-spm", "qwen2"]
MODELS = ["stories260K-F32.gguf", "stories260K-F16.gguf", "stories260K-Q8_0.gguf", "stories260K-Q4_0.gguf"]
SEPARATOR = "\n__ggml_vocab_test__\n"


def tokenizer_of(path: Path) -> Tokenizer:
    data = path.read_bytes()
    return Tokenizer.from_metadata_untrusted(
        read_header_untrusted(data, file_size=len(data), name=path.name).metadata
    )


@pytest.mark.parametrize("name", VOCABULARIES)
def test_every_line_of_the_reference(shared: Path, name: str) -> None:
    path = shared / "vocab" / f"ggml-vocab-{name}.gguf"
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split(SEPARATOR)
    if not texts[-1]:  # what follows the last separator is no text
        texts.pop()
    lines = path.with_suffix(".gguf.out").read_text().splitlines()
    assert len(texts) == len(lines) > 40
    tokenizer = tokenizer_of(path)
    for text, line in zip(texts, lines, strict=True):
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert ids == [int(word) for word in line.split()], repr(text)
        assert tokenizer.decode(ids) in (text, " " + text)


def test_a_large_vocabulary_builds_fast(shared: Path) -> None:
    path = shared / "vocab" / "ggml-vocab-llama-bpe.gguf"
    started = time.process_time()
    assert tokenizer_of(path).vocab_size == 128256
    assert time.process_time() - started < 5  # about 1 s; the bound catches an accidental square


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("gpt-2", ["<|endoftext|>"]),
        ("llama-bpe", ["<|end_of_text|>", "<|eot_id|>"]),
        ("llama-spm", ["</s>"]),
        ("qwen2", ["<|endoftext|>", "<|im_end|>"]),
    ],
)
def test_ends_of_generation(shared: Path, name: str, ends: list[str]) -> None:
    tokenizer = tokenizer_of(shared / "vocab" / f"ggml-vocab-{name}.gguf")
    assert sorted(tokenizer.decode([id_], special=True) for id_ in tokenizer.eog) == sorted(ends)


def test_special_tokens_only_where_they_are_asked_for(shared: Path) -> None:
    tokenizer = tokenizer_of(shared / "vocab" / "ggml-vocab-llama-bpe.gguf")
    text = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    parsed = tokenizer.encode(text, add_special=True, parse_special=True)
    assert parsed == [128000, 128006, 882, 128007, 271, 13347, 128009]
    plain = tokenizer.encode(text, add_special=False, parse_special=False)
    assert max(plain) < 128000
    assert tokenizer.decode(parsed) == "user\n\nHi"
    assert tokenizer.decode(parsed, special=True) == "<|begin_of_text|>" + text
    assert tokenizer.decode(plain) == text


@pytest.mark.parametrize("name", MODELS)
def test_prompts_and_completions_of_the_reference_model(shared: Path, name: str) -> None:
    tokenizer = tokenizer_of(shared / "models" / name)
    cases = json.loads((shared / "models" / "reference.json").read_text())[name]
    assert len(cases) == 4
    for case in cases:
        assert tokenizer.encode(case["prompt"], add_special=True, parse_special=True) == case["prompt_tokens"]
        assert tokenizer.decode(case["tokens"]) == case["text"]
        stream = tokenizer.stream()
        assert "".join(map(stream.push, case["tokens"])) + stream.flush() == case["text"]

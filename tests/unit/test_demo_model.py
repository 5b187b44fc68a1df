"""The model in manifests/demo, through omni's own tokenizer and engine, against what llama.cpp says."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omninfer.chat import ChatTemplate
from omninfer.engines import FileTensorSource, StageSpec, get_engine
from omninfer.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parents[2] / "manifests" / "demo"
MODEL = DEMO / "omni-demo-F16.gguf"
ANSWERS: list[dict[str, Any]] = json.loads((DEMO / "reference.json").read_text())["answers"]


@pytest.fixture(scope="module")
def source() -> FileTensorSource:
    return FileTensorSource(MODEL)


@pytest.fixture(scope="module")
def tokenizer(source: FileTensorSource) -> Tokenizer:
    return Tokenizer.from_metadata_untrusted(source.metadata)


def greedy(source: FileTensorSource, cuts: tuple[int, ...], prompt: list[int], count: int) -> list[int]:
    """At most `count` likeliest tokens, from stages cut at these layers, up to the end of the text."""
    model = source.model()
    edges = [0, *cuts, model.layers]
    engine = get_engine("numpy")
    specs = [
        StageSpec(model, first, last, embed=first == 0, head=last == model.layers)
        for first, last in itertools.pairwise(edges)
    ]
    stages = [engine.load(spec, source, context=256) for spec in specs]
    fed, tokens = np.array(prompt, np.int32), list[int]()
    position = 0
    while len(tokens) < count:
        x: Any = fed
        for stage in stages:
            x = stage.forward(x, slot=0, position=position)
        position += len(fed)
        token = int(x[-1].argmax())
        if token == source.metadata["tokenizer.ggml.eos_token_id"]:
            break
        tokens.append(token)
        fed = np.array([token], np.int32)
    for stage in stages:
        stage.close()
    return tokens


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer["prompt"])
def test_greedy_tokens_are_those_of_llama_cpp(
    source: FileTensorSource, tokenizer: Tokenizer, answer: dict[str, Any]
) -> None:
    prompt = tokenizer.encode(answer["prompt"], add_special=True, parse_special=True)
    assert prompt == answer["prompt_tokens"]
    tokens = greedy(source, (), prompt, len(answer["tokens"]) + answer["ended"])
    assert tokens == answer["tokens"]
    assert tokenizer.decode(tokens) == answer["text"]


def test_stages_say_what_the_whole_model_says(source: FileTensorSource) -> None:
    answer = ANSWERS[0]
    assert greedy(source, (3, 5), answer["prompt_tokens"], 40) == answer["tokens"][:40]


def test_the_texts_are_words_that_the_grammar_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    stories = importlib.import_module("stories")
    marks = (stories.USER, stories.ASSISTANT, "<end>")
    learned = " ".join(stories.documents(1, 4000, "<end>"))
    for mark in marks:
        learned = learned.replace(mark, " ")
    for answer in ANSWERS:
        assert stories.words(answer["text"]) <= stories.words(learned), answer["prompt"]
        assert answer["ended"], "a text that does not end within the context is no story"


def test_every_byte_can_be_written(tokenizer: Tokenizer) -> None:
    text = "".join(map(chr, range(0x250))) + "漢字 🦊\r\n\t "
    assert tokenizer.decode(tokenizer.encode(text, add_special=False, parse_special=False)) == text


def test_the_file_is_small_and_says_what_it_is(source: FileTensorSource, tokenizer: Tokenizer) -> None:
    assert MODEL.stat().st_size <= 2_000_000
    assert source.metadata["general.license"] == "apache-2.0"
    assert source.metadata["general.architecture"] == "llama"
    assert source.model().layers == 8
    assert tokenizer.bos is not None
    assert tokenizer.eos in tokenizer.eog


def test_the_chat_template_writes_the_form_of_the_training_texts(source: FileTensorSource) -> None:
    turns = [("user", "Hello."), ("assistant", "Hello!"), ("user", "Who is Milo?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    written = ChatTemplate.from_metadata_untrusted(source.metadata).render(messages)
    assert written == "<|begin|><|user|>Hello.<|assistant|>Hello!<|end|><|user|>Who is Milo?<|assistant|>"

"""Token ids that llama.cpp gave (`make parity-tokens`), by pre-tokenizer and variant."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from omninfer.tokenizer import Tokenizer
from tests.parity.texts import TEXTS
from tests.parity.tokens import APPROXIMATED, MODES, VECTORS, cases


@cache
def vectors() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(VECTORS.read_text())
    return document


def test_the_vectors_are_of_these_texts() -> None:
    assert vectors()["texts"] == list(TEXTS)
    assert vectors()["cases"].keys() == cases().keys()


@pytest.mark.parametrize("name", cases())
def test_ids_are_those_of_llama_cpp(name: str) -> None:
    base, changes = cases()[name]
    tokenizer = Tokenizer.from_metadata_untrusted(vectors()["bases"][base] | changes)
    pool, row = vectors()["ids"], vectors()["cases"][name]
    asked = [(text, place, *mode) for mode in MODES for place, text in enumerate(TEXTS)]
    compared = 0
    for (text, place, add_special, parse_special), number in zip(asked, row, strict=True):
        if place in APPROXIMATED.get(name, (frozenset(), ""))[0]:
            continue
        ids = tokenizer.encode(text, add_special=add_special, parse_special=parse_special)
        assert ids == [int(id_) for id_ in pool[number].split()], text
        compared += 1
    assert compared >= len(asked) - 2 * 5

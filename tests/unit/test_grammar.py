"""JSON of a schema: what is drawn from what is allowed validates; hostile schemas are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
import trio
from numpy.typing import NDArray

from omninfer.generation import GenerationParams, generate
from omninfer.grammar import MAX_SCHEMA, JsonSchema
from omninfer.sampling import SamplingParams
from omninfer.testing.tiny_vocab import tiny_bpe, tiny_spm
from omninfer.tokenizer import Tokenizer
from omnistore.errors import InputError

TOKENIZERS = {
    "sentencepiece": Tokenizer.from_metadata_untrusted(tiny_spm()),
    "byte-level": Tokenizer.from_metadata_untrusted(tiny_bpe()),
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "n": {"type": "integer", "minimum": -3, "maximum": 12},
            "kind": {"enum": ["\u00e9", "\u4e2d\u6587", "\U0001f600"]},
            "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
        "required": ["name", "n", "kind", "list"],
        "additionalProperties": False,
    },
    "recursive": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                    "tag": {"type": "string", "pattern": "^[a-c]{1,3}$"},
                },
                "required": ["left", "tag"],
                "additionalProperties": False,
            }
        },
    },
    "constant": {"const": {"a": [1, None]}},
}


class Noise:
    """Logits of a seed, for a model whose vocabulary is padded."""

    context = 2000

    def __init__(self, vocab: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._vocab = vocab

    cached = 0

    async def logits(self, history: Sequence[int]) -> NDArray[np.float32]:
        await trio.lowlevel.checkpoint()
        return self._rng.normal(0, 3, self._vocab).astype(np.float32)


@pytest.mark.trio
@pytest.mark.parametrize("family", TOKENIZERS)
@pytest.mark.parametrize("name", SCHEMAS)
async def test_what_ends_by_itself_is_json_of_the_schema(family: str, name: str) -> None:
    tokenizer, schema = TOKENIZERS[family], SCHEMAS[name]
    vocab = tokenizer.vocab_size + 13
    ready = JsonSchema.parse_untrusted(json.dumps(schema), tokenizer, vocab)
    ended = 0
    for seed in range(20):
        text = ready.begin()
        params = GenerationParams(400, sampling=SamplingParams(temperature=1, seed=seed))
        done = await generate(
            Noise(vocab, seed), tokenizer, [1], params, lambda text, token: None, None, text
        )
        if done.finish == "length":
            assert not text.complete or text.allowed().any()
            continue
        ended += 1
        assert text.complete
        jsonschema.validate(json.loads(done.text), schema)
    assert ended >= 10


@pytest.mark.trio
async def test_a_text_that_is_cut_off_says_so() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    text = JsonSchema.parse_untrusted(
        json.dumps(SCHEMAS["constant"]), tokenizer, tokenizer.vocab_size
    ).begin()
    params = GenerationParams(4)
    source = Noise(tokenizer.vocab_size, 0)
    done = await generate(source, tokenizer, [1], params, lambda text, token: None, None, text)
    assert (done.finish, text.complete) == ("length", False)


REFUSED: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "no JSON"),
    "a list": ("[]", "not a list"),
    "a number": ("1", "not a int"),
    "an unknown type": ('{"type": "foo"}', "foo"),
    "somewhere else": ('{"$ref": "http://127.0.0.1:1/x"}', "Resource"),
    "a broken pattern": ('{"type": "string", "pattern": "("}', "regex"),
    "an unknown format": ('{"type": "string", "format": "nope"}', "nope"),
    "a keyword that is not supported": ('{"not": {}}', "not"),
    "itself": ('{"$ref": "#"}', "no text"),
    "false": ("false", "can not be used"),
    "too long": (json.dumps({"enum": ["x" * MAX_SCHEMA]}), "characters"),
    "too deep": ('{"a":' * 200 + "1" + "}" * 200, "deep"),
    "far too deep": ("[" * 100_000, "JSON"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_hostile_schemas_are_refused(fault: str) -> None:
    schema, message = REFUSED[fault]
    with pytest.raises(InputError, match=message):
        JsonSchema.parse_untrusted(schema, TOKENIZERS["byte-level"], TOKENIZERS["byte-level"].vocab_size)


def test_the_library_is_imported_only_when_used() -> None:
    code = "import sys, omninfer.cli.commands; print('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"

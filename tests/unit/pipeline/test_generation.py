"""The generation loop over made-up logits and a real tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import trio
from numpy.typing import NDArray

from omninfer.generation import GenerationParams, generate, new_generation
from omninfer.sampling import SamplingParams
from omninfer.tokenizer import Tokenizer
from omnistore.errors import InputError

pytestmark = pytest.mark.trio

WORDS = ["<unk>", "<s>", "</s>", "▁one", "▁two", "▁three", "<0xF0>", "<0x9F>", "<0x8E>", "<0x88>", "▁end"]
KINDS = [2, 3, 3, 1, 1, 1, 6, 6, 6, 6, 1]
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_metadata_untrusted(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": WORDS,
            "tokenizer.ggml.token_type": KINDS,
            "tokenizer.ggml.scores": [0.0] * len(WORDS),
        }
    )


class Script:
    """Says the tokens of a script, whatever is asked; remembers what it was asked."""

    def __init__(self, tokens: Sequence[int], context: int = 100) -> None:
        self.context = context
        self.asked: list[list[int]] = []
        self._tokens = tokens

    cached = 0

    async def logits(self, history: Sequence[int]) -> NDArray[np.float32]:
        await trio.lowlevel.checkpoint()
        self.asked.append(list(history))
        logits = np.zeros(len(WORDS), dtype=np.float32)
        logits[self._tokens[len(self.asked) - 1]] = 10
        return logits


@pytest.mark.parametrize(
    ("script", "params", "text", "tokens", "finish"),
    [
        ([3, 4, 2], {}, " one two", [3, 4], "eos"),
        ([3, 4, 5, 5], {"max_tokens": 3}, " one two three", [3, 4, 5], "length"),
        ([], {"max_tokens": 0}, "", [], "length"),
        ([3, 4, 5, 5], {"stops": ("wo th",)}, " one t", [3, 4, 5], "stop"),
        ([3, 4, 2], {"stops": ("two three",)}, " one two", [3, 4], "eos"),
        ([3, 6, 7, 8, 9, 2], {}, " one\U0001f388", [3, 6, 7, 8, 9], "eos"),
        ([3, 6, 7, 2], {}, " one\ufffd", [3, 6, 7], "eos"),
        ([3, 6, 7], {"max_tokens": 3, "stops": ("\ufffd",)}, " one", [3, 6, 7], "length"),
    ],
    ids=["eos", "max", "none", "stop", "no stop", "bytes", "cut bytes", "stop in cut bytes"],
)
async def test_how_a_generation_ends(
    tokenizer: Tokenizer,
    script: list[int],
    params: dict[str, object],
    text: str,
    tokens: list[int],
    finish: str,
) -> None:
    shown: list[str] = []
    wanted = GenerationParams(sampling=GREEDY, **params)  # type: ignore[arg-type]  # as the cases above say
    done = await generate(Script(script), tokenizer, [1], wanted, lambda piece, token: shown.append(piece))
    assert (done.text, done.tokens, done.finish) == (text, tokens, finish)
    assert "".join(shown) == text
    assert all(shown)


async def test_the_history_grows_by_one_token_at_a_time(tokenizer: Tokenizer) -> None:
    script = Script([3, 4, 2])
    await generate(script, tokenizer, [1, 5], GenerationParams(sampling=GREEDY), lambda text, token: None)
    assert script.asked == [[1, 5], [1, 5, 3], [1, 5, 3, 4]]


async def test_a_full_context_ends_the_text(tokenizer: Tokenizer) -> None:
    params = GenerationParams(sampling=GREEDY)
    done = await generate(Script([3] * 9, context=4), tokenizer, [1, 5], params, lambda text, token: None)
    assert (done.tokens, done.finish) == ([3, 3, 3], "length")


async def test_a_prompt_beyond_the_context_is_refused(tokenizer: Tokenizer) -> None:
    script, params = Script([3, 3], context=4), GenerationParams(sampling=GREEDY)
    with pytest.raises(InputError, match="5 tokens, and the context has room for 4"):
        await generate(script, tokenizer, [1, 5, 5, 5, 5], params, lambda text, token: None)
    assert script.asked == []
    done = await generate(script, tokenizer, [1, 5, 5, 5], params, lambda text, token: None)
    assert (done.tokens, done.finish) == ([3], "length")


async def test_an_interruption_leaves_what_there_was(tokenizer: Tokenizer) -> None:
    generation = new_generation([1])
    with trio.CancelScope() as scope:
        await generate(
            Script([3] * 99),
            tokenizer,
            [1],
            GenerationParams(),
            lambda text, token: scope.cancel(),
            generation,
        )
    assert scope.cancelled_caught
    assert (generation.text, generation.finish) == (" one", "interrupted")


async def test_log_probabilities_come_with_their_tokens(tokenizer: Tokenizer) -> None:
    params = GenerationParams(sampling=GREEDY, logprobs=2)
    done = await generate(Script([3, 4, 2]), tokenizer, [1], params, lambda text, token: None)
    assert [one.token for one in done.logprobs] == done.tokens == [3, 4]
    assert all(one.top[0] == (one.token, one.logprob) and len(one.top) == 2 for one in done.logprobs)
    with pytest.raises(InputError, match="logprobs"):
        GenerationParams(logprobs=1000)


async def test_an_empty_prompt_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="empty"):
        await generate(Script([3]), tokenizer, [], GenerationParams(), lambda text, token: None)
    with pytest.raises(InputError, match="max-tokens"):
        GenerationParams(max_tokens=-1)

"""From a prompt's tokens to text: sample, keep the history, stream what can be shown.

The history and the sampler live here, on the coordinator, and nowhere else. A lost stage therefore costs
a new plan and feeding the history again, never the answer: no token is sampled twice, and the next one is
drawn from the same state as without the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

import numpy as np
import trio
from numpy.typing import NDArray

from omninfer.sampling import MAX_LOGPROBS, Mask, Sampler, SamplingParams, StopMatcher, logprobs
from omninfer.tokenizer import Tokenizer
from omnistore.errors import InputError

Finish = Literal["eos", "stop", "length", "interrupted"]
Shown = Callable[[str, int], None]
"""Called with each piece of text that may be shown, and the token that completed it."""
MAX_TOKENS: Final = 1 << 20


class LogitsSource(Protocol):
    """What answers logits: `omninfer.coordinator.Coordinator`, whatever happens to its lenders."""

    @property
    def context(self) -> int: ...

    @property
    def cached(self) -> int:
        """Tokens of the last history that had not to be computed: a slot held them."""
        ...

    async def logits(self, history: Sequence[int]) -> NDArray[np.float32]: ...


class Constraint(Protocol):
    """What may come next in a text that is to have a form (`omninfer.grammar`)."""

    def allowed(self) -> Mask:
        """bool[vocab]."""
        ...

    def accept(self, token: int) -> None:
        """Take note of a token that was chosen."""
        ...

    @property
    def complete(self) -> bool:
        """The text so far has the form."""
        ...

    @property
    def finished(self) -> bool:
        """It has, and nothing can follow."""
        ...


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model thought of one token, and of the likeliest in its place: natural logarithms."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """When to stop, and how to choose."""

    max_tokens: int = 256
    stops: tuple[str, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    logprobs: int | None = None
    """How many alternatives to note for each token; None notes nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_tokens <= MAX_TOKENS:
            raise InputError(f"max-tokens is {self.max_tokens}, outside 0 to {MAX_TOKENS}")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InputError(f"logprobs is {self.logprobs}, outside 0 to {MAX_LOGPROBS}")


@dataclass(slots=True)
class Generation:
    """What came of one prompt; filled in as it goes, so that an interruption leaves what there was."""

    prompt: tuple[int, ...]
    tokens: list[int]
    text: str
    finish: Finish
    computed: int = 0
    """Tokens of prompt and text that had to be computed; the others were still in the caches."""
    cached: int = 0
    """Tokens of the prompt that were in the caches."""
    prompt_seconds: float = 0.0
    """To the first token."""
    seconds: float = 0.0
    """From the first token to the last."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of each token, if they were asked for."""

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: the first token comes with the prompt."""
        return (len(self.tokens) - 1) / self.seconds if self.seconds > 0 and len(self.tokens) > 1 else 0.0


async def generate(
    source: LogitsSource,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    params: GenerationParams,
    shown: Shown,
    generation: Generation | None = None,
    constraint: Constraint | None = None,
) -> Generation:
    """Continue `prompt`. Text is passed to `shown` as soon as no stop string can begin in it.

    The tokens that end a turn (EOS and its like) end the generation and are not part of it.
    `generation`, when given, is filled instead of a new one; `constraint` says what may come next.
    Raises `InferenceError`, `InputError`.
    """
    _check_prompt(prompt, source.context)
    result = generation or new_generation(prompt)
    sampler, stream, matcher = Sampler(params.sampling), tokenizer.stream(), StopMatcher(params.stops)
    history = list(prompt)
    started = trio.current_time()

    def show(text: str, token: int) -> None:
        if text:
            result.text += text
            shown(text, token)

    while True:
        if len(result.tokens) >= params.max_tokens or len(history) > source.context:
            result.finish = "length"
            break
        logits = await source.logits(history)
        token = sampler.sample(logits, history, constraint.allowed() if constraint else None)
        now = trio.current_time()
        if not result.tokens:
            result.prompt_seconds, started = now - started, now
            result.cached = source.cached
        result.seconds = now - started
        if token in tokenizer.eog:
            result.finish = "eos"
            break
        history.append(token)
        result.tokens.append(token)
        if constraint is not None:
            constraint.accept(token)
        if params.logprobs is not None:
            own, top = logprobs(logits, token, params.logprobs)
            result.logprobs.append(TokenLogprobs(token, own, tuple(top)))
        text, stopped = matcher.push(stream.push(token))
        show(text, token)
        if stopped:
            result.finish = "stop"
            return result
        if constraint is not None and constraint.finished:
            result.finish = "stop"
            break
    # What was held back for a stop that never came, or for bytes that never became a character.
    text, stopped = matcher.push(stream.flush())
    show(text if stopped else text + matcher.flush(), history[-1])
    return result


def new_generation(prompt: Sequence[int]) -> Generation:
    """One that was interrupted before it began."""
    return Generation(tuple(prompt), [], "", "interrupted")


def _check_prompt(prompt: Sequence[int], context: int) -> None:
    if not prompt:
        raise InputError("the prompt is empty, and the model has no token to begin with")
    if len(prompt) > context:
        raise InputError(
            f"the prompt has {len(prompt)} tokens, and the context has room for {context}",
            remedy="Shorten the prompt, or raise --context as far as the model was made for.",
        )

"""From logits to the next token, and from pieces of text to the place where a stop string ends it.

Pure: the randomness of a `Sampler` is its own PCG64 generator, seeded by its parameters, so the
same logits, parameters and numpy always give the same tokens, on any machine. Steps are those of
llama.cpp in its default order: repeat penalty, top-k, top-p, min-p, temperature. Models, tokenizers
and limits on the number of tokens are elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from omnistore.errors import InferenceError, InputError

Floats = NDArray[np.floating]
Ids = NDArray[np.intp]

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
"""Together these keep the search for stops to milliseconds a token."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens; refuses values outside their range with an InputError naming the parameter."""

    temperature: float = 0.8
    """0 is greedy: the likeliest token, the lowest id among equals."""
    top_k: int = 40
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the likeliest tokens that together reach this probability; 1 keeps all."""
    min_p: float = 0.05
    """Keep tokens with at least this fraction of the likeliest one's probability; 0 keeps all."""
    seed: int = 0
    repeat_penalty: float = 1.0
    """Divides positive and multiplies negative logits of recent tokens; 1 leaves them."""
    repeat_last_n: int = 64
    """How many tokens are recent."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 100)
        _check("top_k", self.top_k, 0, 1 << 31, whole=True)
        _check("top_p", self.top_p, 0, 1)
        _check("min_p", self.min_p, 0, 1)
        _check("seed", self.seed, 0, (1 << 64) - 1, whole=True)
        _check("repeat_penalty", self.repeat_penalty, 0.01, 100)
        _check("repeat_last_n", self.repeat_last_n, 0, 1 << 20, whole=True)


def _check(name: str, value: float, low: float, high: float, *, whole: bool = False) -> None:
    kind = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r}, not a {'whole ' if whole else ''}number")
    if not low <= value <= high:
        raise InputError(f"{name} is {value}, outside {low} to {high}")


class Sampler:
    """Chooses the tokens of one generation."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._rng = np.random.Generator(np.random.PCG64(params.seed))

    def sample(self, logits: Floats, history: Sequence[int] = ()) -> int:
        """The next token's id, given one logit per token of the vocabulary and the ids so far.

        Each call that is not greedy draws exactly one number. Raises InferenceError for logits that
        are no vector of finite numbers, the sign of a damaged weight or a broken stage.
        """
        logits = np.asarray(logits)
        if logits.ndim != 1 or not logits.size:
            raise InferenceError(f"logits have the shape {logits.shape}, not one number per token")
        if not np.isfinite(logits).all():
            bad = int((~np.isfinite(logits)).argmax())
            raise InferenceError(f"the logit of token {bad} is {logits[bad]}: the model's output is damaged")
        params = self._params
        logits = penalise(logits, history, params)
        if params.temperature == 0:
            return int(logits.argmax())
        ids, kept = candidates(logits, params)
        with np.errstate(over="ignore"):  # the least temperatures leave only the likeliest: exp(-inf) is 0
            scaled = (kept - kept.max()) / params.temperature
        cumulative = np.exp(scaled).cumsum()
        chosen = np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right")
        return int(ids[min(int(chosen), len(ids) - 1)])


def penalise(logits: Floats, history: Sequence[int], params: SamplingParams) -> Floats:
    """Logits with recent tokens made less likely; the argument is left as it is."""
    if params.repeat_penalty == 1 or not params.repeat_last_n or not history:
        return logits
    recent = np.unique(np.asarray(history[-params.repeat_last_n :], dtype=np.intp))
    recent = recent[(recent >= 0) & (recent < len(logits))]
    changed = logits.astype(np.float64)
    values = changed[recent]
    changed[recent] = np.where(values > 0, values / params.repeat_penalty, values * params.repeat_penalty)
    return changed


def candidates(logits: Floats, params: SamplingParams) -> tuple[Ids, Floats]:
    """The ids that top-k, top-p and min-p leave, and their logits as float64.

    Equal logits rank by id. At least one token is always left. Probabilities are those before the
    temperature, as in llama.cpp: a high temperature does not let unlikely tokens in.
    """
    ids = np.arange(len(logits), dtype=np.intp)
    kept = logits.astype(np.float64)
    if 0 < params.top_k < len(kept):
        threshold = np.partition(kept, -params.top_k)[-params.top_k]
        ids = np.flatnonzero(kept >= threshold)
        ids = ids[np.argsort(-kept[ids], kind="stable")][: params.top_k]
        kept = kept[ids]
    if params.top_p < 1:
        order = np.argsort(-kept, kind="stable")
        ids, kept = ids[order], kept[order]
        cumulative = np.exp(kept - kept[0]).cumsum()
        count = int(np.searchsorted(cumulative, params.top_p * cumulative[-1], side="left")) + 1
        ids, kept = ids[:count], kept[:count]
    if params.min_p > 0:
        likely = kept >= kept.max() + math.log(params.min_p)
        ids, kept = ids[likely], kept[likely]
    return ids, kept


class StopMatcher:
    """Ends a stream of text before the first stop string, wherever the pieces are cut.

    The first stop is the one that is complete first; of several complete at the same character, the
    longest. So the result depends on the text alone and not on how it came in pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or len(stops) > MAX_STOPS:
            raise InputError(f"stop is not a list of at most {MAX_STOPS} strings")
        for stop in stops:
            if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
                raise InputError(f"a stop string has {len(stop)} characters, not 1 to {MAX_STOP_CHARACTERS}")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece; returns what may be shown, and whether a stop was met (now or before)."""
        if self._stopped:
            return "", True
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held, self._stopped = "", True
            return text[: min(found)[1]], True
        cut = len(text) - self._unfinished(text)
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """What was held back for a stop that never came."""
        rest, self._held = self._held, ""
        return rest

    def _unfinished(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop begins."""
        for length in range(min(len(text), max(map(len, self._stops), default=1) - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

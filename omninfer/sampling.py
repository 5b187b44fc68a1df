"""From logits to the next token, and from pieces of text to the place where a stop string ends it.

Pure: the randomness of a `Sampler` is its own PCG64 generator, seeded by its parameters, so the
same logits, parameters and numpy always give the same tokens, on any machine. Steps are those of
llama.cpp in its default order: logit bias, penalties, top-k, typical, top-p, min-p, temperature. A mask of
allowed tokens comes before all of them. Models, tokenizers and limits on the number of tokens are elsewhere.
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
Mask = NDArray[np.bool_]

MAX_BIASES = 1024
MAX_LOGPROBS = 64
"""Alternatives told of each token."""
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
    typical_p: float = 1.0
    """Keep the tokens whose surprise is nearest to the expected one, up to this probability; 1 keeps all
    (Meister et al., Locally Typical Sampling, 2022)."""
    top_p: float = 0.95
    """Keep the likeliest tokens that together reach this probability; 1 keeps all."""
    min_p: float = 0.05
    """Keep tokens with at least this fraction of the likeliest one's probability; 0 keeps all."""
    seed: int = 0
    repeat_penalty: float = 1.0
    """Divides positive and multiplies negative logits of recent tokens; 1 leaves them."""
    repeat_last_n: int = 64
    """How many tokens, prompt included, are recent."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of recent tokens; a negative one asks for repetition."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a recent token for each time that it occurs."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these tokens; -10000 forbids one."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 100)
        _check("top_k", self.top_k, 0, 1 << 31, whole=True)
        _check("top_p", self.top_p, 0, 1)
        _check("typical_p", self.typical_p, 0, 1)
        _check("min_p", self.min_p, 0, 1)
        _check("seed", self.seed, 0, (1 << 64) - 1, whole=True)
        _check("repeat_penalty", self.repeat_penalty, 0.01, 100)
        _check("repeat_last_n", self.repeat_last_n, 0, 1 << 20, whole=True)
        _check("presence_penalty", self.presence_penalty, -100, 100)
        _check("frequency_penalty", self.frequency_penalty, -100, 100)
        if len(self.logit_bias) > MAX_BIASES:
            raise InputError(f"logit_bias names {len(self.logit_bias)} tokens, more than {MAX_BIASES}")
        for token, bias in self.logit_bias:
            _check("a token of logit_bias", token, 0, 1 << 31, whole=True)
            _check(f"logit_bias of token {token}", bias, -10_000, 10_000)


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

    def sample(self, logits: Floats, history: Sequence[int] = (), allowed: Mask | None = None) -> int:
        """The next token's id, given one logit per token of the vocabulary and the ids so far.

        `allowed`, bool[vocab], leaves only some tokens to choose from. Each call that is not greedy draws
        exactly one number. Raises InferenceError for logits that are no vector of finite numbers, the sign of
        a damaged weight or a broken stage, and InputError for a bias of a token that the model lacks.
        """
        logits = checked(logits)
        if allowed is not None:
            if not allowed.any():
                raise InferenceError("no token is allowed here")
            logits = np.where(allowed, logits, -np.inf)
        logits = penalise(biased(logits, self._params), history, self._params)
        if self._params.temperature == 0:
            return int(logits.argmax())
        ids, weights = _weighed(*candidates(logits, self._params), self._params.temperature)
        cumulative = weights.cumsum()
        chosen = np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right")
        return int(ids[min(int(chosen), len(ids) - 1)])


def checked(logits: Floats) -> Floats:
    """Logits as a vector of finite numbers, or an InferenceError."""
    logits = np.asarray(logits)
    if logits.ndim != 1 or not logits.size:
        raise InferenceError(f"logits have the shape {logits.shape}, not one number per token")
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits)).argmax())
        raise InferenceError(f"the logit of token {bad} is {logits[bad]}: the model's output is damaged")
    return logits


def distribution(logits: Floats, history: Sequence[int], params: SamplingParams) -> tuple[Ids, Floats]:
    """The ids that can be drawn, in ascending order, and their probabilities; greedily, one id."""
    logits = penalise(biased(checked(logits), params), history, params)
    if params.temperature == 0:
        return np.array([logits.argmax()], dtype=np.intp), np.ones(1)
    ids, weights = _weighed(*candidates(logits, params), params.temperature)
    order = ids.argsort()
    return ids[order], weights[order] / weights.sum()


def logprobs(logits: Floats, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """ln p of a token, and of the `count` likeliest: by the model alone, before any step of sampling."""
    values = checked(logits).astype(np.float64)
    values -= values.max()
    values -= math.log(np.exp(values).sum())
    order = np.argsort(-values, kind="stable")[:count]
    return float(values[token]), [(int(id_), float(values[id_])) for id_ in order]


def _weighed(ids: Ids, kept: Floats, temperature: float) -> tuple[Ids, Floats]:
    """The same ids with weights to draw them by."""
    with np.errstate(over="ignore"):  # the least temperatures leave only the likeliest: exp(-inf) is 0
        return ids, np.exp((kept - kept.max()) / temperature)


def biased(logits: Floats, params: SamplingParams) -> Floats:
    """Logits with the biases added; the argument is left as it is."""
    if not params.logit_bias:
        return logits
    changed = logits.astype(np.float64)
    for token, bias in params.logit_bias:
        if token >= len(changed):
            raise InputError(f"logit_bias names token {token}, and the vocabulary has {len(changed)}")
        changed[token] += bias
    return changed


def penalise(logits: Floats, history: Sequence[int], params: SamplingParams) -> Floats:
    """Logits with recent tokens made less likely; the argument is left as it is."""
    changes = params.repeat_penalty != 1 or params.presence_penalty or params.frequency_penalty
    if not changes or not params.repeat_last_n or not history:
        return logits
    recent, counts = np.unique(
        np.asarray(history[-params.repeat_last_n :], dtype=np.intp), return_counts=True
    )
    known = (recent >= 0) & (recent < len(logits))
    recent, counts = recent[known], counts[known]
    changed = logits.astype(np.float64)
    values: Floats = changed[recent]
    values = np.where(values > 0, values / params.repeat_penalty, values * params.repeat_penalty)
    changed[recent] = values - counts * params.frequency_penalty - params.presence_penalty
    return changed


def candidates(logits: Floats, params: SamplingParams) -> tuple[Ids, Floats]:
    """The ids that top-k, typical, top-p and min-p leave, and their logits as float64.

    Equal logits rank by id. At least one token is always left, and none whose logit is -inf.
    Probabilities are those before the temperature, as in llama.cpp: a high temperature does not let
    unlikely tokens in.
    """
    ids = np.flatnonzero(logits > -np.inf)
    kept: Floats = logits[ids].astype(np.float64)
    if 0 < params.top_k < len(kept):
        threshold = np.partition(kept, -params.top_k)[-params.top_k]
        places = np.flatnonzero(kept >= threshold)
        places = places[np.argsort(-kept[places], kind="stable")][: params.top_k]
        ids, kept = ids[places], kept[places]
    if params.typical_p < 1:
        ids, kept = _typical(ids, kept, params.typical_p)
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


def _typical(ids: Ids, kept: Floats, share: float) -> tuple[Ids, Floats]:
    """Those whose surprise is nearest to the entropy, until they exceed this share of the probability."""
    with np.errstate(under="ignore"):
        weights = np.exp(kept - kept.max())
    surprise = math.log(weights.sum()) - (kept - kept.max())
    probabilities = weights / weights.sum()
    order = np.argsort(np.abs(surprise - (probabilities * surprise).sum()), kind="stable")
    count = int(np.searchsorted(probabilities[order].cumsum(), share, side="right")) + 1
    return ids[order[:count]], kept[order[:count]]


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

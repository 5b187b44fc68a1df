"""The vocabulary of a model, read from `tokenizer.ggml.*` and checked once.

A `Vocab` holds what both families of tokenizers need: the texts, kinds and scores of the tokens, the
special ids, and the rules about BOS, EOS and the leading space. It neither encodes nor decodes. The
metadata comes from a file that anyone may have written; after `Vocab.from_facts_untrusted` every id
is inside the vocabulary, no text occurs twice and no score is NaN. Rules and defaults are those of
llama.cpp, which GGUF files are made for; where we leave them, the reason is at the line.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from omnistore.errors import MalformedGGUF

logger = logging.getLogger(__name__)

MAX_TOKENS = 1 << 21
"""The largest published vocabularies hold about 260 thousand tokens; the rest is headroom."""

# These texts end a generation wherever they appear as one token: many files name only one of
# theirs in the metadata (a base model's EOS, say, and not the <|im_end|> of its chat tuning).
_END_TEXTS = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
        "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
        "<|end_of_text|>", "<end_of_utterance>", "<turn|>", "<|tool_response>",
        "<｜end▁of▁sentence｜>", "[e~[",
    }
)  # fmt: skip

# These do so only where the file says that they are control tokens: to Qwen, say, </s> is a tag of
# HTML and an ordinary token. (llama.cpp ends there all the same.)
_END_TEXTS_OF_CONTROL = frozenset({"</s>", "<eos>"})

# Fill-in-the-middle marks: what follows them belongs to another file or is padding.
_FILL_END_TEXTS: Mapping[str, frozenset[str]] = {
    "tokenizer.ggml.fim_pad_token_id": frozenset({"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"}),
    "tokenizer.ggml.fim_rep_token_id": frozenset(
        {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"}
    ),
    "tokenizer.ggml.fim_sep_token_id": frozenset({"<|file_sep|>"}),
}

# gpt-oss marks the parts of an answer with these: they are part of the text, not of its end.
_ALWAYS_SHOWN = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})


class TokenKind(IntEnum):
    """`tokenizer.ggml.token_type`; a number not listed here counts as UNDEFINED."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL_KINDS = (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED)
"""Tokens that are looked for in a text before anything else."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Typed access to a GGUF's metadata; every fault is a MalformedGGUF that names the key."""

    metadata: Mapping[str, object]

    def text_untrusted(self, key: str) -> str | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise MalformedGGUF(f"{key} is {type(value).__name__}, not a string")
        return value

    def flag_untrusted(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise MalformedGGUF(f"{key} is {type(value).__name__}, not a boolean")
        return value

    def index_untrusted(self, key: str) -> int | None:
        value = self.metadata.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise MalformedGGUF(f"{key} is {type(value).__name__}, not an integer")
        return value

    def strings_untrusted(self, key: str, limit: int) -> list[str] | None:
        """All elements, which must be strings that UTF-8 can hold."""
        value = self._array_untrusted(key, limit)
        if value is None:
            return None
        texts = [text for text in value if isinstance(text, str)]
        if len(texts) != len(value):
            raise MalformedGGUF(f"{key} holds something other than strings")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise MalformedGGUF(f"{key} holds a string with half of a surrogate pair") from None
        return texts

    def numbers_untrusted(self, key: str, count: int) -> np.ndarray | None:
        """At least `count` numbers, cut to `count`."""
        value = self._array_untrusted(key, MAX_TOKENS)
        if value is None:
            return None
        if len(value) < count:
            raise MalformedGGUF(f"{key} has {len(value)} elements for {count} tokens")
        # One look at the kind first: numpy would copy an array of long strings at its widest.
        if not isinstance(value[0], int | float | np.number):
            raise MalformedGGUF(f"{key} holds something other than numbers")
        try:
            return np.asarray(value[:count])
        except ValueError:  # lists among the numbers
            raise MalformedGGUF(f"{key} holds something other than numbers") from None

    def _array_untrusted(self, key: str, limit: int) -> Sequence[object] | None:
        value = self.metadata.get(key)
        if value is None:
            return None
        if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
            raise MalformedGGUF(f"{key} is {type(value).__name__}, not an array")
        if len(value) > limit:
            raise MalformedGGUF(f"{key} has {len(value)} elements, more than the {limit} read here")
        return value  # type: ignore[return-value]  # an ndarray offers what is used of a Sequence


@dataclass(frozen=True, slots=True)
class Family:
    """What a family of tokenizers assumes where the metadata is silent."""

    bos: int | None
    eos: int | None
    unknown: int | None
    add_bos: bool
    add_space_prefix: bool


@dataclass(frozen=True, slots=True)
class Vocab:
    """A checked vocabulary: the token with id `i` has `texts[i]`, `kinds[i]` and `scores[i]`."""

    texts: list[str]
    kinds: bytes
    """One TokenKind a token."""
    scores: list[float]
    """Empty where the metadata has none."""
    ids: dict[str, int]
    bos: int | None
    eos: int | None
    unknown: int | None
    eog: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    stripping: frozenset[int]
    """Special tokens after which whitespace is dropped (Phi-3)."""

    @classmethod
    def from_facts_untrusted(cls, facts: Facts, family: Family, *, always_add_bos: bool = False) -> Vocab:
        """Check and index a vocabulary; raises MalformedGGUF only."""
        texts = facts.strings_untrusted("tokenizer.ggml.tokens", MAX_TOKENS)
        if not texts:
            raise MalformedGGUF("tokenizer.ggml.tokens is missing or empty")
        texts = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]
        ids = {text: i for i, text in enumerate(texts)}
        if len(ids) != len(texts):
            twice = next(i for i, text in enumerate(texts) if ids[text] != i)
            raise MalformedGGUF(f"tokens {twice} and {ids[texts[twice]]} are both {texts[twice][:40]!r}")
        bos = _special_untrusted(facts, "bos", family.bos, len(texts))
        eos = _special_untrusted(facts, "eos", family.eos, len(texts))
        add_bos = facts.flag_untrusted("tokenizer.ggml.add_bos_token", family.add_bos) or always_add_bos
        add_eos = facts.flag_untrusted("tokenizer.ggml.add_eos_token", False)
        for wanted, id_, name in ((add_bos, bos, "bos"), (add_eos, eos, "eos")):
            if wanted and id_ is None:
                raise MalformedGGUF(
                    f"the model adds {name} to prompts but has no tokenizer.ggml.{name}_token_id"
                )
        kinds = _kinds_untrusted(facts, len(texts))
        eog = _end_of_generation_untrusted(facts, ids, kinds, eos)
        return cls(
            texts=texts,
            kinds=bytes(kinds),
            scores=_scores_untrusted(facts, len(texts)),
            ids=ids,
            bos=bos,
            eos=eos,
            unknown=_special_untrusted(facts, "unknown", family.unknown, len(texts)),
            eog=eog,
            add_bos=add_bos,
            add_eos=add_eos,
            add_space_prefix=facts.flag_untrusted("tokenizer.ggml.add_space_prefix", family.add_space_prefix),
            stripping=_stripping_untrusted(facts, ids, kinds),
        )


def _stripping_untrusted(facts: Facts, ids: dict[str, int], kinds: bytearray) -> frozenset[int]:
    """Phi-3's special tokens but three; the file has no other mark of this than the model's name."""
    name = (facts.text_untrusted("general.name") or "").lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    special = {id_ for id_, kind in enumerate(kinds) if kind in SPECIAL_KINDS}
    special.update(ids[text] for text in ("</s>",) if text in ids)
    return frozenset(special - {ids[text] for text in ("<unk>", "<s>", "<|endoftext|>") if text in ids})


def _special_untrusted(facts: Facts, name: str, default: int | None, count: int) -> int | None:
    """A special id; one outside the vocabulary is ignored, as real files carry such ids."""
    key = f"tokenizer.ggml.{name}_token_id"
    for id_ in (facts.index_untrusted(key), default):
        if id_ is not None and 0 <= id_ < count:
            return id_
        if id_ is not None:
            logger.warning("%s %d is outside the vocabulary of %d tokens", key, id_, count)
    return None


def _kinds_untrusted(facts: Facts, count: int) -> bytearray:
    numbers = facts.numbers_untrusted("tokenizer.ggml.token_type", count)
    if numbers is None:
        return bytearray([TokenKind.NORMAL]) * count
    if numbers.dtype.kind not in "iu":
        raise MalformedGGUF("tokenizer.ggml.token_type holds something other than integers")
    known = (numbers >= TokenKind.NORMAL) & (numbers <= TokenKind.BYTE)
    return bytearray(np.where(known, numbers, TokenKind.UNDEFINED).astype(np.uint8).tobytes())


def _scores_untrusted(facts: Facts, count: int) -> list[float]:
    numbers = facts.numbers_untrusted("tokenizer.ggml.scores", count)
    if numbers is None:
        return []
    if numbers.dtype.kind not in "iuf":
        raise MalformedGGUF("tokenizer.ggml.scores holds something other than numbers")
    scores = numbers.astype(np.float64)
    if np.isnan(scores).any():
        raise MalformedGGUF(f"the score of token {int(np.isnan(scores).argmax())} is not a number")
    values: list[float] = scores.tolist()
    return values


def _end_of_generation_untrusted(
    facts: Facts, ids: dict[str, int], kinds: bytearray, eos: int | None
) -> frozenset[int]:
    """The ids that end a generation. Corrects the kinds of tokens that files are known to mislabel."""
    named = {ids[text] for text in _END_TEXTS if text in ids}
    control = {ids[text] for text in _END_TEXTS_OF_CONTROL if text in ids}
    ends = named | {id_ for id_ in control if kinds[id_] == TokenKind.CONTROL}
    for key, texts in _FILL_END_TEXTS.items():
        if facts.index_untrusted(key) is None:
            ends.update(ids[text] for text in texts if text in ids)
    keys = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id", *_FILL_END_TEXTS)
    given = {facts.index_untrusted(key) for key in keys} | {eos}
    ends.update(id_ for id_ in given if id_ is not None and 0 <= id_ < len(kinds))
    for id_ in named:
        kinds[id_] = TokenKind.CONTROL
    for text in _ALWAYS_SHOWN & ids.keys():
        kinds[ids[text]] = TokenKind.USER_DEFINED

    present = {text for text in _END_TEXTS if ids.get(text) in ends}
    closes_a_part = {"<|return|>", "<|call|>"} <= present or (
        "<|flush|>" in present and not present.isdisjoint({"<|call|>", "<|calls|>"})
    )
    if closes_a_part and "<|end|>" in present:  # there it ends a message within the answer
        ends.discard(ids["<|end|>"])
        kinds[ids["<|end|>"]] = TokenKind.USER_DEFINED
    return frozenset(ends)

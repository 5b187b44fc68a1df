"""Text that has to be JSON of a schema: which tokens may come next.

`llguidance` does the work (an Earley parser over the tokens' bytes, so a character may come in byte tokens
too); here are its bounds and its translation. It is imported when a schema is given and not before. A schema
is untrusted: its size, depth and cost are limited, and what it asks for that the library lacks is refused,
never left out. Sampling is elsewhere: a mask comes before every step of it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from omninfer.sampling import Mask
from omninfer.tokenizer import Tokenizer
from omnistore.errors import InferenceError, InputError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA: Final = 1 << 18
"""Characters of a schema."""
MAX_DEPTH: Final = 64
"""Nesting of a schema's own JSON."""
_BLANK: Final = r"[ \n]{0,12}"
"""Between the parts of the JSON: enough to indent with, too little to fill a context with."""


class JsonSchema:
    """A schema made ready for one model's tokens."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str, vocab: int) -> None:
        self._tokenizer = tokenizer
        self._grammar = grammar
        self._vocab = vocab

    @classmethod
    def parse_untrusted(cls, text: str, tokenizer: Tokenizer, vocab: int) -> JsonSchema:
        """A schema from its JSON; `vocab` is how many logits the model answers.

        Raises InputError for what is no schema, is too large or too deep, or asks for what is not supported.
        """
        schema = _schema_untrusted(text)
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_pattern": _BLANK}
            )
        except ValueError as error:
            raise _refused(str(error)) from None
        made = cls(_library_tokenizer(tokenizer, vocab), grammar, vocab)
        try:
            possible = bool(made.begin().allowed().any())
        except InferenceError:
            possible = False
        if not possible:
            raise _refused("no text can satisfy it")
        return made

    def begin(self) -> JsonText:
        """The constraint of one text."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, self._grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return JsonText(matcher, self._vocab)


class JsonText:
    """One text under way (`omninfer.generation.Constraint`)."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab

    def allowed(self) -> Mask:
        """bool[vocab]: the tokens with which the text can still become what it has to be."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = np.unpackbits(bits, bitorder="little").astype(np.bool_)
        return mask[: self._vocab]

    def accept(self, token: int) -> None:
        """Take note of a token that was chosen."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """The text so far is JSON of the schema."""
        return bool(self._matcher.is_accepting())

    @property
    def finished(self) -> bool:
        """It is, and nothing can follow."""
        return self.complete and bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InferenceError(
                f"the JSON schema can not be followed further: {_brief(self._matcher.get_error())}",
                remedy="Give a simpler schema: shorter patterns, fewer alternatives.",
            )


def _schema_untrusted(text: str) -> object:
    if len(text) > MAX_SCHEMA:
        raise InputError(f"the JSON schema has {len(text)} characters, more than {MAX_SCHEMA}")
    try:
        schema: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the JSON schema is no JSON: {str(error)[:200]}") from None
    if not isinstance(schema, dict | bool):
        raise InputError(f"a JSON schema is an object, not a {type(schema).__name__}")
    level: list[Any] = [schema]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise InputError(f"the JSON schema is nested more than {MAX_DEPTH} deep")
        inner = [
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)
        ]
        level = [value for values in inner for value in values]
    return schema


def _library_tokenizer(tokenizer: Tokenizer, vocab: int) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    ends = sorted(id_ for id_ in tokenizer.eog if id_ < vocab)
    if not ends:
        raise InputError("the model has no token that ends a text, which JSON of a schema needs")
    return LLTokenizer(TokenizerWrapper(_Tokens(tokenizer, vocab, ends[0])), n_vocab=vocab, eos_token=ends)


class _Tokens:
    """A tokenizer in the shape that the library asks for."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, end: int) -> None:
        known = min(vocab, tokenizer.vocab_size)
        shown = [tokenizer.piece(id_) for id_ in range(known)]
        self.eos_token_id = end
        self.bos_token_id = tokenizer.bos
        self.special_token_ids = [id_ for id_ in range(known) if not shown[id_] or id_ in tokenizer.eog]
        self.tokens = [
            shown[id_] or tokenizer.piece(id_, special=True) or f"<{id_}>".encode() for id_ in range(known)
        ]
        self.tokens += [f"<{id_}>".encode() for id_ in range(known, vocab)]
        self.special_token_ids += range(known, vocab)
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("text only")  # the library tries with bytes first
        return self._tokenizer.continuation(text)


def _refused(reason: str) -> InputError:
    return InputError(
        f"the JSON schema can not be used: {_brief(reason)}",
        remedy="Leave that keyword out, or say the same with simpler ones.",
    )


def _brief(reason: str) -> str:
    lines = reason.strip().splitlines()
    return "".join(letter if letter.isprintable() else "?" for letter in (lines[0] if lines else "")[:300])

"""A model's own tokenizer, from its GGUF metadata: text to token ids and back.

    __init__       Tokenizer, the only public name besides StreamDecoder
    vocab          tokens, kinds, scores, special ids: checked once
    spm, bpe       the two families of merging
    rawbpe         their cross: BPE on plain text (Gemma 4)
    pretokenizers  how each BPE model cuts text into words
    stream         decoding one id at a time

No network and no files: the metadata comes as a mapping, as `omnistore.chunker.gguf` reads it, and
is not trusted. Chat templates are in `omninfer.chat`. Ids are those of llama.cpp, checked against
its own test vocabularies.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, Protocol

from omninfer.tokenizer.bpe import ByteLevelBPE
from omninfer.tokenizer.pretokenizers import RAW, pre_tokenizer
from omninfer.tokenizer.rawbpe import RawBPE
from omninfer.tokenizer.spm import SentencePiece
from omninfer.tokenizer.stream import StreamDecoder
from omninfer.tokenizer.vocab import SPECIAL_KINDS, Facts, Family, TokenKind, Vocab
from omnistore.errors import InputError, MalformedGGUF, UnsupportedModel

__all__ = ["StreamDecoder", "Tokenizer"]

logger = logging.getLogger(__name__)

MAX_TEXT = 1 << 24
"""Characters in one call of `encode`: far beyond any context, and a few seconds of work."""

_SPACES = " \t\n\v\f\r"
_OTHER_FAMILIES: Final = MappingProxyType(
    {
        "bert": "WordPiece, WPM",
        "t5": "SentencePiece unigram, UGM",
        "rwkv": "RWKV world",
        "plamo2": "PLaMo 2",
        "none": "no vocabulary",
        "no_vocab": "no vocabulary",
    }
)
"""What models name that llama.cpp knows and this module does not."""


class _Merging(Protocol):
    def encode(self, text: str, *, after_special: bool) -> list[int]: ...
    def piece(self, id_: int) -> bytes: ...


class Tokenizer:
    """Text to ids and back, for one model. Safe to use from several threads."""

    def __init__(self, vocab: Vocab, merging: _Merging) -> None:
        self._vocab = vocab
        self._merging = merging
        # Longest first: a token that contains another one wins.
        self._special = sorted(
            ((text, i) for i, text in enumerate(vocab.texts) if vocab.kinds[i] in SPECIAL_KINDS),
            key=lambda pair: len(pair[0].encode()),
            reverse=True,
        )

    @classmethod
    def from_metadata_untrusted(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Build the tokenizer of a model.

        Raises MalformedGGUF where the metadata is missing, contradicts itself or has the wrong
        types, and UnsupportedModel where it describes a kind of tokenizer that is not built in.
        An unknown BPE pre-tokenizer is only a warning in the log, which names it: the default one
        stands in.
        """
        facts = Facts(metadata)
        pre_name = facts.text_untrusted("tokenizer.ggml.pre")
        match facts.text_untrusted("tokenizer.ggml.model"):
            case "llama":
                spm = Family(bos=1, eos=2, unknown=0, add_bos=True, add_space_prefix=True)
                vocab = Vocab.from_facts_untrusted(facts, spm)
                return cls(vocab, SentencePiece(vocab))
            case "gemma4":
                return cls._raw_untrusted(facts, "gemma4")
            case "gpt2" if pre_name in RAW:
                return cls._raw_untrusted(facts, pre_name)
            case "gpt2":
                pre = pre_tokenizer(pre_name)
                has_bos = "tokenizer.ggml.bos_token_id" in metadata
                bpe = Family(None, None, None, add_bos=pre.add_bos and has_bos, add_space_prefix=False)
                vocab = Vocab.from_facts_untrusted(facts, bpe)
                return cls(vocab, ByteLevelBPE.from_facts_untrusted(facts, vocab, pre))
            case None:
                raise MalformedGGUF(
                    "the file has no tokenizer.ggml.model",
                    remedy="Convert the model again with its tokenizer files beside it.",
                )
            case other:
                kind = f" ({_OTHER_FAMILIES[other]})" if other in _OTHER_FAMILIES else ""
                raise UnsupportedModel(
                    f"the tokenizer {other[:40]!r}{kind} is not supported",
                    remedy="SentencePiece (llama), byte-level BPE (gpt2) and Gemma 4's (gemma4) are.",
                )

    @classmethod
    def _raw_untrusted(cls, facts: Facts, pre_name: str) -> Tokenizer:
        # Gemma 4 needs BOS whatever its file says: llama.cpp found files that say otherwise by mistake.
        always = pre_name in ("gemma4", "granite-embed-multi-311m")
        family = Family(None, None, None, add_bos=False, add_space_prefix=False)
        vocab = Vocab.from_facts_untrusted(facts, family, always_add_bos=always)
        return cls(vocab, RawBPE.from_facts_untrusted(facts, vocab, whole_newlines=always))

    @property
    def vocab_size(self) -> int:
        return len(self._vocab.texts)

    @property
    def bos(self) -> int | None:
        return self._vocab.bos

    @property
    def eos(self) -> int | None:
        return self._vocab.eos

    @property
    def eog(self) -> frozenset[int]:
        """The ids that end a generation: EOS, end of turn, end of message and their like."""
        return self._vocab.eog

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """The ids of a text.

        `add_special` adds BOS and EOS where the model wants them. `parse_special` turns the texts of
        control tokens into those tokens: for rendered chat templates, never for what a stranger
        wrote. Tokens that a model's makers added as ordinary words are recognised always.
        Raises InputError for a text that is too long or no Unicode.
        """
        if len(text) > MAX_TEXT:
            raise InputError(f"the text has {len(text)} characters, more than {MAX_TEXT}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # Python's stand-in for a byte of an argument or of stdin that is no UTF-8.
            raise InputError(f"the text is not valid UTF-8 at character {error.start}") from None
        vocab = self._vocab
        ids: list[int] = []
        if add_special and vocab.add_bos and vocab.bos is not None:
            ids.append(vocab.bos)
        after_special = True
        for fragment in self._fragments(text, parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
            else:
                ids += self._merging.encode(fragment, after_special=after_special)
            after_special = isinstance(fragment, int)
        if add_special and vocab.add_bos and ids[1:2] == [vocab.bos]:
            logger.warning("the prompt starts with the BOS token, and the model adds another one")
        if add_special and vocab.add_eos and vocab.eos is not None:
            ids.append(vocab.eos)
        return ids

    def continuation(self, text: str) -> list[int]:
        """The ids of text in the middle of another: no space goes before it, nothing in it is special."""
        return self._merging.encode(text, after_special=False) if text else []

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of some ids, as it continues a text before it: a leading space is kept.

        Control tokens are left out unless `special`. Bytes that are no UTF-8 come out as U+FFFD.
        Raises InputError for an id outside the vocabulary.
        """
        return b"".join(self.piece(id_, special=special) for id_ in ids).decode(errors="replace")

    def stream(self, *, special: bool = False) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(lambda id_: self.piece(id_, special=special))

    def piece(self, id_: int, *, special: bool = False) -> bytes:
        """The bytes of one token, which need not be whole characters.

        Empty for a control token unless `special`. Raises InputError for an id outside the vocabulary.
        """
        if not 0 <= id_ < len(self._vocab.texts):
            raise InputError(f"token {id_} is outside the vocabulary of {len(self._vocab.texts)}")
        if not special and self._vocab.kinds[id_] in (TokenKind.CONTROL, TokenKind.UNKNOWN):
            return b""
        return self._merging.piece(id_)

    def _fragments(self, text: str, parse_special: bool) -> list[str | int]:
        """The text with special tokens cut out of it, a longer token before a shorter one."""
        fragments: list[str | int] = [text] if text else []
        for token, id_ in self._special:
            if token not in text:
                continue
            if parse_special or self._vocab.kinds[id_] == TokenKind.USER_DEFINED:
                fragments = [part for fragment in fragments for part in self._cut(fragment, token, id_)]
        return fragments

    def _cut(self, fragment: str | int, token: str, id_: int) -> list[str | int]:
        if isinstance(fragment, int):
            return [fragment]
        strips = id_ in self._vocab.stripping
        parts: list[str | int] = []
        start = 0
        while (at := fragment.find(token, start)) >= 0:
            parts += [fragment[start:at], id_] if at > start else [id_]
            start = at + len(token)
            while strips and fragment[start : start + 1] in _SPACES and start < len(fragment):
                start += 1
        return [*parts, fragment[start:]] if start < len(fragment) else parts

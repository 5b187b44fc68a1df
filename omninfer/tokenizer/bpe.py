"""Byte-level BPE (`tokenizer.ggml.model` = gpt2), run by the `tokenizers` library.

Text is cut by the model's pre-tokenizer, each piece's UTF-8 bytes are written as 256 printable
characters, and neighbours merge in the order of `tokenizer.ggml.merges`. The library is given only
a checked vocabulary and merges between its tokens, which it can't refuse. Unicode normalisation is
not applied, as in llama.cpp.
"""

from __future__ import annotations

import logging

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from omninfer.tokenizer.pretokenizers import PreTokenizer
from omninfer.tokenizer.vocab import Facts, TokenKind, Vocab
from omnistore.errors import MalformedGGUF

logger = logging.getLogger(__name__)

MAX_MERGES = 1 << 22
"""Twice the largest vocabulary that is read."""


def byte_characters() -> list[str]:
    """The character that stands for each byte: itself where printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


_BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}


class ByteLevelBPE:
    """Merges by rank over one vocabulary."""

    def __init__(self, vocab: Vocab, merges: list[tuple[str, str]], pre: PreTokenizer) -> None:
        self._vocab = vocab
        self._library = LibraryTokenizer(
            models.BPE(vocab=vocab.ids, merges=merges, ignore_merges=pre.ignore_merges)
        )
        self._library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    @classmethod
    def from_facts_untrusted(cls, facts: Facts, vocab: Vocab, pre: PreTokenizer) -> ByteLevelBPE:
        """Read the merges; raises MalformedGGUF only."""
        merges = merges_untrusted(facts, vocab)
        missing = [character for character in _BYTE_OF if character not in vocab.ids]
        if missing:
            logger.warning("the vocabulary lacks %d of 256 byte tokens: such bytes are dropped", len(missing))
        return cls(vocab, merges, pre)

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of one run of ordinary text."""
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def piece(self, id_: int) -> bytes:
        """The bytes that an id stands for."""
        text = self._vocab.texts[id_]
        match self._vocab.kinds[id_]:
            case TokenKind.NORMAL:
                try:
                    return bytes([_BYTE_OF[character] for character in text])
                except KeyError:  # an added token written as plain text
                    return text.encode()
            case TokenKind.UNUSED | TokenKind.UNDEFINED:
                return b""
            case _:
                return text.encode()


def merges_untrusted(facts: Facts, vocab: Vocab) -> list[tuple[str, str]]:
    """The merges whose halves and union are tokens, in order; of equal ones the first counts."""
    lines = facts.strings_untrusted("tokenizer.ggml.merges", MAX_MERGES)
    if lines is None:
        raise MalformedGGUF("a BPE vocabulary needs tokenizer.ggml.merges")
    ids = vocab.ids
    usable: dict[tuple[str, str], None] = {}
    for number, line in enumerate(lines):
        # From the second character on: a token may be a space where tokens are plain text.
        space = line.find(" ", 1)
        left, right = line[:space], line[space + 1 :]
        if space < 0 or not right:
            raise MalformedGGUF(f"merge {number} is {line[:40]!r}, not two tokens with a space between them")
        if left in ids and right in ids and left + right in ids:
            usable[left, right] = None
    if len(usable) != len(lines):
        logger.warning(
            "%d of %d merges repeat or name no token: left out", len(lines) - len(usable), len(lines)
        )
    return list(usable)

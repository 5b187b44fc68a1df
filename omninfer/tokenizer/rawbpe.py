"""BPE on plain text, as Gemma 4 has it: SentencePiece's spaces and byte tokens with BPE's merges.

A space is written `▁`, a run of newlines stands alone, and all else merges across words in the order of
`tokenizer.ggml.merges`; a character that is no token becomes its bytes, `<0x00>` … `<0xFF>`. The
`tokenizers` library merges, given only a checked vocabulary and merges between its tokens.
"""

from __future__ import annotations

import re
from typing import Final

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models

from omninfer.tokenizer.bpe import merges_untrusted
from omninfer.tokenizer.spm import SPACE, plain_piece
from omninfer.tokenizer.vocab import Facts, Vocab

_RUNS: Final = re.compile(r"\n+|[^\n]+")


class RawBPE:
    """Merges by rank over one vocabulary."""

    def __init__(self, vocab: Vocab, merges: list[tuple[str, str]], *, whole_newlines: bool) -> None:
        """`whole_newlines`: a run of newlines that is a token is not built from merges."""
        self._vocab = vocab
        self._whole_newlines = whole_newlines
        self._library = LibraryTokenizer(models.BPE(vocab=vocab.ids, merges=merges, byte_fallback=True))

    @classmethod
    def from_facts_untrusted(cls, facts: Facts, vocab: Vocab, *, whole_newlines: bool) -> RawBPE:
        """Read the merges; raises MalformedGGUF only."""
        return cls(vocab, merges_untrusted(facts, vocab), whole_newlines=whole_newlines)

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of one run of ordinary text."""
        ids: list[int] = []
        for run in _RUNS.findall(text.replace(" ", SPACE)):
            whole = self._vocab.ids.get(run) if self._whole_newlines and run[0] == "\n" else None
            if whole is not None:
                ids.append(whole)
            else:
                ids += self._library.encode(run, add_special_tokens=False).ids
        return ids

    def piece(self, id_: int) -> bytes:
        """The bytes that an id stands for."""
        return plain_piece(self._vocab, id_)

"""SentencePiece merging by score (`tokenizer.ggml.model` = llama): text to ids and back to bytes.

The pair of neighbours whose union is the token with the highest score is joined first, the leftmost
on ties, until no union is a token; what is left and is no token becomes its UTF-8 bytes. Queue and
linked list keep that at O(n log n). The unigram (Viterbi) variant and its character map
(`tokenizer.ggml.model` = t5) are not here.
"""

from __future__ import annotations

import re
from heapq import heapify, heappop, heappush

from omninfer.tokenizer.vocab import TokenKind, Vocab
from omnistore.errors import MalformedGGUF

SPACE = "▁"
"""U+2581, which stands for a space in the vocabulary."""

_BYTE_TEXT = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def plain_piece(vocab: Vocab, id_: int) -> bytes:
    """The bytes that an id stands for where tokens are plain text."""
    text = vocab.texts[id_]
    match vocab.kinds[id_]:
        case TokenKind.NORMAL:
            return text.replace(SPACE, " ").encode()
        case TokenKind.BYTE:
            digits = _BYTE_TEXT.fullmatch(text)
            return bytes.fromhex(digits[1]) if digits else text.encode()
        case TokenKind.UNUSED | TokenKind.UNDEFINED:
            return b""
        case _:
            return text.encode()


class SentencePiece:
    """Merges by score over one vocabulary."""

    def __init__(self, vocab: Vocab) -> None:
        """Index the vocabulary; raises MalformedGGUF where some text could not be encoded at all."""
        if len(vocab.scores) != len(vocab.texts):
            raise MalformedGGUF("a SentencePiece vocabulary needs tokenizer.ggml.scores")
        # Unlike llama.cpp, and like SentencePiece itself, text never merges into a control token: a
        # prompt that says </s> must not end the generation.
        never = (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.BYTE)
        self._vocab = vocab
        self._ids = {text: i for text, i in vocab.ids.items() if vocab.kinds[i] not in never}
        self._longest = max(map(len, self._ids), default=0)
        self._bytes = self._byte_ids()

    def _byte_ids(self) -> list[int]:
        vocab = self._vocab
        ids: list[int] = []
        for byte in range(256):
            id_ = vocab.ids.get(f"<0x{byte:02X}>", vocab.unknown)
            if id_ is None:
                raise MalformedGGUF(
                    f"the vocabulary has neither the byte token <0x{byte:02X}> nor an unknown token"
                )
            ids.append(id_)
        return ids

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of one run of ordinary text; `after_special` is true at the start and after a special token."""
        if after_special and self._vocab.add_space_prefix:
            text = " " + text
        ids: list[int] = []
        for piece in self._merge(text.replace(" ", SPACE)):
            id_ = self._ids.get(piece)
            if id_ is None:
                ids.extend(self._bytes[byte] for byte in piece.encode())
            else:
                ids.append(id_)
        return ids

    def piece(self, id_: int) -> bytes:
        """The bytes that an id stands for."""
        return plain_piece(self._vocab, id_)

    def _merge(self, text: str) -> list[str]:
        """Cut a text into tokens and single characters that are none."""
        symbols = list(text)
        before = list(range(-1, len(symbols) - 1))
        after = [*range(1, len(symbols)), -1]
        scores = self._vocab.scores
        queue: list[tuple[float, int, int, int]] = []  # minus score, left, right, length of the union

        def candidate(left: int, right: int) -> tuple[float, int, int, int] | None:
            length = len(symbols[left]) + len(symbols[right])
            if length > self._longest:
                return None
            id_ = self._ids.get(symbols[left] + symbols[right])
            return None if id_ is None else (-scores[id_], left, right, length)

        queue = [pair for i in range(1, len(symbols)) if (pair := candidate(i - 1, i))]
        heapify(queue)
        while queue:
            _, left, right, length = heappop(queue)
            # A symbol that was merged away is empty; one that grew makes the length differ.
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
                if pair := candidate(left, after[left]):
                    heappush(queue, pair)
            if before[left] >= 0 and (pair := candidate(before[left], left)):
                heappush(queue, pair)
        return [symbol for symbol in symbols if symbol]

"""Ids to text one at a time: holds back the bytes of a character until all of them came."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Callable


class StreamDecoder:
    """Joined, what `push` and `flush` return is what `Tokenizer.decode` gives for all ids at once."""

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._utf8 = getincrementaldecoder("utf-8")("replace")

    def push(self, id_: int) -> str:
        """The text that is complete after this id; raises InputError for an id outside the vocabulary."""
        return self._utf8.decode(self._piece(id_))

    def flush(self) -> str:
        """What is left: bytes that no later id completed come out as U+FFFD."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest

"""Words for a prompt's beginnings that only their owner understands. Pure.

A lender that keeps a slot has to find it again, and need not know of what it is: stages after the first
never see a token. So a coordinator labels each 64 tokens, with all that stand before them, by a keyed BLAKE3
digest; the key is derived from its identity and leaves it never. Equal beginnings of one coordinator have
equal labels, and nothing else can be told from them, nor guessed. Implements spec/06-pipeline, section
"Kept prompts".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from blake3 import blake3

from omninfer.frames import LABEL_SIZE, LABEL_TOKENS, LIMITS

_CONTEXT: Final = "omni pipeline labels 1.1.0"


class Labels:
    """What one coordinator calls its prompts' beginnings."""

    def __init__(self, secret: bytes) -> None:
        """`secret`: what only this coordinator knows, such as its identity's seed."""
        self._key = blake3(secret, derive_key_context=_CONTEXT).digest()

    def of(self, tokens: Sequence[int]) -> tuple[bytes, ...]:
        """A label for each whole `LABEL_TOKENS` tokens, as many as a frame may have."""
        labels: list[bytes] = []
        label = b""
        for at in range(0, len(tokens) - LABEL_TOKENS + 1, LABEL_TOKENS)[: LIMITS.labels]:
            words = b"".join(token.to_bytes(4, "little") for token in tokens[at : at + LABEL_TOKENS])
            label = blake3(label + words, key=self._key).digest(LABEL_SIZE)
            labels.append(label)
        return tuple(labels)

"""Waits until the upload cap lets bytes pass: the trio shell around `rate.TokenBucket`.

Whoever sends blocks asks here before each piece. Peers take turns: each has one place in the line,
whatever number of streams it opened, so that a cap is shared by peers and not by streams. Knows
nothing of streams and messages. Implements spec/05-transfer, section "Caps".
"""

from __future__ import annotations

from collections import Counter

import trio

from omnistore.transfer.rate import TokenBucket


class Pacer:
    """The cap on what one node sends, shared by everything that sends blocks."""

    def __init__(self, rate: int | None) -> None:
        """`rate`: bytes per second; None for no cap."""
        self._rate = rate
        self._bucket: TokenBucket | None = None
        self._turn = trio.Lock()
        self._lines: dict[str, trio.Lock] = {}
        self._waiting: Counter[str] = Counter()

    def piece(self, most: int) -> int:
        """How much of `most` bytes to ask for at once."""
        return most if self._rate is None else min(most, TokenBucket(self._rate, 0.0).piece)

    async def passes(self, peer: str, size: int) -> None:
        """Return when `size` bytes may be sent to `peer`."""
        if self._rate is None:
            return
        # Locks of trio are taken in the order of asking: a line of the peer's own, then everybody's.
        self._waiting[peer] += 1
        line = self._lines.setdefault(peer, trio.Lock())
        try:
            async with line, self._turn:
                if self._bucket is None:
                    self._bucket = TokenBucket(self._rate, trio.current_time())
                # Nobody else takes meanwhile: the turn is ours.
                await trio.sleep(self._bucket.wait(trio.current_time()))
                self._bucket.take(size, trio.current_time())
        finally:
            self._waiting[peer] -= 1
            if not self._waiting[peer]:
                del self._waiting[peer], self._lines[peer]

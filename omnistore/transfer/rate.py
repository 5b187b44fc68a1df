"""A cap on bytes per second, as a bucket of tokens (pure: the time is an argument).

The bucket fills at the cap's rate up to what may pass at once after a pause. Something passes whenever
the bucket is not empty, whatever its size, and may leave it in debt: a block larger than the bucket
still passes, and is paid for before the next. So over any stretch of t seconds at most `burst` + rate × t
bytes pass, and one more piece. Waits for nothing itself: `pacing` does, and `session` asks later.
Implements spec/05-transfer, section "Caps".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

BURST: Final = 0.25
"""Seconds of the rate that may pass at once after a pause: more than a tick, or a late one costs some."""
PIECE: Final = 0.05
"""Seconds of the rate that one piece should be: a requester sees bytes, and others get their turn."""
PIECE_LEAST: Final = 1 << 10
PIECE_MOST: Final = 256 << 10


@dataclass(slots=True)
class TokenBucket:
    """How much may pass now, and when the next may."""

    rate: float
    """Bytes per second; above 0."""
    now: float
    """When the level was last brought up to date."""
    level: float = 0.0
    """Bytes that may pass; below 0: owed."""

    @property
    def burst(self) -> float:
        """The most that gathers while nothing passes."""
        return self.rate * BURST

    @property
    def piece(self) -> int:
        """How large a piece is best given to the network at once."""
        return int(min(PIECE_MOST, max(PIECE_LEAST, self.rate * PIECE)))

    def wait(self, now: float) -> float:
        """Seconds until the next may pass; 0 when it may now."""
        self._fill(now)
        # Less than a byte is rounding: waiting for it could take no time at all, for ever.
        return -self.level / self.rate if self.level <= -1 else 0.0

    def take(self, size: int, now: float) -> None:
        """`size` bytes pass now."""
        self._fill(now)
        self.level -= size

    def give_back(self, size: int, now: float) -> None:
        """`size` bytes that were taken did not pass after all."""
        self._fill(now)
        self.level = min(self.burst, self.level + size)

    def _fill(self, now: float) -> None:
        # Clocks of two callers may disagree by a little; time never runs back here.
        if now > self.now:
            self.level = min(self.burst, self.level + (now - self.now) * self.rate)
            self.now = now

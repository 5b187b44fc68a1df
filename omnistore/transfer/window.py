"""How much one peer should have in flight, and how long its silence may last.

Pure arithmetic over what was asked and what arrived, one `PeerFlow` per peer. The window is
the measured bandwidth-delay product times a gain: since the rate is measured with that window,
the gain lets it grow until the link, not the window, is what limits. Implements spec/05-transfer,
section "Window" (advice there: nothing on the wire depends on it).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from omnistore.block import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class FlowLimits:
    """The numbers behind a peer's window and deadlines."""

    ceiling: int = 64 << 20
    """Bytes in flight of a whole session: 1 GB/s over 60 ms, and what a receiver may have to buffer."""
    least: int = 2 << 20
    """Bytes in flight of one peer, at the start and at least: two blocks keep a link from running dry."""
    gain: float = 3.0
    """Window over measured bandwidth-delay product: above 1, or it could never grow, and above 2, so that the
    peer has something to send while a lost packet holds up what it has sent."""
    queueing: float = 0.03
    """Seconds of data to keep queued at the peer beyond the path's delay, to cover its disk and scheduler."""
    sample: float = 0.05
    """Seconds over which a rate is measured, at least."""
    samples: int = 8
    """Rates remembered; the largest one sets the window."""
    silence_factor: float = 6.0
    """Silence allowed, in units of the time one block should take."""
    silence_least: float = 3.0
    """Seconds: below it a garbage collection or a spun-down disk would count as a stall."""
    silence_most: float = 15.0
    """Seconds without one byte after which any peer counts as stalled; also before anything was measured."""
    answer_most: float = 20.0
    """Seconds for a peer's next answer while others could give all it owes: what a trickle of bytes can
    gain. A block takes that long at 52 kB/s."""


FLOW: Final = FlowLimits()


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """The session's patience and generosity."""

    flow: FlowLimits = FLOW
    peers: int = 32
    """Asked at once: enough for any link, few enough to know each."""
    stall_timeout: float = 60.0
    """Seconds without one verified block after which a session with peers gives up."""
    provider_timeout: float = 30.0
    """Seconds without a peer that holds anything missing after which it gives up."""
    refresh: float = 1.0
    """Seconds before a peer that lacked something is asked again what it holds: it may be fetching too.
    Such a query is answered when there is news."""
    probe: float = 1.0
    """Seconds of silence after which a peer is made to show that it lives."""
    duplicate_share: int = 50
    """One in so many wanted bytes may arrive twice: 2 %."""
    duplicate_least: int = 4 << 20
    """Bytes that may arrive twice in any case, or a small model would have no end-game."""
    batch_share: int = 8
    """A peer is asked again when one in so many bytes of its window is free: fewer, larger messages."""


LIMITS: Final = SessionLimits()


class PeerFlow:
    """Measures one peer."""

    __slots__ = ("_bytes", "_delay", "_limits", "_rate", "_rates", "_since", "alive_at")

    def __init__(self, now: float, limits: FlowLimits = FLOW) -> None:
        self._limits = limits
        self._rates: deque[float] = deque(maxlen=limits.samples)
        self._rate: float | None = None
        self._delay: float | None = None
        self._bytes = 0
        self._since: float | None = None
        self.alive_at = now
        """When the peer last showed life, or was asked for something while it owed nothing."""

    @property
    def rate(self) -> float | None:
        """Smoothed bytes per second; None before the first measurement."""
        return self._rate

    @property
    def delay(self) -> float | None:
        """Shortest time from an ask to its whole answer, in seconds."""
        return self._delay

    @property
    def window(self) -> int:
        """Bytes this peer should have asked and unanswered."""
        if not self._rates or self._delay is None:
            return self._limits.least
        product = max(self._rates) * (self._delay + self._limits.queueing)
        return max(self._limits.least, min(self._limits.ceiling, int(product * self._limits.gain)))

    @property
    def silence_allowed(self) -> float:
        """Seconds without a byte, while something is owed, after which the peer counts as stalled."""
        limits = self._limits
        if self._rate is None or self._delay is None:
            return limits.silence_most
        expected = self._delay + BLOCK_SIZE / max(self._rate, 1.0)
        return min(limits.silence_most, max(limits.silence_least, limits.silence_factor * expected))

    def asked(self, now: float, *, idle: bool) -> None:
        """Something was asked; `idle`: the peer owed nothing before, so its clocks start now."""
        if idle:
            self.alive_at = now
            self._since, self._bytes = now, 0

    def progressed(self, now: float) -> None:
        """Some bytes of an answer arrived (or our own side held them up)."""
        self.alive_at = now

    def answered(self, size: int, asked_at: float, now: float) -> None:
        """A whole block of `size` bytes arrived for an ask made at `asked_at`."""
        self.alive_at = now
        self._delay = min(now - asked_at, now - asked_at if self._delay is None else self._delay)
        self._bytes += size
        since = asked_at if self._since is None else self._since
        if now - since < max(self._limits.sample, self._delay):
            return
        measured = self._bytes / (now - since)
        self._rate = measured if self._rate is None else self._rate + (measured - self._rate) / 4
        self._rates.append(measured)
        self._since, self._bytes = now, 0

"""Whom to leave alone, and for how long (pure)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Pauses:
    """Pauses by peer. Times are seconds, in the clock of `now`."""

    _until: dict[str, float] = field(default_factory=dict)

    def pause(self, peer: str, seconds: float, now: float) -> None:
        """Leave a peer alone for so long; pauses that are over are forgotten."""
        self._until = {other: until for other, until in self._until.items() if until > now}
        self._until[peer] = now + seconds

    def may(self, peer: str, now: float) -> bool:
        """Whether a peer's pause is over, if it had one."""
        return self._until.get(peer, now) <= now

    def clear(self) -> None:
        """End every pause."""
        self._until.clear()

"""Loaded stages within a memory budget: leased by slot, kept warm when idle, dropped oldest first.

A stage that two coordinators want is loaded once; each gets slots of its own, emptied when it lets go of
them. What a lease needs is reserved before anything is loaded, so two that come at once can not both
take the same memory. Loading itself is the caller's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from omninfer.engines import Stage
from omninfer.frames import LIMITS
from omninfer.threads import ComputeThread
from omnistore.cid import CID
from omnistore.errors import PlanInfeasible

IDLE_SECONDS: Final = 600.0
"""How long a stage that nobody leases stays loaded: a person's pause between two questions."""


@dataclass(frozen=True, slots=True)
class StageKey:
    """What makes two stages the same."""

    model: CID
    first: int
    last: int
    embed: bool
    head: bool
    engine: str
    context: int


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a stage takes."""

    weights: int
    slot: int
    """For each slot's caches, when full."""


@dataclass(slots=True)
class WarmStage:
    """A loaded (or loading) stage and the thread that it lives in."""

    key: StageKey
    need: Need
    thread: ComputeThread
    stage: Stage | None = None
    free: set[int] = field(default_factory=lambda: set(range(LIMITS.slots)))
    idle_since: float = 0.0
    ready: trio.Lock = field(default_factory=trio.Lock)
    """Held while it loads."""

    @property
    def leased(self) -> int:
        return LIMITS.slots - len(self.free)

    @property
    def bytes(self) -> int:
        return self.need.weights + self.need.slot * self.leased


@dataclass(frozen=True, slots=True)
class Lease:
    """Slots of a stage, numbered 0 … as the coordinator numbers them."""

    warm: WarmStage
    stage: Stage
    slots: tuple[int, ...]


Load = Callable[[ComputeThread], Awaitable[Stage]]


class WarmStages:
    """All stages of one lender."""

    def __init__(self, budget: int) -> None:
        """`budget`: bytes that weights and caches may take together."""
        self.budget = budget
        self._stages: dict[StageKey, WarmStage] = {}

    @property
    def available(self) -> int:
        """Bytes for a new stage: the budget without what is leased."""
        return max(0, self.budget - sum(warm.bytes for warm in self._stages.values() if warm.leased))

    async def lease(self, key: StageKey, slots: int, need: Need, load: Load) -> Lease:
        """`slots` of the stage `key`, loaded by `load` unless it is warm.

        Raises `PlanInfeasible` when the budget has no room, and what `load` raises.
        """
        warm = self._stages.get(key) or WarmStage(key, need, ComputeThread(f"stage-{key.first}-{key.last}"))
        if len(warm.free) < slots:
            raise PlanInfeasible(f"{slots} slots were asked for and {len(warm.free)} are free")
        self._make_room(warm, slots)
        taken = tuple(sorted(warm.free)[:slots])
        warm.free.difference_update(taken)
        self._stages[key] = warm
        try:
            async with warm.ready:
                if warm.stage is None:
                    warm.stage = await load(warm.thread)
        except BaseException:
            self._give_back(warm, taken)
            raise
        return Lease(warm, warm.stage, taken)

    def release(self, lease: Lease) -> None:
        """Empty the slots; the stage stays warm."""
        for slot in lease.slots:
            lease.warm.thread.submit(lease.stage.drop, slot)
        self._give_back(lease.warm, lease.slots)

    def expire(self, now: float) -> None:
        """Let go of what has been idle for long."""
        for warm in list(self._stages.values()):
            if not warm.leased and now - warm.idle_since > IDLE_SECONDS:
                self._evict(warm)

    def close(self) -> None:
        """Free everything."""
        for warm in list(self._stages.values()):
            self._evict(warm)

    def _give_back(self, warm: WarmStage, slots: tuple[int, ...]) -> None:
        warm.free.update(slots)
        warm.idle_since = trio.current_time()
        if warm.stage is None and not warm.leased:
            self._evict(warm)

    def _make_room(self, warm: WarmStage, slots: int) -> None:
        """Drop idle stages, longest idle first, until `slots` more of `warm` fit."""
        new = warm.need.slot * slots + (0 if warm.leased else warm.need.weights)
        if new > self.available:
            raise PlanInfeasible(
                f"{new} bytes are needed and {self.available} of {self.budget} bytes are free",
                remedy="Lend more with --compute=GB.",
            )
        idle = [other for other in self._stages.values() if not other.leased and other is not warm]
        for other in sorted(idle, key=lambda stage: stage.idle_since):
            held = sum(stage.bytes for stage in self._stages.values() if stage is not warm)
            if held + new + (warm.bytes if warm.leased else 0) <= self.budget:
                return
            self._evict(other)

    def _evict(self, warm: WarmStage) -> None:
        if self._stages.get(warm.key) is warm:
            del self._stages[warm.key]
        if warm.stage is not None:
            warm.thread.submit(warm.stage.close)
        warm.thread.close()

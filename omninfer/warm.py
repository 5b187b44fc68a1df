"""Loaded stages within a memory budget: leased by slot, kept warm when idle, dropped oldest first.

A stage that two coordinators want is loaded once; each gets slots of its own. When a lease ends its slots
are emptied, but for those that their peer asked to be kept (`omninfer.kept`). What a lease needs is reserved
before anything is loaded, so two that come at once can not both take the same memory. Where memory lacks,
kept prompts and idle stages go, longest unused first. Loading itself is the caller's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from omninfer.arch import KVKind
from omninfer.engines import Stage
from omninfer.frames import LABEL_TOKENS, LIMITS
from omninfer.kept import Kept, KeptPrompts
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
    kv: KVKind = "full"


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a stage and one lease of it take."""

    weights: int
    caches: int
    """Of all slots of the lease."""


@dataclass(slots=True)
class WarmStage:
    """A loaded (or loading) stage and the thread that it lives in."""

    key: StageKey
    weights: int
    thread: ComputeThread
    stage: Stage | None = None
    free: set[int] = field(default_factory=lambda: set(range(LIMITS.slots)))
    leases: int = 0
    reserved: int = 0
    """Bytes for the caches of all leases."""
    idle_since: float = 0.0
    ready: trio.Lock = field(default_factory=trio.Lock)
    """Held while it loads."""

    @property
    def bytes(self) -> int:
        """What it takes, without kept prompts."""
        return self.weights + self.reserved


@dataclass(frozen=True, slots=True)
class Lease:
    """Slots of a stage, numbered 0 … as the coordinator numbers them."""

    warm: WarmStage
    stage: Stage
    slots: tuple[int, ...]
    caches: int
    """Bytes reserved for them."""


@dataclass(frozen=True, slots=True)
class ToKeep:
    """What a peer wants kept of a slot when its lease ends."""

    labels: tuple[bytes, ...]
    bytes: int
    """Memory that the slot takes."""


Load = Callable[[ComputeThread], Awaitable[Stage]]


class WarmStages:
    """All stages of one lender."""

    def __init__(self, budget: int, kept_per_peer: int = 0) -> None:
        """`budget`: bytes that weights and caches may take together; `kept_per_peer`: of these, those that
        one peer's prompts may take after its streams ended."""
        self.budget = budget
        self._stages: dict[StageKey, WarmStage] = {}
        self._kept: KeptPrompts[StageKey] = KeptPrompts(kept_per_peer)

    @property
    def available(self) -> int:
        """Bytes for a new stage: the budget without what is leased."""
        return max(0, self.budget - sum(warm.bytes for warm in self._stages.values() if warm.leases))

    async def lease(self, key: StageKey, slots: int, need: Need, load: Load) -> Lease:
        """`slots` of the stage `key`, loaded by `load` unless it is warm.

        Raises `PlanInfeasible` when the budget has no room, and what `load` raises.
        """
        warm = self._stages.get(key) or WarmStage(
            key, need.weights, ComputeThread(f"stage-{key.first}-{key.last}")
        )
        self._free_slots(warm, slots)
        self._make_room(warm, need.caches)
        taken = tuple(sorted(warm.free)[:slots])
        warm.free.difference_update(taken)
        warm.leases += 1
        warm.reserved += need.caches
        self._stages[key] = warm
        try:
            async with warm.ready:
                if warm.stage is None:
                    warm.stage = await load(warm.thread)
        except BaseException:
            warm.free.update(taken)
            self._give_back(warm, need.caches)
            raise
        return Lease(warm, warm.stage, taken, need.caches)

    def release(self, lease: Lease, peer: str = "", keep: Mapping[int, ToKeep] | None = None) -> None:
        """End a lease: `keep` says by the lease's own numbers which slots stay for `peer`; others are
        emptied.

        The stage stays warm.
        """
        warm = lease.warm
        for number, slot in enumerate(lease.slots):
            wanted = keep.get(number) if keep else None
            if wanted is None:
                self._empty(warm, slot)
                continue
            kept = Kept(peer, warm.key, slot, wanted.labels, wanted.bytes)
            for gone in self._kept.add(kept, trio.current_time()):
                self._forget(gone)
        self._give_back(warm, lease.caches)

    def recall(self, lease: Lease, slot: int, peer: str, labels: Sequence[bytes]) -> int:
        """Fill an empty slot of a lease with what is kept for its peer; how many tokens it holds then.

        The copying is done in the stage's thread, before anything that is asked of it later.
        """
        found = self._kept.recall(peer, lease.warm.key, labels, trio.current_time())
        if found is None:
            return 0
        kept, count = found
        lease.warm.thread.submit(lease.stage.fork, kept.slot, lease.slots[slot], count * LABEL_TOKENS)
        return count * LABEL_TOKENS

    def expire(self, now: float) -> None:
        """Let go of what nobody asked for in a long time."""
        for kept in self._kept.expired(now):
            self._forget(kept)
        for warm in list(self._stages.values()):
            if not warm.leases and now - warm.idle_since > IDLE_SECONDS:
                self._evict(warm)

    def close(self) -> None:
        """Free everything."""
        for warm in list(self._stages.values()):
            self._evict(warm)

    def _give_back(self, warm: WarmStage, caches: int) -> None:
        warm.leases -= 1
        warm.reserved -= caches
        warm.idle_since = trio.current_time()
        if warm.stage is None and not warm.leases:
            self._evict(warm)

    def _free_slots(self, warm: WarmStage, slots: int) -> None:
        """Give up kept prompts of a stage, longest unused first, until `slots` of its slots are free."""
        for _, kept in self._kept.by_age():
            if len(warm.free) >= slots:
                return
            if kept.stage == warm.key:
                self._forget(kept)
        if len(warm.free) < slots:
            raise PlanInfeasible(f"{slots} slots were asked for and {len(warm.free)} are free")

    def _make_room(self, warm: WarmStage, caches: int) -> None:
        """Drop kept prompts and idle stages, longest unused first, until a lease of `warm` fits."""
        new = caches + (0 if warm.leases else warm.weights)
        if new > self.available:
            raise PlanInfeasible(
                f"{new} bytes are needed and {self.available} of {self.budget} bytes are free",
                remedy="Lend more with --compute=GB.",
            )
        stages = [(s.idle_since, s) for s in self._stages.values() if not s.leases and s is not warm]
        # Of equals the prompt goes first: the weights cost more to come by again.
        unused: list[tuple[float, int, Kept[StageKey] | WarmStage]] = [
            *((used, 0, kept) for used, kept in self._kept.by_age()),
            *((since, 1, stage) for since, stage in stages),
        ]
        for _, _, one in sorted(unused, key=lambda item: item[:2]):
            if self._held(warm) + new <= self.budget:
                return
            if isinstance(one, WarmStage):
                self._evict(one)
            else:
                self._forget(one)

    def _held(self, warm: WarmStage) -> int:
        """Bytes of everything but `warm`'s weights, which count only where it is leased already."""
        stages = {**self._stages, warm.key: warm}
        total = sum(stage.bytes + self._kept.held(key) for key, stage in stages.items())
        return total - (0 if warm.leases else warm.weights)

    def _forget(self, kept: Kept[StageKey]) -> None:
        """Empty a slot that was kept."""
        self._kept.drop(kept)
        warm = self._stages.get(kept.stage)
        if warm is not None:
            self._empty(warm, kept.slot)

    def _empty(self, warm: WarmStage, slot: int) -> None:
        if warm.stage is not None:
            warm.thread.submit(warm.stage.drop, slot)
        warm.free.add(slot)

    def _evict(self, warm: WarmStage) -> None:
        if self._stages.get(warm.key) is warm:
            del self._stages[warm.key]
            for _, kept in self._kept.by_age():
                if kept.stage == warm.key:
                    self._kept.drop(kept)
        if warm.stage is not None:
            warm.thread.submit(warm.stage.close)
        warm.thread.close()

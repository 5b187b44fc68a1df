"""The slots of a stage: one cache of keys and values each, the same bookkeeping in every engine.

What a cache holds, and how, is the engine's own affair.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

from omninfer.engines.checks import StageLimits
from omninfer.engines.interface import StageSpec
from omnistore.errors import LocalProtocolError


class Cache(Protocol):
    """What the bookkeeping needs of an engine's cache."""

    length: int
    """Tokens held; what lies beyond may be written over."""

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values."""

    def copy(self, length: int) -> Self:
        """A cache of the first `length` tokens that goes its own way from here."""


C = TypeVar("C", bound=Cache)


@dataclass(slots=True)
class SlottedStage(Generic[C]):
    """The half of `Stage` that is about slots; an engine's stage adds the arithmetic."""

    limits: StageLimits
    _caches: dict[int, C] = field(init=False, default_factory=dict)
    _closed: bool = field(init=False, default=False)

    @property
    def spec(self) -> StageSpec:
        return self.limits.spec

    def length(self, slot: int) -> int:
        self._check_open(slot)
        return self._caches[slot].length if slot in self._caches else 0

    def cache_bytes(self, slot: int) -> int:
        self._check_open(slot)
        return self._caches[slot].nbytes if slot in self._caches else 0

    def trim(self, slot: int, length: int) -> None:
        self.limits.check_trim(length, self.length(slot))
        if slot in self._caches:
            self._caches[slot].length = length

    def fork(self, src: int, dst: int, length: int | None = None) -> None:
        held = self.length(src)
        self._check_open(dst)
        kept = held if length is None else length
        self.limits.check_trim(kept, held)
        if src == dst:
            self.trim(src, kept)
            return
        self._caches.pop(dst, None)
        if src in self._caches:
            self._caches[dst] = self._caches[src].copy(kept)

    def drop(self, slot: int) -> None:
        self._check_open(slot)
        self._caches.pop(slot, None)

    def _close_slots(self) -> None:
        self._closed = True
        self._caches.clear()

    def _check_open(self, slot: int) -> None:
        if self._closed:
            raise LocalProtocolError("the stage is closed")
        self.limits.check_slot(slot)

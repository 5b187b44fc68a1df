"""A running plan: stages here and on lenders, fed with tokens, answering logits.

The coordinator relays the hidden states between the stages (a star: see spec/decisions), so it alone decides
what has happened: a token was fed once its output came back from the last stage, and whatever else a stage
may hold after an interruption is trimmed away before it is fed again. What the slots hold of earlier prompts
is not computed again (`omninfer.prefixes`). A stage that is lost raises `StageLost` and is named in `lost`;
making another plan is `omninfer.coordinator`'s. Sampling and text are elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeAlias

import numpy as np
import trio
from numpy.typing import NDArray

from omninfer import frames
from omninfer.engines.interface import Hidden, Tokens
from omninfer.prefixes import Placement, SlotTable
from omninfer.running import RunningStage
from omnistore.errors import OmniError, StageLost

PIECE: Final = 256
"""Tokens of a prompt that go through the stages at once: while one stage computes a piece, the stage before
it computes the next."""

Flow: TypeAlias = Tokens | Hidden
"""What goes from stage to stage."""


class Pipeline:
    """The stages of a plan, in order. Prompts take turns, each in the slot that the table gives it."""

    def __init__(self, stages: Sequence[RunningStage], table: SlotTable, *, width: int) -> None:
        """`table` has no more slots than any of the stages; `width`: numbers of a hidden state."""
        self.stages = tuple(stages)
        self.table = table
        self.lost: frozenset[str] = frozenset()
        """Peers whose stages broke."""
        self.computed = 0
        """Tokens that went through the stages, a shared prefix counted once."""
        self._piece = max(1, min(PIECE, frames.LIMITS.rows, frames.LIMITS.payload // (4 * width)))
        self._unclean: set[int] = set()
        """Slots of which a stage may hold more than the table says."""
        self._turn = trio.Lock()

    async def logits(self, history: Sequence[int]) -> tuple[NDArray[np.float32], int]:
        """The logits after `history`, [vocab], and how many of its tokens a slot held and were not fed again.

        Raises `StageLost`, or `InferenceError` when the context or the memory for caches is full.
        Interrupted, it can be called again: what was fed in part is forgotten.
        """
        async with self._turn:
            placed = self.table.place(history, trio.current_time())
            try:
                await self._prepare(placed)
                ids = np.array(history[placed.start :], dtype=np.int32)
                self._unclean.add(placed.slot)
                last = await self._feed(placed.slot, ids, placed.start)
                self._unclean.discard(placed.slot)
                self.computed += len(ids)
            finally:
                self.table.release(placed.slot, trio.current_time())
        row: NDArray[np.float32] = last[0]
        return row, placed.start

    async def aclose(self) -> None:
        """Let go of every stage; never raises."""
        for stage in self.stages:
            await stage.aclose()

    async def _prepare(self, placed: Placement) -> None:
        """Have every stage hold in the slot what the table says; interrupted, slots are unclean and not
        wrong."""
        slot, fresh = placed.slot, placed.source is None and not placed.start
        emptied = {*placed.dropped, *({slot} if fresh and slot in self._unclean else ())}
        trimmed = not fresh and placed.source is None and (placed.lost > 0 or slot in self._unclean)
        if not (emptied or trimmed or placed.source is not None):
            return
        self._unclean |= {*emptied, slot}
        ready = False
        try:
            for stage in self.stages:
                with self._watching(stage):
                    for one in emptied:
                        await stage.drop(one)
                    if placed.source is not None:
                        await stage.fork(placed.source, slot, placed.start)
                    elif trimmed:
                        await stage.trim(slot, placed.start)
            ready = True
        finally:
            if not ready and placed.source is not None:
                self.table.forget(slot)  # not every stage has copied it
        self._unclean -= {*emptied, slot}

    async def _feed(self, slot: int, ids: Tokens, start: int) -> NDArray[np.float32]:
        """The last piece's output, having fed `ids` to every stage."""
        pieces = [ids[at : at + self._piece] for at in range(0, len(ids), self._piece)]
        if len(pieces) > 1:
            return await self._many(slot, pieces, start)
        x: Flow = ids
        for stage in self.stages:
            x = await self._forward(stage, x, slot, start, logits=True)
        self.table.append(slot, ids.tolist())
        return x.astype(np.float32, copy=False)

    async def _many(self, slot: int, pieces: Sequence[Tokens], start: int) -> NDArray[np.float32]:
        """Piece after piece, each stage at work on another one."""
        starts = start + np.cumsum([0, *map(len, pieces)])
        results: list[NDArray[np.float32]] = []
        failures: list[OmniError] = []

        async def stand(
            stage: RunningStage,
            arrivals: trio.MemoryReceiveChannel[Flow],
            departures: trio.MemorySendChannel[Flow],
        ) -> None:
            async with arrivals, departures:
                number = 0
                async for x in arrivals:
                    last = number == len(pieces) - 1
                    try:
                        out = await self._forward(stage, x, slot, int(starts[number]), logits=last)
                    except OmniError as error:
                        failures.append(error)
                        nursery.cancel_scope.cancel()
                        return
                    number += 1
                    await departures.send(out)

        async with trio.open_nursery() as nursery:
            first, arrivals = trio.open_memory_channel[Flow](0)
            for stage in self.stages:
                departures, following = trio.open_memory_channel[Flow](0)
                nursery.start_soon(stand, stage, arrivals, departures)
                arrivals = following
            nursery.start_soon(_pour, pieces, first)
            async for out in arrivals:
                self.table.append(slot, pieces[len(results)].tolist())
                results.append(out.astype(np.float32, copy=False))
        if failures:
            raise failures[0]
        return results[-1]

    async def _forward(
        self, stage: RunningStage, x: Flow, slot: int, position: int, *, logits: bool
    ) -> NDArray[np.float32]:
        with self._watching(stage):
            return await stage.forward(x, slot, position, logits=logits)

    @contextmanager
    def _watching(self, stage: RunningStage) -> Iterator[None]:
        """Remember whose stage was lost."""
        try:
            yield
        except StageLost:
            self.lost |= {stage.planned.peer}
            raise


async def _pour(pieces: Sequence[Tokens], into: trio.MemorySendChannel[Flow]) -> None:
    async with into:
        for piece in pieces:
            await into.send(piece)

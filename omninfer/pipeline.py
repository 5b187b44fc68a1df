"""A running plan: stages here and on lenders, fed with tokens, answering logits.

The coordinator relays the hidden states between the stages (a star: see spec/decisions), so it alone decides
what has happened: a token was fed once its output came back from the last stage, and whatever else a stage
may hold after an interruption is trimmed away before it is fed again. What the slots hold of earlier prompts
is not computed again (`omninfer.prefixes`). A stage that is lost raises `StageLost` and is named in `lost`;
making another plan is `omninfer.coordinator`'s. Sampling and text are elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeAlias

import numpy as np
import trio
from numpy.typing import NDArray

from omninfer import frames
from omninfer.engines.interface import Hidden, Tokens
from omninfer.labels import Labels
from omninfer.prefixes import Placement, SlotTable
from omninfer.running import RunningStage
from omnistore.errors import OmniError, StageLost

PIECE: Final = 256
"""Tokens of a prompt that go through the stages at once: while one stage computes a piece, the stage before
it computes the next."""

_log = logging.getLogger(__name__)

Flow: TypeAlias = Tokens | Hidden
"""What goes from stage to stage."""


class Pipeline:
    """The stages of a plan, in order. Prompts take turns, each in the slot that the table gives it."""

    def __init__(
        self, stages: Sequence[RunningStage], table: SlotTable, labels: Labels | None, *, width: int
    ) -> None:
        """`table` has no more slots than any of the stages; `width`: numbers of a hidden state. Without
        `labels`, lenders keep nothing when the pipeline ends."""
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
        self._labels = labels
        self._recalled = labels is None
        """Lenders were asked what they kept; that is done for the first prompt."""

    async def logits(self, history: Sequence[int]) -> tuple[NDArray[np.float32], int]:
        """The logits after `history`, [vocab], and how many of its tokens a slot held and were not fed again.

        Raises `StageLost`, or `InferenceError` when the context or the memory for caches is full.
        Interrupted, it can be called again: what was fed in part is forgotten.
        """
        async with self._turn:
            placed = self.table.place(history, trio.current_time())
            try:
                await self._prepare(placed)
                starts = await self._starts(placed, history)
                ids = np.array(history[starts[0] :], dtype=np.int32)
                self._unclean.add(placed.slot)
                last = await self._feed(placed.slot, ids, starts)
                self._unclean.discard(placed.slot)
                self.computed += len(ids)
            finally:
                self.table.release(placed.slot, trio.current_time())
        row: NDArray[np.float32] = last[0]
        return row, starts[0]

    async def aclose(self) -> None:
        """Let go of every stage; never raises. Lenders may keep what was said, for whoever has the labels."""
        with trio.move_on_after(1) as limit:
            limit.shield = True
            for slot in self.table.by_age():
                labels = self._labels.of(self.table.tokens(slot)) if self._labels is not None else ()
                for stage in self.stages if labels else ():
                    try:
                        await stage.keep(slot, labels)
                    except StageLost as error:
                        _log.debug("nothing is kept: %s", error)
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

    async def _starts(self, placed: Placement, history: Sequence[int]) -> list[int]:
        """How many tokens each stage has of `history` and need not be fed.

        A stage needs what comes out of the stages before it from where its own cache ends, so none has more
        than those after it. Where lenders kept an earlier run's beginning, and this machine has none, the
        lenders are spared what is computed here.
        """
        labels = () if self._recalled or self._labels is None else self._labels.of(history[:-1])
        if placed.start or not labels:
            return [placed.start] * len(self.stages)
        self._recalled = True
        self._unclean.add(placed.slot)
        held = await self._recall(placed.slot, labels)
        starts = [min(held[n:]) for n in range(len(held))]
        for stage, have, start in zip(self.stages, held, starts, strict=True):
            if have > start:
                with self._watching(stage):
                    await stage.trim(placed.slot, start)
        self._unclean.discard(placed.slot)
        self.table.append(placed.slot, history[: starts[0]])
        return starts

    async def _recall(self, slot: int, labels: tuple[bytes, ...]) -> list[int]:
        """What each stage holds in an empty slot after being asked for what it kept."""
        held, failures = [0] * len(self.stages), list[StageLost]()

        async def recall(n: int, stage: RunningStage) -> None:
            try:
                with self._watching(stage):
                    held[n] = await stage.recall(slot, labels)
            except StageLost as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for n, stage in enumerate(self.stages):
                nursery.start_soon(recall, n, stage)
        if failures:
            raise failures[0]
        return held

    async def _feed(self, slot: int, ids: Tokens, starts: Sequence[int]) -> NDArray[np.float32]:
        """The last piece's output, having fed `ids` to every stage, to each from where its cache ends."""
        pieces = [ids[at : at + self._piece] for at in range(0, len(ids), self._piece)]
        if len(pieces) > 1:
            return await self._many(slot, pieces, starts)
        x: Flow | None = ids
        ends = (starts[0], starts[0] + len(ids))
        for stage, start in zip(self.stages, starts, strict=True):
            x = await self._forward(stage, x, slot, (max(ends[0], start), ends[1]), logits=True)
        assert x is not None  # every stage is fed the last token
        self.table.append(slot, ids.tolist())
        return x.astype(np.float32, copy=False)

    async def _many(self, slot: int, pieces: Sequence[Tokens], starts: Sequence[int]) -> NDArray[np.float32]:
        """Piece after piece, each stage at work on another one."""
        edges: list[int] = (starts[0] + np.cumsum([0, *map(len, pieces)])).tolist()
        results: list[NDArray[np.float32] | None] = []
        failures: list[OmniError] = []

        async def stand(
            n: int,
            arrivals: trio.MemoryReceiveChannel[Flow | None],
            departures: trio.MemorySendChannel[Flow | None],
        ) -> None:
            async with arrivals, departures:
                number = 0
                async for x in arrivals:
                    last = number == len(pieces) - 1
                    span = (max(edges[number], starts[n]), edges[number + 1])
                    try:
                        out = await self._forward(self.stages[n], x, slot, span, logits=last)
                    except OmniError as error:
                        failures.append(error)
                        nursery.cancel_scope.cancel()
                        return
                    number += 1
                    await departures.send(out)

        async with trio.open_nursery() as nursery:
            first, arrivals = trio.open_memory_channel[Flow | None](0)
            for n in range(len(self.stages)):
                departures, following = trio.open_memory_channel[Flow | None](0)
                nursery.start_soon(stand, n, arrivals, departures)
                arrivals = following
            nursery.start_soon(_pour, pieces, first)
            async for out in arrivals:
                self.table.append(slot, pieces[len(results)].tolist())
                results.append(None if out is None else out.astype(np.float32, copy=False))
        if failures:
            raise failures[0]
        last = results[-1]
        assert last is not None  # every stage is fed the last token
        return last

    async def _forward(
        self, stage: RunningStage, x: Flow | None, slot: int, span: tuple[int, int], *, logits: bool
    ) -> NDArray[np.float32] | None:
        """The last rows of `x`, for the tokens of `span`, through a stage; None if it has these already."""
        count = span[1] - span[0]
        if x is None or count <= 0:
            return None
        with self._watching(stage):
            return await stage.forward(x[len(x) - count :], slot, span[0], logits=logits)

    @contextmanager
    def _watching(self, stage: RunningStage) -> Iterator[None]:
        """Remember whose stage was lost."""
        try:
            yield
        except StageLost:
            self.lost |= {stage.planned.peer}
            raise


async def _pour(pieces: Sequence[Tokens], into: trio.MemorySendChannel[Flow | None]) -> None:
    async with into:
        for piece in pieces:
            await into.send(piece)

"""A running plan: stages here and on lenders, fed with tokens, answering logits.

The coordinator relays the hidden states between the stages (a star: see spec/decisions), so it alone
decides what has happened: a token was fed once its output came back from the last stage, and
whatever else a stage may hold after an interruption is trimmed away before it is fed again. A stage that
breaks, goes silent or answers nonsense raises `StageLost` and is named in `lost`; making another plan is
`omninfer.coordinator`'s. Sampling and text are elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final, Protocol, TypeAlias

import numpy as np
import trio
from numpy.typing import NDArray

from omninfer import frames
from omninfer.engines import Stage, StageSpec
from omninfer.engines.interface import Hidden, Logits, Tokens
from omninfer.link import FrameLink
from omninfer.plan import PlannedStage
from omninfer.threads import ComputeThread
from omnistore.errors import (
    InferenceError,
    OmniError,
    PeerUnreachable,
    RemoteProtocolError,
    StageLost,
)

PIECE: Final = 256
"""Tokens of a prompt that go through the stages at once: while one stage computes a piece, the stage before
it computes the next."""
SLOT: Final = 0
"""One generation at a time: a pipeline uses one slot of each stage."""

_log = logging.getLogger(__name__)

Told: TypeAlias = Callable[[frames.Progress], None]
Flow: TypeAlias = Tokens | Hidden
"""What goes from stage to stage."""


class RunningStage(Protocol):
    """A stage of a pipeline, wherever it is."""

    @property
    def planned(self) -> PlannedStage: ...

    async def forward(self, x: Tokens | Hidden, position: int, *, logits: bool) -> NDArray[np.float32]:
        """Append to the slot; hidden states, or the last token's logits (or none) with the head."""
        ...

    async def trim(self, length: int) -> None:
        """Forget all but the first tokens."""
        ...

    async def aclose(self) -> None:
        """Let go of it; never raises."""
        ...


class LocalStage:
    """A stage on this machine, in its own thread."""

    def __init__(self, planned: PlannedStage, stage: Stage, thread: ComputeThread) -> None:
        self.planned = planned
        self._stage = stage
        self._thread = thread

    async def forward(self, x: Tokens | Hidden, position: int, *, logits: bool) -> NDArray[np.float32]:
        def work() -> Hidden | Logits:
            return self._stage.forward(x, slot=SLOT, position=position, logits="last" if logits else "none")

        return await self._thread.run(work)

    async def trim(self, length: int) -> None:
        await self._thread.run(self._stage.trim, SLOT, length)

    async def aclose(self) -> None:
        self._thread.submit(self._stage.close)
        self._thread.close()


class RemoteStage:
    """A stage on a lender. Made by `load`."""

    def __init__(self, planned: PlannedStage, spec: StageSpec, link: FrameLink, ready: frames.Ready) -> None:
        self.planned = planned
        self.ready = ready
        self._spec = spec
        self._link = link

    @classmethod
    async def load(
        cls, link: FrameLink, planned: PlannedStage, spec: StageSpec, order: frames.Load, told: Told
    ) -> RemoteStage | frames.Refuse:
        """Have the lender load its range; its refusal is an answer too. Raises `StageLost`."""
        async with _losing(link):
            await link.send(order)
            while True:
                match await _next(link):
                    case frames.Progress() as progress:
                        told(progress)
                    case frames.Ready() as ready:
                        return cls(planned, spec, link, ready)
                    case frames.Refuse() as refusal:
                        return refusal
                    case other:
                        raise RemoteProtocolError(f"{link.peer} answered a load with {frames.name_of(other)}")

    async def forward(self, x: Tokens | Hidden, position: int, *, logits: bool) -> NDArray[np.float32]:
        given = tuple(x.tolist()) if self._spec.embed else frames.Activations.of(x.astype(np.float32))
        async with _losing(self._link):
            seq = self._link.conversation.next_seq
            await self._link.send(frames.Forward(seq, SLOT, position, given, logits))
            while True:
                match await _next(self._link):
                    case frames.Output(answered, values) if answered == seq:
                        self._check(values)
                        return values.array()
                    case frames.Output() | frames.Progress():
                        pass  # of a forward that was interrupted, or a sign of life
                    case other:
                        raise RemoteProtocolError(
                            f"{self._link.peer} answered a forward with {frames.name_of(other)}"
                        )

    def _check(self, values: frames.Activations) -> None:
        """The conversation has checked the rows; how wide they are only the model says."""
        columns = self._spec.model.vocab if self._spec.head else self._spec.model.width
        if values.columns != columns:
            raise RemoteProtocolError(f"{self._link.peer} answered rows of {values.columns}, not {columns}")

    async def trim(self, length: int) -> None:
        async with _losing(self._link):
            await self._link.send(frames.Trim(SLOT, length))

    async def aclose(self) -> None:
        with trio.move_on_after(1) as limit:
            limit.shield = True
            try:
                await self._link.send(frames.Bye())
            except OmniError as error:
                _log.debug("leaving %s: %s", self._link.peer, error)
        await self._link.aclose()


async def _next(link: FrameLink) -> frames.Frame:
    frame = await link.receive()
    if frame is None:
        raise PeerUnreachable(f"{link.peer} closed the stream")
    if isinstance(frame, frames.Error):
        raise RemoteProtocolError(f"{link.peer} gave up: {frame.reason}")
    return frame


@asynccontextmanager
async def _losing(link: FrameLink) -> AsyncIterator[None]:
    """Whatever goes wrong with a lender, the stage is lost; the reason stays in the message."""
    try:
        yield
    except (PeerUnreachable, RemoteProtocolError) as error:
        await link.reset()
        raise StageLost(f"the stage on {link.peer} is lost: {error.message}") from error


class Pipeline:
    """The stages of a plan, in order, for one generation at a time."""

    def __init__(self, stages: Sequence[RunningStage], *, width: int, context: int) -> None:
        self.stages = tuple(stages)
        self.context = context
        self.lost: frozenset[str] = frozenset()
        """Peers whose stages broke."""
        self.computed = 0
        """Tokens that went through the stages, a shared prefix counted once."""
        self._fed: list[int] = []
        """The tokens that every stage has seen."""
        self._piece = max(1, min(PIECE, frames.LIMITS.rows, frames.LIMITS.payload // (4 * width)))
        self._clean = True
        """No stage holds more than `_fed`."""

    async def logits(self, history: Sequence[int]) -> NDArray[np.float32]:
        """The logits after `history`, [vocab]; what the stages have seen of it already is not fed again.

        Raises `StageLost`, or `InferenceError` when the context is full. Interrupted, it can be called
        again: what was fed in part is forgotten.
        """
        if len(history) > self.context:
            raise InferenceError(
                f"{len(history)} tokens do not fit in a context of {self.context}",
                remedy="Give a larger --context, or a shorter prompt.",
            )
        # The last token is fed in any case: it is what the logits come from.
        common = _common_prefix(self._fed, history[:-1])
        if common < len(self._fed) or not self._clean:
            await self._trim_all(common)
        self._clean = False
        ids = np.array(history[common:], dtype=np.int32)
        pieces = [ids[start : start + self._piece] for start in range(0, len(ids), self._piece)]
        last = await (self._one(pieces[0]) if len(pieces) == 1 else self._many(pieces))
        self._clean = True
        self.computed += len(ids)
        row: NDArray[np.float32] = last[0]
        return row

    async def aclose(self) -> None:
        """Let go of every stage; never raises."""
        for stage in self.stages:
            await stage.aclose()

    async def _trim_all(self, length: int) -> None:
        self._clean = False
        del self._fed[length:]
        for stage in self.stages:
            with self._watching(stage):
                await stage.trim(length)
        self._clean = True

    async def _one(self, piece: Tokens) -> NDArray[np.float32]:
        x: Flow = piece
        for stage in self.stages:
            x = await self._forward(stage, x, len(self._fed), logits=True)
        self._fed += piece.tolist()
        return x.astype(np.float32, copy=False)

    async def _many(self, pieces: Sequence[Tokens]) -> NDArray[np.float32]:
        """Piece after piece, each stage at work on another one."""
        starts = len(self._fed) + np.cumsum([0, *map(len, pieces)])
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
                        out = await self._forward(stage, x, int(starts[number]), logits=last)
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
                self._fed += pieces[len(results)].tolist()
                results.append(out.astype(np.float32, copy=False))
        if failures:
            raise failures[0]
        return results[-1]

    async def _forward(
        self, stage: RunningStage, x: Tokens | Hidden, position: int, *, logits: bool
    ) -> NDArray[np.float32]:
        with self._watching(stage):
            return await stage.forward(x, position, logits=logits)

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


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    if len(a) <= len(b) and list(a) == list(b[: len(a)]):
        return len(a)
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

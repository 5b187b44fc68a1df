"""Stages of a pipeline, wherever they are: in a thread of this machine, or on a lender.

Both are fed, trimmed, copied and emptied slot by slot; a lender's stage that breaks, goes silent or answers
nonsense raises `StageLost`. Which slot a prompt goes into is `omninfer.prefixes`'s, what to do about a loss
`omninfer.coordinator`'s.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol, TypeAlias

import numpy as np
import trio
from numpy.typing import NDArray

from omninfer import frames
from omninfer.engines import Stage, StageSpec
from omninfer.engines.interface import Hidden, Logits, Tokens
from omninfer.link import FrameLink
from omninfer.plan import PlannedStage
from omninfer.threads import ComputeThread
from omnistore.errors import OmniError, PeerUnreachable, RemoteProtocolError, StageLost

_log = logging.getLogger(__name__)

Told: TypeAlias = Callable[[frames.Progress], None]


class RunningStage(Protocol):
    """A stage of a pipeline, wherever it is."""

    @property
    def planned(self) -> PlannedStage: ...

    @property
    def slots(self) -> int:
        """How many it has."""
        ...

    async def forward(
        self, x: Tokens | Hidden, slot: int, position: int, *, logits: bool
    ) -> NDArray[np.float32]:
        """Append to a slot; hidden states, or the last token's logits (or none) with the head."""
        ...

    async def trim(self, slot: int, length: int) -> None:
        """Forget all but the first tokens of a slot."""
        ...

    async def fork(self, src: int, dst: int, length: int) -> None:
        """Make a slot continue from the first tokens of another one."""
        ...

    async def drop(self, slot: int) -> None:
        """Empty a slot."""
        ...

    async def recall(self, slot: int, labels: tuple[bytes, ...]) -> int:
        """Fill an empty slot with what was kept of an earlier stream; how many tokens it holds then."""
        ...

    async def keep(self, slot: int, labels: tuple[bytes, ...]) -> None:
        """Ask that the labelled beginning of a slot outlives `aclose`."""
        ...

    async def aclose(self) -> None:
        """Let go of it; never raises."""
        ...


class LocalStage:
    """A stage on this machine, in its own thread."""

    def __init__(self, planned: PlannedStage, stage: Stage, thread: ComputeThread, slots: int = 1) -> None:
        self.planned = planned
        self.slots = slots
        self._stage = stage
        self._thread = thread

    async def forward(
        self, x: Tokens | Hidden, slot: int, position: int, *, logits: bool
    ) -> NDArray[np.float32]:
        def work() -> Hidden | Logits:
            return self._stage.forward(x, slot=slot, position=position, logits="last" if logits else "none")

        return await self._thread.run(work)

    async def trim(self, slot: int, length: int) -> None:
        await self._thread.run(self._stage.trim, slot, length)

    async def fork(self, src: int, dst: int, length: int) -> None:
        await self._thread.run(self._stage.fork, src, dst, length)

    async def drop(self, slot: int) -> None:
        await self._thread.run(self._stage.drop, slot)

    async def recall(self, slot: int, labels: tuple[bytes, ...]) -> int:
        return 0  # what this process held, its table knows

    async def keep(self, slot: int, labels: tuple[bytes, ...]) -> None:
        pass  # nothing here outlives the process

    async def aclose(self) -> None:
        self._thread.submit(self._stage.close)
        self._thread.close()


class RemoteStage:
    """A stage on a lender. Made by `load`."""

    def __init__(self, planned: PlannedStage, spec: StageSpec, link: FrameLink, ready: frames.Ready) -> None:
        self.planned = planned
        self.ready = ready
        load, caching = link.conversation.load, link.conversation.caching
        self.slots = load.slots if load is not None and caching else 1
        self._spec = spec
        self._link = link

    @classmethod
    async def load(
        cls,
        link: FrameLink,
        planned: PlannedStage,
        spec: StageSpec,
        order: tuple[frames.Cache, frames.Load],
        told: Told,
    ) -> RemoteStage | frames.Refuse:
        """Have the lender load its range; its refusal is an answer too. Raises `StageLost`."""
        async with _losing(link):
            for frame in order if link.conversation.caching else order[1:]:
                await link.send(frame)
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

    async def forward(
        self, x: Tokens | Hidden, slot: int, position: int, *, logits: bool
    ) -> NDArray[np.float32]:
        given = tuple(x.tolist()) if self._spec.embed else frames.Activations.of(x.astype(np.float32))
        async with _losing(self._link):
            seq = self._link.conversation.next_seq
            await self._link.send(frames.Forward(seq, slot, position, given, logits))
            while True:
                match await _next(self._link):
                    case frames.Output(answered, values) if answered == seq:
                        self._check(values)
                        return values.array()
                    case frames.Output() | frames.Held() | frames.Progress():
                        pass  # of what was interrupted, or a sign of life
                    case other:
                        raise RemoteProtocolError(
                            f"{self._link.peer} answered a forward with {frames.name_of(other)}"
                        )

    def _check(self, values: frames.Activations) -> None:
        """The conversation has checked the rows; how wide they are only the model says."""
        columns = self._spec.model.vocab if self._spec.head else self._spec.model.width
        if values.columns != columns:
            raise RemoteProtocolError(f"{self._link.peer} answered rows of {values.columns}, not {columns}")

    async def trim(self, slot: int, length: int) -> None:
        async with _losing(self._link):
            await self._link.send(frames.Trim(slot, length))

    async def fork(self, src: int, dst: int, length: int) -> None:
        async with _losing(self._link):
            await self._link.send(frames.Drop(dst))
            await self._link.send(frames.Fork(src, dst, length))

    async def recall(self, slot: int, labels: tuple[bytes, ...]) -> int:
        if not self._link.conversation.caching:
            return 0
        async with _losing(self._link):
            await self._link.send(frames.Recall(slot, labels))
            while True:
                match await _next(self._link):
                    case frames.Held(answered, length) if answered == slot:
                        return length
                    case frames.Output() | frames.Held() | frames.Progress():
                        pass
                    case other:
                        raise RemoteProtocolError(
                            f"{self._link.peer} answered a recall with {frames.name_of(other)}"
                        )

    async def keep(self, slot: int, labels: tuple[bytes, ...]) -> None:
        if self._link.conversation.caching:
            async with _losing(self._link):
                await self._link.send(frames.Keep(slot, labels))

    async def drop(self, slot: int) -> None:
        async with _losing(self._link):
            await self._link.send(frames.Drop(slot))

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

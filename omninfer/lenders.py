"""A coordinator's dealings with lenders before there is a pipeline: find, ask, measure, have them load.

What a lender says of itself is only ever used to plan with: a liar makes its own stage slow or lost. A
refusal raises `PlanInfeasible` with the lender's own reason and remedy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from omninfer import frames
from omninfer.engines import StageSpec
from omninfer.link import FrameLink
from omninfer.plan import Machine, PlannedStage
from omninfer.running import RemoteStage
from omnistore.errors import NetworkError, PeerUnreachable, PlanInfeasible, RemoteProtocolError
from omnistore.net.interface import ContentRouting, Network, Provider

FIND_SECONDS: Final = 5.0
"""How long is looked for lenders that nobody named."""
MOST_LENDERS: Final = 16
"""Lenders asked that nobody named: more than a plan will use."""
ROUND_TRIPS: Final = 3
"""Pings whose quickest counts as the link's round trip."""
BULK: Final = 256 << 10
"""Bytes of the ping that a link's bandwidth is measured with."""
PROFILE_SECONDS: Final = 30.0
"""For everything before a plan: a lender measures its engine on the first question."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Lending:
    """A lender that would take part."""

    link: FrameLink
    machine: Machine
    named: bool
    """Somebody asked for this very machine."""
    taken: bool = False
    """A stage owns the link now."""

    @property
    def peer(self) -> str:
        return self.machine.peer


async def find_lenders(routing: ContentRouting) -> Sequence[Provider]:
    """Peers that say in the DHT that they lend compute."""
    with trio.move_on_after(FIND_SECONDS):
        try:
            return await routing.find_providers(frames.LENDERS, limit=MOST_LENDERS)
        except NetworkError as error:
            _log.info("looking for lenders: %s", error)
    return []


async def ask_lender(
    network: Network, provider: Provider, engine: str, silence: float, *, named: bool
) -> Lending:
    """Ask for a profile and measure the link, over a stream of the newest version that the lender speaks.

    Raises `PeerUnreachable`, `RemoteProtocolError`, or `PlanInfeasible` for a refusal.
    """
    failure = PeerUnreachable(f"the lender {provider.peer} told nothing of itself in {PROFILE_SECONDS:.0f} s")
    started = trio.current_time()
    with trio.move_on_after(PROFILE_SECONDS):
        for protocol in (frames.CACHING, frames.PROTOCOL):
            try:
                stream = await network.open_stream(provider, protocol)
                caching = protocol == frames.CACHING
                link = FrameLink(stream, "coordinator", silence=silence, caching=caching)
                return Lending(link, await _asked(link, engine), named)
            except PeerUnreachable as error:
                # What it speaks may show only when it is to answer: it may speak 1.0.0, or not lend at all.
                _log.debug("%s", error)
                failure = PeerUnreachable(
                    f"{provider.peer} does not answer as a lender: {error.message}",
                    remedy="Check its address, and that `omni seed --compute` runs there.",
                )
            if trio.current_time() - started >= silence:
                break
    raise failure


async def _asked(link: FrameLink, engine: str) -> Machine:
    """What a lender says of itself; without an answer the stream is reset."""
    try:
        return await _profile(link, engine)
    except BaseException:
        await link.reset()
        raise


async def _profile(link: FrameLink, engine: str) -> Machine:
    await link.send(frames.Ask(engine))
    answer = await _answer(link)
    if isinstance(answer, frames.Refuse):
        raise _refused(link.peer, answer)
    if not isinstance(answer, frames.Profile):
        raise RemoteProtocolError(f"{link.peer} answered a question with {frames.name_of(answer)}")
    rtt = min([await _ping(link, 0) for _ in range(ROUND_TRIPS)])
    bulk = max(await _ping(link, BULK) - rtt, 1e-9)
    return Machine(
        link.peer,
        memory=answer.memory,
        speed=float(answer.speed),
        rtt=rtt,
        # There and back; what loopback and memory do is no limit worth planning with.
        bandwidth=2 * BULK / bulk,
        footprint=answer.footprint / 1000,
        engine=answer.engine,
    )


async def _ping(link: FrameLink, size: int) -> float:
    """Seconds until a ping of `size` bytes came back."""
    started = trio.current_time()
    await link.send(frames.Ping(bytes(size)))
    if not isinstance(await _answer(link), frames.Pong):
        raise RemoteProtocolError(f"{link.peer} did not answer a ping")
    return trio.current_time() - started


async def _answer(link: FrameLink) -> frames.Frame:
    """The next frame that is not a mere sign of life."""
    frame = await link.receive()
    while isinstance(frame, frames.Progress):
        frame = await link.receive()
    if frame is None:
        raise PeerUnreachable(f"{link.peer} closed the stream")
    if isinstance(frame, frames.Error):
        raise RemoteProtocolError(f"{link.peer} gave up: {frame.reason}")
    return frame


async def load_remotely(
    lending: Lending,
    planned: PlannedStage,
    spec: StageSpec,
    order: tuple[frames.Cache, frames.Load],
    told: Callable[[str, frames.Progress], None],
) -> RemoteStage:
    """Have a lender load its range. Raises `StageLost`, or `PlanInfeasible` for a refusal."""
    answer = await RemoteStage.load(
        lending.link, planned, spec, order, lambda progress: told(lending.peer, progress)
    )
    if isinstance(answer, frames.Refuse):
        await lending.link.aclose()
        raise _refused(f"{lending.peer} (layers {planned.layers})", answer)
    return answer


def _refused(who: str, refusal: frames.Refuse) -> PlanInfeasible:
    return PlanInfeasible(
        f"the lender {who} refuses: {_printable(refusal.reason)}",
        remedy=_printable(refusal.remedy) or None,
    )


def _printable(text: str) -> str:
    """A stranger's words, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)

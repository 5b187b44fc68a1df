"""Lending compute: the server of `/omni/pipeline`, 1.0.0 and 1.1.0 (spec/06-pipeline, section "Lending").

One `_CoordinatorStream` per stream: it answers what the coordinator asks, in order, and lets go of every slot
when the stream ends, however it ends, but for those that the coordinator asked to be kept. A lender fetches
by CID only the parts of the range it was asked for and believes nobody about them: what it computes with went
through the store's digests. Nobody is served who was not allowed by name, or by `--allow any`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import trio

from omninfer import frames
from omninfer.arch import KVKind, kv_bytes
from omninfer.engines import Engine, Stage, StageSpec, pick_engine
from omninfer.engines.interface import WhichLogits
from omninfer.link import FrameLink
from omninfer.plan import Machine, ModelCosts
from omninfer.profile import footprint, free_memory, held, measure
from omninfer.sources import Description, StoreTensorSource, describe_untrusted, header_parts, stage_parts
from omninfer.threads import ComputeThread
from omninfer.warm import Lease, Need, StageKey, ToKeep, WarmStages
from omninfer.weights import Choose, NetworkWeights
from omnistore.errors import (
    BadConfig,
    InputError,
    NetworkError,
    OmniError,
    PeerUnreachable,
    PlanInfeasible,
    ProtocolError,
)
from omnistore.net.addresses import is_peer_id
from omnistore.net.interface import ContentRouting, Network, Stream
from omnistore.store.interface import Store

if TYPE_CHECKING:
    from omnistore.node import Node

BEAT_SECONDS: Final = 1.0
"""A lender at work says so this often: a coordinator can then tell slow from gone."""
SILENCE_SECONDS: Final = 15.0
"""A coordinator that takes no byte for this long is gone."""
IDLE_SECONDS: Final = 1800.0
"""A coordinator that asks nothing for this long is let go: it loads again when its person comes back."""
MAX_STREAMS: Final = 64
"""Streams served at once; each holds at most one forward's activations (64 MiB) in memory."""

KEPT_BYTES: Final = 256 << 20
"""For the prompts that one peer comes back to: a few pages of a large model."""

ANNOUNCE_SECONDS: Final = 6 * 3600.0
"""Providers expire after two days elsewhere; a machine that was switched off should be forgotten sooner."""
UNCONFIRMED_SECONDS: Final = 2.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LendOptions:
    """What a machine lends, and to whom."""

    memory: int | None = None
    """Bytes; None for what is free when the service starts."""
    allow: frozenset[str] | None = frozenset()
    """Peer IDs; None for any peer."""
    kept: int = KEPT_BYTES
    """Bytes, of those lent, that one peer's prompts may take after its streams ended."""


class Lender:
    """The stages, engines and permissions of one machine."""

    def __init__(self, peer_id: str, store: Store, weights: NetworkWeights, options: LendOptions) -> None:
        self.peer_id = peer_id
        self.store = store
        self.weights = weights
        self.stages = WarmStages(free_memory() if options.memory is None else options.memory, options.kept)
        self._allow = options.allow
        self._streams = 0
        self._speeds: dict[str, float] = {}
        self._measuring = trio.Lock()

    def serve_on(self, network: Network) -> None:
        """Answer the streams of both versions."""
        network.serve(frames.PROTOCOL, partial(self.serve, caching=False))
        network.serve(frames.CACHING, partial(self.serve, caching=True))

    async def serve(self, stream: Stream, *, caching: bool) -> None:
        """Run one inbound stream to its end."""
        link = FrameLink(stream, "lender", silence=SILENCE_SECONDS, caching=caching)
        self._streams += 1
        try:
            await _CoordinatorStream(self, link).run()
        finally:
            self._streams -= 1

    def refusal(self, peer: str) -> frames.Refuse | None:
        """Why this peer gets nothing, or None."""
        if self._allow is not None and peer not in self._allow:
            return frames.Refuse(
                "not-allowed",
                f"{self.peer_id} does not lend compute to {peer}",
                f"Start it with: omni seed --compute --allow {peer}",
            )
        if self._streams > MAX_STREAMS:
            return frames.Refuse("busy", f"{self.peer_id} serves {MAX_STREAMS} others", "Try again later.")
        return None

    async def speed(self, engine: Engine) -> float:
        """Measured once per engine, on the first question."""
        async with self._measuring:
            if engine.name not in self._speeds:
                thread = ComputeThread("profile")
                try:
                    self._speeds[engine.name] = await thread.run(measure, engine)
                finally:
                    thread.close()
            return self._speeds[engine.name]

    async def expire(self) -> None:
        """Let idle stages go, for as long as the service runs."""
        try:
            while True:
                await trio.sleep(60)
                self.stages.expire(trio.current_time())
        finally:
            self.stages.close()


class _CoordinatorStream:
    """One coordinator's stream."""

    def __init__(self, lender: Lender, link: FrameLink) -> None:
        self._lender = lender
        self._link = link
        self._lease: Lease | None = None
        self._spec: StageSpec | None = None
        self._keep: dict[int, tuple[bytes, ...]] = {}
        """Labels of the slots that are to be kept."""
        self._at_work: frames.Progress | None = None
        """What a beat says; None while waiting for the coordinator."""

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._beat, nursery.cancel_scope)
                await self._answer_all()
                nursery.cancel_scope.cancel()
        finally:
            if self._lease is not None:
                self._lender.stages.release(self._lease, self._link.peer, self._to_keep())
            await self._link.aclose()

    async def _beat(self, scope: trio.CancelScope) -> None:
        """Say now and then that we are still at work; end the stream when nobody hears it."""
        while True:
            await trio.sleep(BEAT_SECONDS)
            if self._at_work is not None:
                try:
                    await self._link.send(self._at_work)
                except (PeerUnreachable, ProtocolError):
                    scope.cancel()

    async def _answer_all(self) -> None:
        peer = self._link.peer
        try:
            while True:
                frame = await self._link.receive(silence=IDLE_SECONDS)
                if frame is None or isinstance(frame, frames.Bye):
                    return
                refusal = self._lender.refusal(peer)
                if refusal is not None:
                    await self._send_away(frame, refusal)
                    return
                await self._answer(frame)
        except PeerUnreachable as error:
            _log.info("coordinator %s: %s", peer, error)
        except OmniError as error:
            # A frame that breaks the protocol, or a forward that the engine refuses: the stream ends there.
            _log.warning("coordinator %s: %s", peer, error)
            await self._link.fail(error.message)

    async def _send_away(self, frame: frames.Frame, refusal: frames.Refuse) -> None:
        """Whoever may not be served costs no more than this one answer."""
        if isinstance(frame, frames.Ask | frames.Load):
            await self._link.send(refusal)
        else:
            await self._link.fail(refusal.reason)

    async def _answer(self, frame: frames.Frame) -> None:
        match frame:
            case frames.Ping(data):
                await self._link.send(frames.Pong(data))
            case frames.Ask(engine):
                await self._working("compute", self._profile, engine)
            case frames.Load():
                await self._working("fetch", self._load, frame)
            case frames.Forward():
                await self._working("compute", self._forward, frame)
            case frames.Cache():
                pass  # the conversation remembers it
            case frames.Trim(slot, length):
                await self._slot_call(slot, lambda stage, own: stage.trim(own, length))
                if slot in self._keep:
                    self._keep[slot] = self._keep[slot][: length // frames.LABEL_TOKENS]
            case frames.Drop(slot):
                self._keep.pop(slot, None)
                await self._slot_call(slot, lambda stage, own: stage.drop(own))
            case frames.Fork(slot, into, length):
                target = self._own(into)
                await self._slot_call(slot, lambda stage, own: stage.fork(own, target, length))
            case frames.Recall(slot, labels):
                await self._recall(slot, labels)
            case frames.Keep(slot, labels):
                await self._slot_call(slot, lambda stage, own: _check_keep(stage.length(own), labels))
                self._keep[slot] = labels
            case _:
                raise AssertionError(f"the conversation let {frame!r} through")

    async def _working(self, phase: str, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        self._at_work = frames.Progress(phase, 0, 0)
        try:
            await work(*args)
        finally:
            self._at_work = None

    async def _profile(self, name: str) -> None:
        refusal = self._lender.refusal(self._link.peer)
        if refusal is None:
            try:
                engine = pick_engine(name)
                speed = await self._lender.speed(engine)
            except OmniError as error:
                refusal = _refuse("engine", error)
        self._at_work = None
        if refusal is not None:
            await self._link.send(refusal)
            return
        each = int(footprint(engine.name) * 1000)
        memory = min(self._lender.stages.available, frames.LIMITS.number)
        await self._link.send(frames.Profile(engine.name, memory, max(1, int(speed)), each))

    async def _load(self, frame: frames.Load) -> None:
        answer: frames.Frame
        try:
            answer = await self._load_untrusted(frame)
        except OmniError as error:
            _log.warning("layers %d-%d of %s: %s", frame.first, frame.last - 1, frame.model, error)
            answer = _refuse(_refusal_code(error), error)
        self._at_work = None
        await self._link.send(answer)

    async def _load_untrusted(self, frame: frames.Load) -> frames.Ready:
        """Fetch and load. Raises any `OmniError`, which becomes a refusal."""
        lender, cache = self._lender, self._link.conversation.cache
        kv: KVKind = "full" if cache is None else cache.kv
        pick_engine(frame.engine, kv=kv)  # before anything is fetched for one that is not here
        fetched = await self._fetch(frame, header_parts)
        about = await trio.to_thread.run_sync(describe_untrusted, lender.store, frame.model)
        engine = pick_engine(frame.engine, about.spec, kv)
        spec = StageSpec(about.spec, frame.first, frame.last, embed=frame.embed, head=frame.head)
        parts = stage_parts(about.model.manifest, spec)
        fetched += await self._fetch(frame, lambda _: parts)
        # The part nodes came with the parts: only now does the store know all of their tensors.
        about = await trio.to_thread.run_sync(describe_untrusted, lender.store, frame.model)
        source = StoreTensorSource(lender.store, about.model, parts)

        async def load(thread: ComputeThread) -> Stage:
            def progressed(done: int, total: int) -> None:
                self._at_work = frames.Progress("load", done, total)

            def begin() -> Stage:
                return engine.load(
                    spec, source, context=frame.context, slots=frames.LIMITS.slots, kv=kv, progress=progressed
                )

            return await thread.run(begin)

        key = StageKey(
            about.model.manifest_cid,
            frame.first,
            frame.last,
            frame.embed,
            frame.head,
            engine.name,
            frame.context,
            kv,
        )
        tokens = frame.slots * frame.context if cache is None else cache.tokens
        need = needed(about, spec, tokens, engine.name, kv)
        self._spec = spec
        self._lease = await lender.stages.lease(key, frame.slots, need, load)
        return frames.Ready(self._lease.stage.nbytes, fetched)

    async def _fetch(self, frame: frames.Load, choose: Choose) -> int:
        def progressed(done: int, total: int) -> None:
            self._at_work = frames.Progress("fetch", done, total)

        return await self._lender.weights.fetch(frame.model, choose, frame.providers, progressed)

    async def _forward(self, frame: frames.Forward) -> None:
        assert self._lease is not None  # the conversation: no forward before ready
        lease = self._lease
        if isinstance(frame.input, frames.Activations):
            x: Any = frame.input.array()
        else:
            x = np.array(frame.input, dtype=np.int32)
        logits: WhichLogits = "last" if frame.logits else "none"

        def forward() -> frames.Activations:
            out = lease.stage.forward(x, slot=lease.slots[frame.slot], position=frame.position, logits=logits)
            return frames.Activations.of(out)

        values = await lease.warm.thread.run(forward)
        self._at_work = None
        await self._link.send(frames.Output(frame.seq, values))

    async def _recall(self, slot: int, labels: tuple[bytes, ...]) -> None:
        """Answer with what is kept for this very peer, as far as the slot has room for it."""
        assert self._lease is not None  # the conversation: no slot before ready
        most = self._link.conversation.room_left // frames.LABEL_TOKENS
        held = 0
        if most:
            held = self._lender.stages.recall(self._lease, slot, self._link.peer, labels[:most])
        await self._link.send(frames.Held(slot, held))

    def _to_keep(self) -> dict[int, ToKeep]:
        if self._spec is None or self._lease is None:
            return {}
        each = kv_bytes(self._spec.model, self._lease.warm.key.kv) * (self._spec.last - self._spec.first)
        room = self._link.conversation.room
        return {slot: ToKeep(labels, each * room(slot)) for slot, labels in self._keep.items() if labels}

    def _own(self, slot: int) -> int:
        assert self._lease is not None  # the conversation: no slot before ready
        return self._lease.slots[slot]

    async def _slot_call(self, slot: int, call: Callable[[Stage, int], None]) -> None:
        assert self._lease is not None  # the conversation: no slot before ready
        await self._lease.warm.thread.run(call, self._lease.stage, self._lease.slots[slot])


def needed(about: Description, spec: StageSpec, tokens: int, engine: str, kv: KVKind = "full") -> Need:
    """Memory of a stage whose slots hold `tokens` together, as the coordinator's planner reckons it."""
    costs = ModelCosts.of(about.model.manifest, about.spec, tokens=tokens, kv=kv)
    machine = Machine("", 0, 1.0, footprint=footprint(engine), held=held(about, engine))
    weights = machine.loaded(costs).weights(spec.first, spec.last)
    return Need(weights, costs.kv * (spec.last - spec.first))


def _check_keep(length: int, labels: tuple[bytes, ...]) -> None:
    if length < len(labels) * frames.LABEL_TOKENS:
        raise InputError(f"{len(labels)} labels for a slot that holds {length} tokens")


def _refusal_code(error: OmniError) -> str:
    match error:
        case PlanInfeasible():
            return "memory"
        case BadConfig():
            return "engine"
        case NetworkError():
            return "fetch"
        case _:
            return "model"


def _refuse(code: str, error: OmniError) -> frames.Refuse:
    return frames.Refuse(code, error.message, error.remedy or "")


async def compute_service(node: Node, options: Mapping[str, Any]) -> None:
    """Lend compute beside a node's other services, until it stops.

    Options: `memory_gb` (gigabytes; None for what is free now) and `allow` (peer IDs; `any` among them lets
    everybody in; none lets nobody in), `kept` (bytes for one peer's prompts). Raises `BadConfig` for others.
    """
    allow = frozenset(options.get("allow") or ())
    for peer in allow:
        if peer != "any" and not is_peer_id(peer):
            raise BadConfig(
                f"--allow {peer!r} is not a peer ID",
                remedy="`omni id` on that machine prints it; or say any.",
            )
    lend = LendOptions(
        _bytes(options.get("memory_gb")),
        None if "any" in allow else allow,
        options.get("kept", KEPT_BYTES),
    )
    if not allow:
        _log.warning("compute is lent to nobody: name peers with --allow PEER, or --allow any")
    weights = NetworkWeights(
        node.network, node.routing, node.store, node.download, node.limits, hints=node.hints
    )
    lender = Lender(node.peer_id, node.store, weights, lend)
    lender.serve_on(node.network)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lender.expire)
        if allow:
            nursery.start_soon(_announce, node.routing)


def _bytes(gigabytes: float | None) -> int | None:
    if gigabytes is not None and not math.isfinite(gigabytes):
        raise BadConfig(f"--compute={gigabytes} is not a number of gigabytes", remedy="Say --compute=8.")
    return None if gigabytes is None else int(gigabytes * 1e9)


async def _announce(routing: ContentRouting) -> None:
    """Say in the DHT that there is compute to lend; what was not confirmed is said again soon."""
    while True:
        copies = await routing.provide(frames.LENDERS)
        await trio.sleep(ANNOUNCE_SECONDS if copies else UNCONFIRMED_SECONDS)

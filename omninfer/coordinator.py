"""The coordinator: who takes part, who holds what, and what to do when somebody is lost.

Asks this machine and the lenders for their profiles, plans, has every stage loaded (each lender
fetches its own layers), and answers logits. When a stage is lost it plans again with those who still
answer and feeds the history from the start: the caller of `logits` only waits longer. Sampling is not its
business, nor the arithmetic of plans. Implements spec/06-pipeline, section "Coordinating".
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import trio
from numpy.typing import NDArray

from omninfer.arch import KVKind, kv_bytes
from omninfer.engines import Stage, StageSpec, choose_engine, pick_engine
from omninfer.frames import LIMITS, Cache, Load, Progress
from omninfer.labels import Labels
from omninfer.lenders import Lending, ask_lender, find_lenders, load_remotely
from omninfer.pipeline import Pipeline
from omninfer.plan import Machine, ModelCosts, Plan, PlannedStage, make_plan
from omninfer.prefixes import SlotTable, room_for
from omninfer.profile import footprint, free_memory, held, measure
from omninfer.running import LocalStage, RunningStage
from omninfer.sources import Description, StoreTensorSource, describe_untrusted, stage_parts
from omninfer.threads import ComputeThread
from omninfer.weights import NetworkWeights
from omnistore.errors import (
    InputError,
    OmniError,
    PlanInfeasible,
    StageLost,
)
from omnistore.net.interface import ContentRouting, Network, Provider
from omnistore.store.interface import Store
from omnistore.transfer.client import provider_at

SLOTS: Final = 8
"""Prompts whose beginnings are kept at a time, memory allowing: a few conversations over one system prompt.
"""
_RANGE: Final = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Who is to run a model."""

    layers: str = "auto"
    """`auto`, `all` (here alone), `none` (no weights here), or the range that this machine holds."""
    lenders: tuple[str, ...] = ()
    """Multiaddrs of machines to use: each gets at least one layer."""
    providers: tuple[Provider, ...] = ()
    """Peers that hold the model."""
    engine: str = "auto"
    context: int = 2048
    kv_memory: int | None = None
    """Bytes that keys and values may take, over all machines together; None for those of one full context."""
    kv: KVKind = "full"
    """How keys and values are kept, everywhere."""
    silence: float = 10.0
    """Seconds after which a lender that says nothing is lost; one at work says so every second."""


@dataclass(frozen=True, slots=True)
class Site:
    """What a coordinator works with on its own machine."""

    network: Network
    routing: ContentRouting | None
    store: Store
    weights: NetworkWeights
    labels: Labels | None = None
    """What this machine calls its prompts at lenders; None to have nothing kept there."""


@dataclass(frozen=True, slots=True)
class Told:
    """Where news of the preparations goes."""

    note: Callable[[str], None] = lambda text: None
    """A sentence for a person."""
    progress: Callable[[str, Progress], None] = lambda peer, progress: None


@dataclass(frozen=True, slots=True)
class _Wishes:
    """Which machines a person wants."""

    local: bool
    """This machine may hold layers."""
    fixed: tuple[int, int] | None
    """The layers it holds, if that was said; the end exclusive."""
    remote: bool
    """Lenders may."""


def _wishes(layers: str, total: int) -> _Wishes:
    if layers in ("auto", "all", "none"):
        return _Wishes(local=layers != "none", fixed=None, remote=layers != "all")
    match = _RANGE.fullmatch(layers)
    if match is None:
        raise InputError(
            f"--layers {layers!r} says nothing this command knows",
            remedy="Give auto, all, none, or the layers this machine is to hold, such as 0-15.",
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < total:
        raise InputError(f"--layers {layers} is not a range of the model's layers 0-{total - 1}")
    return _Wishes(local=True, fixed=(first, last + 1), remote=True)


class Coordinator:
    """Runs one model; `aclose` it."""

    def __init__(self, site: Site, about: Description, options: RunOptions, told: Told | None = None) -> None:
        self.about = about
        self.plan: Plan | None = None
        """What runs now, or ran last."""
        self.cached = 0
        """Tokens of the last history that a slot held."""
        self.engine: dict[str, str] | None = None
        """Name of the engine that runs this machine's layers, and the reason; None where it has none."""
        self.losses: list[str] = []
        """Peers that were lost, in order."""
        self._site = site
        self._options = options
        self._told = told or Told()
        self._wishes = _wishes(options.layers, about.spec.layers)
        self._token_bytes = kv_bytes(about.spec, options.kv) * about.spec.layers
        one = room_for(options.context, options.context)
        self._tokens = one
        """That all slots may hold together: no more than they could."""
        if options.kv_memory is not None:
            self._tokens = min(max(1, options.kv_memory // self._token_bytes), SLOTS * one)
        self._costs = ModelCosts.of(about.model.manifest, about.spec, tokens=self._tokens, kv=options.kv)
        self._pipeline: Pipeline | None = None
        self._building = trio.Lock()
        self._computed = 0
        """By pipelines that are no more."""
        self._excluded: set[str] = set()
        self._speed: float | None = None
        if options.lenders and not self._wishes.remote:
            raise InputError(
                "--layers all keeps the model on this machine, but --with names others",
                remedy="Leave one of the two out.",
            )

    def called(self, peer: str) -> str:
        """How a person knows a peer."""
        return "this machine" if peer == self._site.network.peer_id else peer

    def whereabouts(self) -> str:
        """Who holds which layers, for a person."""
        stages = self.plan.stages if self.plan else ()
        return "layers " + ", ".join(f"{stage.layers} on {self.called(stage.peer)}" for stage in stages)

    @property
    def computed(self) -> int:
        """Tokens that went through the layers: fewer than was asked for where a prompt begins as an earlier
        one did, more after a loss."""
        return self._computed + (self._pipeline.computed if self._pipeline is not None else 0)

    @property
    def context(self) -> int:
        return self._options.context

    async def logits(self, history: Sequence[int]) -> NDArray[np.float32]:
        """The logits after `history`. Raises `PlanInfeasible` when nobody is left to run it."""
        while True:
            pipeline = await self.ready()
            try:
                logits, self.cached = await pipeline.logits(history)
                return logits
            except StageLost as error:
                await self._recover(pipeline, error)

    async def ready(self) -> Pipeline:
        """The running pipeline, built if there is none."""
        async with self._building:
            if self._pipeline is None:
                try:
                    self._pipeline = await self._build()
                except PlanInfeasible as error:
                    if not self.losses:
                        raise
                    raise StageLost(
                        f"lost {', '.join(self.losses)}, and without: {error.message}", remedy=error.remedy
                    ) from error
            return self._pipeline

    async def aclose(self) -> None:
        """Let go of every stage; never raises."""
        if self._pipeline is not None:
            pipeline, self._computed, self._pipeline = self._pipeline, self.computed, None
            await pipeline.aclose()

    async def _recover(self, pipeline: Pipeline, error: StageLost) -> None:
        if self._pipeline is not pipeline:
            return  # another prompt found out first
        self._told.note(f"{error.message}; planning again")
        # Once may be a nap or a broken cable: whoever answers again is asked again. Twice is a habit.
        self._excluded |= pipeline.lost & set(self.losses)
        self.losses += sorted(pipeline.lost)
        self._computed, self._pipeline = self.computed, None
        await pipeline.aclose()

    # --- building ---------------------------------------------------------------------------

    async def _build(self) -> Pipeline:
        """Profile, plan, load; again without those lenders that turn out to be unfit on the way."""
        while True:
            lendings = await self._lendings()
            machines = {lending.peer: lending.machine for lending in lendings}
            try:
                if self._wishes.local:
                    machines[self._site.network.peer_id] = await self._this_machine()
                machines = {
                    peer: replace(one, held=held(self.about, one.engine)) for peer, one in machines.items()
                }
                self.plan = self._make_plan(machines, frozenset(one.peer for one in lendings if one.named))
                stages = await self._load_all(self.plan, {lending.peer: lending for lending in lendings})
            finally:
                for lending in lendings:
                    if not lending.taken:
                        await lending.link.aclose()
            if stages is not None:
                self._told.note(self.whereabouts())
                return Pipeline(stages, self._table(stages), self._site.labels, width=self.about.spec.width)

    def _table(self, stages: Sequence[RunningStage]) -> SlotTable:
        return SlotTable(
            min(stage.slots for stage in stages),
            context=self._options.context,
            token_bytes=self._token_bytes,
            budget=self._tokens * self._token_bytes,
        )

    async def _lendings(self) -> list[Lending]:
        """Everybody who would lend. Raises what a named lender's refusal or absence is, the first time."""
        if not self._wishes.remote:
            return []
        network, found, failures = self._site.network, dict[str, Lending](), list[OmniError]()
        candidates: dict[str, tuple[Provider, bool]] = {}
        for addr in self._options.lenders:
            provider = provider_at(addr)
            candidates[provider.peer] = (provider, True)
        if self._site.routing is not None:
            for provider in await find_lenders(self._site.routing):
                candidates.setdefault(provider.peer, (provider, False))

        async def ask(provider: Provider, named: bool) -> None:
            try:
                lending = await ask_lender(
                    network, provider, self._options.engine, self._options.silence, named=named
                )
                if self._options.kv != "full" and not lending.link.conversation.caching:
                    await lending.link.aclose()
                    raise PlanInfeasible(
                        f"the lender {provider.peer} speaks version 1.0.0, and keeps no keys and values as"
                        f" {self._options.kv}",
                        remedy="Have it run a newer version, or leave out --kv.",
                    )
                found[provider.peer] = lending
            except OmniError as error:
                _log.info("lender %s: %s", provider.peer, error)
                self._excluded.add(provider.peer)
                if named:
                    failures.append(error)

        async with trio.open_nursery() as nursery:
            for peer, (provider, named) in candidates.items():
                if peer not in self._excluded and peer != network.peer_id:
                    nursery.start_soon(ask, provider, named)
        if failures and not self.losses:
            for lending in found.values():
                await lending.link.aclose()
            raise failures[0]
        return [found[peer] for peer in candidates if peer in found]

    async def _this_machine(self) -> Machine:
        engine = pick_engine(self._options.engine, self.about.spec, self._options.kv)
        if self._speed is None and not self._wishes.remote:
            self._speed = 1.0  # beside no other it means nothing, and measuring takes a third of a second
        if self._speed is None:
            thread = ComputeThread("profile")
            try:
                self._speed = await thread.run(measure, engine)
            finally:
                thread.close()
        each = footprint(engine.name)
        return Machine(
            self._site.network.peer_id, free_memory(), self._speed, footprint=each, engine=engine.name
        )

    def _make_plan(self, machines: dict[str, Machine], named: frozenset[str]) -> Plan:
        own, fixed = self._site.network.peer_id, self._wishes.fixed
        ordered = [machines[peer] for peer in sorted(machines, key=lambda peer: peer != own)]
        if not ordered:
            raise PlanInfeasible(
                "no machine lends compute and --layers none keeps this one out of it",
                remedy="Name a lender with --with MADDR; there, run: omni seed --compute --allow any",
            )
        if fixed is not None and len(ordered) == 1 and fixed != (0, self.about.spec.layers):
            raise PlanInfeasible(
                f"layers {fixed[0]}-{fixed[1] - 1} are here, and nobody lends compute for the others",
                remedy="Name a lender with --with MADDR; there, run: omni seed --compute --allow any",
            )
        if fixed is not None:
            return make_plan(self._costs, ordered, required=named, fixed=(own, *fixed))
        if named and own in machines:
            # Whoever names lenders wants them beside this machine, as far as it has room.
            try:
                return make_plan(self._costs, ordered, required=named | {own})
            except PlanInfeasible as error:
                _log.info("not with layers here: %s", error)
        return make_plan(self._costs, ordered, required=named)

    async def _load_all(self, plan: Plan, lendings: dict[str, Lending]) -> list[RunningStage] | None:
        """Every stage of the plan, loaded at once; None when a lender turned out to be unfit."""
        self.engine = None
        loaded: dict[str, RunningStage] = {}
        failures: list[OmniError] = []
        unfit: list[OmniError] = []

        async def load(planned: PlannedStage) -> None:
            lending = lendings.get(planned.peer)
            try:
                if lending is None:
                    loaded[planned.peer] = await self._load_here(planned)
                else:
                    lending.taken = True
                    order, spec = self._load_order(planned, lending), self._spec(planned)
                    loaded[planned.peer] = await load_remotely(
                        lending, planned, spec, order, self._told.progress
                    )
            except OmniError as error:
                if lending is None or (
                    lending.named and not self.losses and not isinstance(error, StageLost)
                ):
                    failures.append(error)
                else:
                    self._told.note(error.message)
                    self._excluded.add(planned.peer)
                    unfit.append(error)

        complete = False
        try:
            async with trio.open_nursery() as nursery:
                for planned in plan.stages:
                    nursery.start_soon(load, planned)
            complete = not failures and not unfit
        finally:
            if not complete:
                for stage in loaded.values():
                    await stage.aclose()
        if failures:
            raise failures[0]
        return [loaded[planned.peer] for planned in plan.stages] if complete else None

    def _spec(self, planned: PlannedStage) -> StageSpec:
        return StageSpec(self.about.spec, planned.first, planned.last, embed=planned.embed, head=planned.head)

    def _load_order(self, planned: PlannedStage, lending: Lending) -> tuple[Cache, Load]:
        network = self._site.network
        here = Provider(network.peer_id, tuple(addr.rpartition("/p2p/")[0] for addr in network.addrs()))
        known = [provider for provider in (here, *self._options.providers) if provider.peer != lending.peer]
        providers = (Provider(p.peer, tuple(p.addrs[: LIMITS.addresses])) for p in known[: LIMITS.providers])
        return Cache(self._tokens, self._options.kv), Load(
            model=self.about.model.cid,
            first=planned.first,
            last=planned.last,
            embed=planned.embed,
            head=planned.head,
            engine=self._options.engine,
            context=self._options.context,
            slots=SLOTS if lending.link.conversation.caching else 1,
            providers=tuple(providers),
        )

    async def _load_here(self, planned: PlannedStage) -> LocalStage:
        """Fetch what this machine's range lacks, and load it."""
        site, cid, spec = self._site, self.about.model.cid, self._spec(planned)
        parts = stage_parts(self.about.model.manifest, spec)

        def progressed(phase: str) -> Callable[[int, int], None]:
            return lambda done, total: self._told.progress(planned.peer, Progress(phase, done, total))

        await site.weights.fetch(cid, lambda _: parts, self._options.providers, progressed("fetch"))
        # The part nodes may have come only now.
        about = await trio.to_thread.run_sync(describe_untrusted, site.store, cid)
        source = StoreTensorSource(site.store, about.model, parts)
        engine, reason = choose_engine(self._options.engine, spec.model, self._options.kv)
        self.engine, options = {"name": engine.name, "reason": reason}, self._options

        def load() -> Stage:
            return engine.load(
                spec, source, context=options.context, slots=SLOTS, kv=options.kv, progress=progressed("load")
            )

        thread = ComputeThread(f"stage-{planned.first}-{planned.last}")
        try:
            return LocalStage(planned, await thread.run(load), thread, SLOTS)
        except BaseException:
            thread.close()
            raise

"""Plans: which machine holds which layers. Pure, and exact.

**What is minimised.** One generation at a time is what a person waits for, so the first objective is
the latency of one decoded token: the sum over the stages of the time to read the stage's weights once
(decoding is bound by that) and, for a stage that is not the coordinator's own, one round trip plus the
bytes that cross the link. Measured speeds are no more exact than `TOLERANCE`, so among the plans of the
same machines in the same order whose latency is within it, the one whose slowest stage is fastest is taken:
that is the throughput objective, it is what a prefill cut into pieces runs at, and it keeps
equal machines from getting unequal shares by noise. Within it, too, machines stay in the order given.

**How.** Each machine holds at most one contiguous range; the ranges follow each other from layer 0 to
the last. The embedding goes with the first range, the head with the last; a tied head needs the embedding's
weights too. A range a machine has no memory for has infinite cost. `best[set][k]`, the least cost
of covering layers 0 … k-1 with exactly the machines of a set, follows from the sets one machine
smaller by a min-plus product: 2^m · m · n² steps for m machines and n layers, done by numpy (11 machines and
126 layers: half a second; 4 and 32: milliseconds). Above `MAX_WORK` steps the least useful of the machines
that nobody named are left out; that is the only inexactness.

Not here: measuring machines (`profile`), loading anything (`pipeline`). Implements spec/06-pipeline,
section "Plans".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from omninfer.arch import KVKind, ModelSpec, kv_bytes
from omnistore.errors import BadConfig, PlanInfeasible
from omnistore.manifest import Manifest, PartKey

TOLERANCE: Final = 0.1
"""Fraction of the best latency that is given up for a faster slowest stage."""
MAX_WORK: Final = 4e8
"""Steps of the exact search: about a second."""
STEP_FLOOR: Final = 4000
"""Steps that one product counts as at least: what numpy takes to begin with."""
TOKEN_BYTES: Final = 4

_Matrix = NDArray[np.float64]
"""[first, last] of a range of layers; infinite where the range is impossible."""


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """What the planner knows of a model. All in bytes."""

    layers: tuple[int, ...]
    """Packed weights of each layer."""
    embed: int
    head: int
    """Packed weights of the head part, without the embedding that a tied head needs too."""
    tied: bool
    shared: int
    """Weights that every stage holds."""
    kv: int
    """Keys and values of one layer: of as many tokens as all slots may hold together."""
    hidden: int
    """One token's hidden state on the wire."""
    logits: int
    """One token's logits on the wire."""
    active: float = 1.0
    """The share of a layer's weights that one token reads: less than all where a router picks experts."""

    @classmethod
    def of(cls, manifest: Manifest, model: ModelSpec, *, tokens: int, kv: KVKind = "full") -> ModelCosts:
        """Read them from a manifest's part sizes and a model's shape; slots hold `tokens` together, kept as
        `kv`."""

        def size(key: PartKey) -> int:
            ref = manifest.part(key)
            return 0 if ref is None else ref.size

        return cls(
            layers=tuple(size(PartKey("layer", n)) for n in range(model.layers)),
            embed=size(PartKey("embed")),
            head=size(PartKey("head")),
            tied=model.tied_head,
            shared=size(PartKey("shared")),
            kv=kv_bytes(model, kv) * tokens,
            hidden=4 * model.width,
            logits=4 * model.vocab,
            active=model.active_share(),
        )

    def weights(self, first: int, last: int) -> int:
        """Packed bytes that a stage of layers first … last-1 holds."""
        total = self.shared + sum(self.layers[first:last])
        head = last == len(self.layers)
        if head:
            total += self.head
        if first == 0 or (head and self.tied):
            total += self.embed
        return total

    def reads(self, first: int, last: int) -> float:
        """Packed bytes that a stage reads to decode one token: of the embedding, only a row."""
        total = sum(self.layers[first:last]) * self.active
        if last == len(self.layers):
            total += self.head + (self.embed if self.tied else 0)
        return total

    def wire(self, first: int, last: int) -> int:
        """Bytes that cross the link to and from a stage for one token."""
        inbound = TOKEN_BYTES if first == 0 else self.hidden
        return inbound + (self.logits if last == len(self.layers) else self.hidden)


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of memory that weights take once a machine's engine holds them."""

    layers: tuple[int, ...]
    embed: int
    head: int
    shared: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What the planner knows of a machine."""

    peer: str
    memory: int
    """Bytes that a stage may take, caches included."""
    speed: float
    """Packed weight bytes multiplied with one token per second."""
    rtt: float = 0.0
    """Seconds of a round trip to the coordinator; 0 for itself."""
    bandwidth: float = math.inf
    """Bytes a second to and from the coordinator."""
    footprint: float = 1.0
    """Bytes of memory that one packed byte takes once loaded, where `held` is not known."""
    held: Held | None = None
    """What the model's weights take in its engine."""
    engine: str = ""
    """The engine's name."""

    def needs(self, costs: ModelCosts, first: int, last: int) -> int:
        """Bytes of memory that layers first … last-1 take here."""
        return self.loaded(costs).weights(first, last) + costs.kv * (last - first)

    def loaded(self, costs: ModelCosts) -> ModelCosts:
        """The same model, its weights as large as they are in this machine's memory."""
        if self.held is not None:
            held = self.held
            return replace(costs, layers=held.layers, embed=held.embed, head=held.head, shared=held.shared)
        grown = partial(_grown, self.footprint)
        return replace(
            costs,
            layers=tuple(map(grown, costs.layers)),
            embed=grown(costs.embed),
            head=grown(costs.head),
            shared=grown(costs.shared),
        )

    def compute(self, costs: ModelCosts, first: int, last: int) -> float:
        """Seconds of arithmetic for one token."""
        return costs.reads(first, last) / self.speed

    def latency(self, costs: ModelCosts, first: int, last: int) -> float:
        """Seconds from sending one token's input to having its output."""
        return self.compute(costs, first, last) + self.rtt + costs.wire(first, last) / self.bandwidth


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """A contiguous range of layers on one peer."""

    peer: str
    first: int
    last: int
    """Exclusive."""
    embed: bool
    head: bool

    @property
    def layers(self) -> str:
        """The range as people write it: `0-15`, both ends included."""
        return f"{self.first}-{self.last - 1}" if self.last - self.first != 1 else f"{self.first}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Stages that cover a model, in order."""

    stages: tuple[PlannedStage, ...]
    latency: float
    """Estimated seconds per decoded token."""


def make_plan(
    costs: ModelCosts,
    machines: Sequence[Machine],
    *,
    required: frozenset[str] = frozenset(),
    fixed: tuple[str, int, int] | None = None,
) -> Plan:
    """The best plan over `machines`, each used at most once.

    Every peer in `required` gets at least one layer. `fixed` = (peer, first, last) gives that machine
    exactly those layers. Raises `PlanInfeasible` naming how much memory is missing.
    """
    total = len(costs.layers)
    if fixed is not None and not 0 <= fixed[1] < fixed[2] <= total:
        raise BadConfig(f"layers {fixed[1]}-{fixed[2] - 1} are not among the model's 0-{total - 1}")
    needed = required if fixed is None else required | {fixed[0]}
    missing = needed - {machine.peer for machine in machines}
    if missing:
        raise PlanInfeasible(f"no profile of {', '.join(sorted(missing))}, which was asked for by name")
    chosen = _shortlist(costs, machines, needed)
    options = [_range_costs(costs, machine, fixed) for machine in chosen]
    must = [n for n, machine in enumerate(chosen) if machine.peer in needed]
    found = _cover(options, must, total)
    if found is None:
        raise _infeasible(costs, chosen, must, fixed)
    order, best = found
    # Where the order of machines makes no difference worth measuring, it is the same each time: what they
    # loaded and kept for one run, they have for the next.
    given = sorted(order)
    if _split([options[n] for n in given], total)[0] <= best * (1 + TOLERANCE):
        order = given
    stages = _even_out(
        [options[n] for n in order], [_range_compute(costs, chosen[n]) for n in order], best, total
    )
    planned = tuple(
        PlannedStage(chosen[n].peer, first, last, embed=first == 0, head=last == total)
        for n, (first, last) in zip(order, stages, strict=True)
    )
    latency = sum(chosen[n].latency(costs, *stage) for n, stage in zip(order, stages, strict=True))
    return Plan(planned, latency)


def _shortlist(costs: ModelCosts, machines: Sequence[Machine], needed: frozenset[str]) -> list[Machine]:
    """As many machines as can be searched exactly: those asked for, then by seconds per byte held."""
    layers = len(costs.layers)
    most = 1
    while 2 ** (most + 1) * (most + 1) * max((layers + 1) ** 2, STEP_FLOOR) <= MAX_WORK:
        most += 1
    if len(needed) > min(most, layers):
        raise PlanInfeasible(
            f"{len(needed)} machines were asked for by name; "
            f"{layers} layers can be planned over at most {min(most, layers)}",
            remedy="Name fewer machines.",
        )

    def usefulness(machine: Machine) -> tuple[bool, float]:
        room = max(1, min(machine.memory, costs.weights(0, layers)))
        return machine.peer not in needed, (machine.rtt + room / machine.speed) / room

    return sorted(machines, key=usefulness)[:most] if len(machines) > most else list(machines)


# --- ranges as matrices ---------------------------------------------------------------------


def _grid(costs: ModelCosts) -> tuple[_Matrix, _Matrix, _Matrix, _Matrix]:
    """For all ranges at once: (weights, reads, wire, layers). See the methods of `ModelCosts`."""
    total = len(costs.layers)
    prefix = np.concatenate(([0.0], np.cumsum(np.array(costs.layers, dtype=np.float64))))
    ends = np.arange(total + 1)
    first, last = ends == 0, ends == total
    layers = prefix[None, :] - prefix[:, None]
    with_embed = first[:, None] | (last[None, :] & costs.tied)
    weights = layers + costs.shared + costs.head * last[None, :] + costs.embed * with_embed
    reads = layers * costs.active + (costs.head + (costs.embed if costs.tied else 0)) * last[None, :]
    inbound = np.where(first, TOKEN_BYTES, costs.hidden)
    outbound = np.where(last, costs.logits, costs.hidden)
    wire = (inbound[:, None] + outbound[None, :]).astype(np.float64)
    return weights, reads, wire, (ends[None, :] - ends[:, None]).astype(np.float64)


def _range_costs(costs: ModelCosts, machine: Machine, fixed: tuple[str, int, int] | None) -> _Matrix:
    """Seconds per token of every range on one machine; infinite where it may not or can not be."""
    _, reads, wire, layers = _grid(costs)
    seconds = reads / machine.speed + machine.rtt + wire / machine.bandwidth
    room = _grid(machine.loaded(costs))[0] + costs.kv * layers <= machine.memory
    return np.where(room & _allowed(len(costs.layers), machine.peer, fixed), seconds, np.inf)


def _range_compute(costs: ModelCosts, machine: Machine) -> _Matrix:
    return _grid(costs)[1] / machine.speed


def _allowed(total: int, peer: str, fixed: tuple[str, int, int] | None) -> NDArray[np.bool_]:
    """Ranges of at least one layer that respect the fixed one."""
    ends = np.arange(total + 1)
    allowed: NDArray[np.bool_] = ends[:, None] < ends[None, :]
    if fixed is not None:
        owner, first, last = fixed
        if peer == owner:
            allowed = (ends[:, None] == first) & (ends[None, :] == last)
        else:
            allowed &= (ends[None, :] <= first) | (ends[:, None] >= last)
    return allowed


# --- the search -----------------------------------------------------------------------------


def _cover(options: Sequence[_Matrix], must: Sequence[int], total: int) -> tuple[list[int], float] | None:
    """The order of machines of the least-cost cover of all layers, and that cost; None if there is none."""
    start = np.full(total + 1, np.inf)
    start[0] = 0.0
    best = {0: start}
    came: dict[int, tuple[NDArray[np.intp], NDArray[np.intp]]] = {}
    needed = sum(1 << n for n in must)
    for members in range(1, 1 << len(options)):
        cost = np.full(total + 1, np.inf)
        machine, origin = np.zeros(total + 1, dtype=np.intp), np.zeros(total + 1, dtype=np.intp)
        for n, option in enumerate(options):
            before = best.get(members ^ (1 << n)) if members >> n & 1 else None
            if before is None:
                continue
            sums = before[:, None] + option
            where = sums.argmin(axis=0)
            least = sums[where, np.arange(total + 1)]
            better = least < cost
            cost[better], machine[better], origin[better] = least[better], n, where[better]
        if np.isfinite(cost).any():
            best[members], came[members] = cost, (machine, origin)
    # Fewer machines first: of equal plans the simpler one.
    complete = [m for m in best if m and m & needed == needed and math.isfinite(best[m][total])]
    if not complete:
        return None
    members = min(complete, key=lambda m: (best[m][total], m.bit_count(), m))
    cost_of_all, order, end = float(best[members][total]), [], total
    while members:
        machine, origin = came[members]
        n, end = int(machine[end]), int(origin[end])
        order.append(n)
        members ^= 1 << n
    return order[::-1], cost_of_all


def _even_out(
    options: Sequence[_Matrix], compute: Sequence[_Matrix], best: float, total: int
) -> list[tuple[int, int]]:
    """The ranges, in the machines' order, of least slowest stage among those within `TOLERANCE` of `best`."""
    limit = best * (1 + TOLERANCE)
    caps = np.unique(
        np.concatenate([seconds[np.isfinite(o)] for o, seconds in zip(options, compute, strict=True)])
    )
    low, high = 0, len(caps) - 1
    while low < high:
        middle = (low + high) // 2
        cost, _ = _split(_capped(options, compute, caps[middle]), total)
        low, high = (low, middle) if cost <= limit else (middle + 1, high)
    return _split(_capped(options, compute, caps[low]), total)[1]


def _capped(options: Sequence[_Matrix], compute: Sequence[_Matrix], cap: float) -> list[_Matrix]:
    return [np.where(seconds <= cap, o, np.inf) for o, seconds in zip(options, compute, strict=True)]


def _split(options: Sequence[_Matrix], total: int) -> tuple[float, list[tuple[int, int]]]:
    """The least cost of giving each machine, in this order, its range; and the ranges."""
    cost = np.full(total + 1, np.inf)
    cost[0] = 0.0
    origins = []
    for option in options:
        sums = cost[:, None] + option
        origins.append(sums.argmin(axis=0))
        cost = sums.min(axis=0)
    ranges, end = [], total
    for origin in reversed(origins):
        ranges.append((int(origin[end]), end))
        end = int(origin[end])
    return float(cost[total]), ranges[::-1]


# --- why there is no plan -------------------------------------------------------------------


def _infeasible(
    costs: ModelCosts, machines: Sequence[Machine], must: Sequence[int], fixed: tuple[str, int, int] | None
) -> PlanInfeasible:
    """Say how much is missing: the least memory of one further machine that would make a plan possible."""
    remedy = "Lend more with --with MADDR, lower --context, or take a smaller quantisation."
    for n in must:
        fault = _own_fault(costs, machines[n], fixed)
        if fault:
            return PlanInfeasible(fault, remedy=remedy)
    total = len(costs.layers)
    # With zero cost for what is there and its bytes for what is not, the cheapest cover tells. A fixed
    # range in the middle may leave a hole on either side, hence then two further machines.
    options = [np.where(np.isfinite(_range_costs(costs, m, fixed)), 0.0, np.inf) for m in machines]
    weights, _, _, layers = _grid(costs)
    further = np.where(_allowed(total, "", fixed), weights + costs.kv * layers, np.inf)
    found = _cover([*options, *[further] * (1 if fixed is None else 2)], must, total)
    offered = sum(max(0, machine.memory) for machine in machines)
    wanted = costs.weights(0, total) + costs.kv * total
    if found is None:
        return PlanInfeasible(
            f"the {len(must)} machines asked for by name can not all get a layer of {total}", remedy=remedy
        )
    return PlanInfeasible(
        f"the model needs {_size(wanted)} and {len(machines)} machine(s) offer {_size(offered)}: "
        f"{_size(int(found[1]))} more is missing",
        remedy=remedy,
    )


def _own_fault(costs: ModelCosts, machine: Machine, fixed: tuple[str, int, int] | None) -> str | None:
    """Why one machine can not hold what it alone must hold; None if it can."""
    if fixed is not None and machine.peer == fixed[0]:
        need = machine.needs(costs, *fixed[1:])
        what = f"layers {fixed[1]}-{fixed[2] - 1}"
    else:
        ranges = ((n, n + 1) for n in range(len(costs.layers)))
        need = min(machine.needs(costs, *one) for one in ranges)
        what = "even one layer"
    if need <= machine.memory:
        return None
    short = _size(need - machine.memory)
    return f"{machine.peer} has {_size(machine.memory)} for {what} of {_size(need)}: {short} is missing"


def _grown(factor: float, size: int) -> int:
    return math.ceil(size * factor)


def _size(count: int) -> str:
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**power:
            return f"{count / 10**power:.2f} {unit}"
    return f"{count} bytes"

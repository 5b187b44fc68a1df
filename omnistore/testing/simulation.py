"""A whole swarm in one loop: `Session` and `Serving` driven by a seeded queue of events, no I/O.

Thousands of runs take seconds, so that what `session` promises is checked under loss, delay, liars
and churn by the thousand. Blocks are names without bytes: whether a delivery is genuine is a flag.
The invariants are checked here after every step, independently of the session's own books; a run
that breaks one raises `AssertionError` with its seed.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Literal

from blake3 import blake3

from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.transfer import events as e
from omnistore.transfer.demand import Wanted
from omnistore.transfer.messages import Cancel, Error, Have, Want
from omnistore.transfer.rate import TokenBucket
from omnistore.transfer.serve import FindHeld, ReadBlocks, Serving
from omnistore.transfer.session import Session
from omnistore.transfer.window import SessionLimits

Behaviour = Literal["honest", "liar", "staller", "trickler", "claims", "mute", "misfit", "dies"]
"""`claims`: says it holds everything and answers `missing` for half. `mute`: never says what it holds.
`misfit`: sends bitmaps of the wrong length. `dies`: goes away for good after a while."""

HARMFUL: Final = frozenset({"liar", "misfit"})
"""Behaviours that end in a ban."""
TICK: Final = 0.1


@dataclass(frozen=True, slots=True)
class PeerModel:
    """One simulated peer."""

    behaviour: Behaviour = "honest"
    joins_at: float = 0.0
    bandwidth: float = 50e6
    """Bytes per second."""
    delay: float = 0.02
    """Seconds one way."""
    share: float = 1.0
    """Of the blocks, how many it holds; which ones, the seed decides."""
    loss: float = 0.0
    """Chance that a block's sending resets the stream instead."""
    after: int = 3
    """Blocks it sends properly before it stalls, trickles or dies; a liar lies once in so many."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is fetched, from whom."""

    parts: tuple[tuple[int, ...], ...]
    """Block sizes of each part, in bytes."""
    nodes: int
    """Nodes wanted before the parts."""
    peers: tuple[PeerModel, ...]
    limits: SessionLimits = field(default_factory=SessionLimits)
    cap: float | None = None
    """Bytes per second that the session may ask for."""
    horizon: float = 3600.0
    """Seconds after which a run that neither finished nor failed is a bug."""


@dataclass(slots=True)
class Outcome:
    """How a run went."""

    done: bool
    failed: e.Failed | None
    seconds: float
    steps: int
    duplicate_bytes: int
    banned: dict[str, str]
    delivered: Counter[str]
    """Verified bytes by peer."""
    uploaded: Counter[str]
    """Bytes each peer sent, useful or not."""
    most_outstanding: int


@dataclass(slots=True, eq=False)
class _Peer:
    name: str
    model: PeerModel
    holds: set[CID]
    serving: Serving = field(default_factory=Serving)
    stream: int | None = None
    epoch: int = 0
    """Counts streams: what was on its way on an older one never arrives."""
    numbers: dict[int, Wanted] = field(default_factory=dict)
    by_cid: dict[CID, int] = field(default_factory=dict)
    asked: int = 0
    free_at: float = 0.0
    sent: int = 0
    backoff: float = 1.0
    gone: bool = False


class Simulation:
    """One run of a scenario."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.seed = seed
        self.rng = random.Random(seed)
        cap = None if scenario.cap is None else TokenBucket(scenario.cap, 0.0)
        self.session = Session(self.rng.random, scenario.limits, cap)
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._steps = 0
        self._done = False
        self._failed: e.Failed | None = None
        self._genuine: dict[tuple[str, CID], bool] = {}
        self._verified: set[CID] = set()
        self._delivered: Counter[str] = Counter()
        self._uploaded: Counter[str] = Counter()
        self._most = 0
        self.nodes = tuple(Wanted(_name(DAG_CBOR, "node", i), 64 << 10, False) for i in range(scenario.nodes))
        self.parts = [
            (
                _name(DAG_CBOR, "part", n),
                tuple(Wanted(_name(RAW, f"block {n}", i), size) for i, size in enumerate(sizes)),
            )
            for n, sizes in enumerate(scenario.parts)
        ]
        self._blocks = {block.cid: block for _, blocks in self.parts for block in blocks}
        self._blocks |= {block.cid: block for block in self.nodes}
        self._links = {part: tuple(block.cid for block in blocks) for part, blocks in self.parts}
        self.peers = {f"peer{i}": self._peer(f"peer{i}", model) for i, model in enumerate(scenario.peers)}

    def run(self) -> Outcome:
        """Play the scenario to its end."""
        for peer in self.peers.values():
            self._at(peer.model.joins_at, partial(self._dial, peer))
        if self.nodes:
            self._step(e.WantsAdded(None, self.nodes, (1 << len(self.nodes)) - 1))
        else:
            self._want_parts()
        self._at(TICK, self._tick)
        while self._queue and not self._finished:
            self.now, _, action = heapq.heappop(self._queue)
            assert self.now < self.scenario.horizon, f"seed {self.seed}: still running after an hour"
            action()
        return Outcome(
            done=self._done,
            failed=self._failed,
            seconds=self.now,
            steps=self._steps,
            duplicate_bytes=self.session.duplicate_bytes,
            banned=dict(self.session.banned),
            delivered=self._delivered,
            uploaded=self._uploaded,
            most_outstanding=self._most,
        )

    @property
    def _finished(self) -> bool:
        return self._failed is not None or (self._done and len(self._verified) == len(self._blocks))

    def obtainable(self) -> bool:
        """Whether an honest peer that never leaves holds every block."""
        steady = [p for p in self.peers.values() if p.model.behaviour == "honest" and p.model.loss < 0.2]
        return set(self._blocks) <= set().union(*(peer.holds for peer in steady))

    # --- the requester's shell --------------------------------------------------------------

    def _at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay, next(self._order), action))

    def _want_parts(self) -> None:
        self._done = False
        for part, blocks in self.parts:
            self._step(e.WantsAdded(part, blocks, (1 << len(blocks)) - 1))

    def _tick(self) -> None:
        self._step(e.Tick())
        self._at(TICK, self._tick)

    def _step(self, event: e.Event) -> None:
        self._steps += 1
        for command in self.session.step(event, self.now):
            self._carry_out(command)
        self._check()

    def _carry_out(self, command: e.Command) -> None:
        match command:
            case e.SendWant(peer, blocks):
                self._send_want(self.peers[peer], blocks)
            case e.SendCancel(peer, cids):
                self._send_cancel(self.peers[peer], cids)
            case e.AskHave(peer, parts):
                there = self.peers[peer]
                self._later(there, there.model.delay, lambda: self._receive(there, Have(parts)))
            case e.Verify(peer, cid):
                assert cid not in self._verified, f"seed {self.seed}: {cid} is verified twice"
                self._at(0.001, lambda: self._verify(peer, cid))
            case e.DropPeer(peer, _, banned):
                self._hang_up(self.peers[peer], redial=not banned)
            case e.Done():
                self._done = True
                if self.nodes and len(self._verified) == len(self.nodes):
                    self._want_parts()
            case e.Failed():
                self._failed = command

    def _check(self) -> None:
        """The books of the session against what is really under way."""
        under_way = sum(w.size for peer in self.peers.values() for w in peer.numbers.values())
        assert under_way == self.session.outstanding, f"seed {self.seed}: {under_way} bytes are under way"
        assert under_way <= self.scenario.limits.flow.ceiling, f"seed {self.seed}: the window is exceeded"
        self._most = max(self._most, under_way)

    def _verify(self, peer: str, cid: CID) -> None:
        if self._genuine.pop((peer, cid)):
            self._verified.add(cid)
            self._delivered[peer] += self._blocks[cid].size
            self._step(e.BlockVerified(cid))
        else:
            self._step(e.BlockRefused(peer, cid))
            assert peer in self.session.banned, f"seed {self.seed}: {peer} lied and is not banned"

    # --- streams ----------------------------------------------------------------------------

    def _dial(self, peer: _Peer) -> None:
        if peer.gone or peer.stream is not None or peer.name in self.session.banned or self._finished:
            return
        opened = peer.serving.open("me", self.now)
        assert opened is not None
        peer.stream, hello = opened
        peer.epoch += 1
        peer.asked = 0
        greet = e.PeerJoined(peer.name, hello.asks, hello.queries)
        self._later(peer, 3 * peer.model.delay, lambda: self._step(greet))

    def _hang_up(self, peer: _Peer, *, redial: bool) -> None:
        if peer.stream is None:
            return
        peer.serving.close(peer.stream)
        peer.stream = None
        peer.epoch += 1
        peer.numbers.clear()
        peer.by_cid.clear()
        if redial:
            self._at(peer.backoff, lambda: self._dial(peer))
            peer.backoff = min(10.0, 2 * peer.backoff)

    def _break(self, peer: _Peer, *, redial: bool) -> None:
        """The stream is reset from outside."""
        self._hang_up(peer, redial=redial)
        self._step(e.PeerLeft(peer.name))

    def _later(self, peer: _Peer, delay: float, action: Callable[[], None]) -> None:
        """Do something unless the stream is gone by then."""
        epoch = peer.epoch
        self._at(delay, lambda: action() if peer.epoch == epoch else None)

    def _send_want(self, peer: _Peer, blocks: tuple[Wanted, ...]) -> None:
        first = peer.asked
        for number, block in enumerate(blocks, first):
            assert block.cid not in peer.by_cid, f"seed {self.seed}: asked twice of {peer.name}"
            peer.numbers[number] = block
            peer.by_cid[block.cid] = number
        peer.asked += len(blocks)
        links = tuple(block.cid for block in blocks)
        self._later(peer, peer.model.delay, lambda: self._receive(peer, Want(first, links)))

    def _send_cancel(self, peer: _Peer, cids: tuple[CID, ...]) -> None:
        numbers = tuple(peer.by_cid[cid] for cid in cids if cid in peer.by_cid)
        if numbers:
            self._later(peer, peer.model.delay, lambda: self._receive(peer, Cancel(numbers)))

    # --- the peers --------------------------------------------------------------------------

    def _peer(self, name: str, model: PeerModel) -> _Peer:
        held = {cid for cid in self._blocks if model.share >= 1 or self.rng.random() < model.share}
        return _Peer(name, model, held | {block.cid for block in self.nodes})

    def _receive(self, peer: _Peer, message: Want | Cancel | Have) -> None:
        assert peer.stream is not None
        reply = peer.serving.receive_untrusted(peer.stream, message)
        assert not isinstance(reply, Error), "the requester asks for no more than it may"
        if reply is not None:
            self._later(peer, peer.model.delay, lambda: self._missing(peer, reply.asks))
        self._work(peer)

    def _work(self, peer: _Peer) -> None:
        while (job := peer.serving.next(self.now)) is not None:
            if isinstance(job, FindHeld):
                self._answer_query(peer, job)
            else:
                self._answer_asks(peer, job)

    def _answer_query(self, peer: _Peer, job: FindHeld) -> None:
        links = self._links[job.part]
        everything = peer.model.behaviour == "claims"
        mask = sum(1 << i for i, cid in enumerate(links) if everything or cid in peer.holds)
        bitmap = mask.to_bytes(-(-len(links) // 8), "little")
        peer.serving.was_found(job.stream, job.part, bitmap)
        if peer.model.behaviour == "mute":
            return
        if peer.model.behaviour == "misfit":
            bitmap += b"\1"
        answer = e.HoldsReceived(peer.name, job.part, bitmap)
        self._later(peer, peer.model.delay, lambda: self._step(answer))

    def _answer_asks(self, peer: _Peer, job: ReadBlocks) -> None:
        for number, cid in job.asks:
            lacks = peer.model.behaviour == "claims" and self.rng.random() < 0.5
            if cid not in peer.holds or lacks:
                peer.serving.was_read(job.stream, None)
                self._later(peer, peer.model.delay, partial(self._missing, peer, (number,)))
                continue
            size = self._blocks[cid].size
            peer.serving.was_read(job.stream, size)
            self._send_block(peer, job.stream, number, size)

    def _send_block(self, peer: _Peer, stream: int, number: int, size: int) -> None:
        model = peer.model
        peer.sent += 1
        stuck = peer.sent > model.after
        if model.behaviour == "dies" and stuck:
            peer.gone = True
            self._later(peer, model.delay, lambda: self._break(peer, redial=False))
            return
        if model.behaviour == "staller" and stuck:
            return
        if model.behaviour == "trickler" and stuck:
            self._trickle(peer)
            return
        peer.free_at = max(self.now, peer.free_at) + size / model.bandwidth
        self._uploaded[peer.name] += size
        if self.rng.random() < model.loss:
            self._later(peer, peer.free_at - self.now, lambda: self._break(peer, redial=True))
            return
        genuine = model.behaviour != "liar" or peer.sent % model.after != 0
        self._later(peer, peer.free_at - self.now, lambda: self._sent(peer, stream, size))
        arrives = peer.free_at - self.now + model.delay
        self._later(peer, arrives, lambda: self._arrive(peer, number, genuine))

    def _trickle(self, peer: _Peer) -> None:
        def drop() -> None:
            self._step(e.BytesReceived(peer.name))
            self._later(peer, 1.0, drop)

        self._later(peer, 1.0, drop)

    def _sent(self, peer: _Peer, stream: int, size: int) -> None:
        peer.serving.was_taken(stream, size, self.now)
        peer.serving.was_sent(stream, size, self.now)
        self._work(peer)

    def _arrive(self, peer: _Peer, number: int, genuine: bool) -> None:
        block = peer.numbers.pop(number)
        del peer.by_cid[block.cid]
        peer.backoff = 1.0
        self._genuine[(peer.name, block.cid)] = genuine
        self._step(e.BlockReceived(peer.name, block.cid, block.size))

    def _missing(self, peer: _Peer, numbers: tuple[int, ...]) -> None:
        cids = []
        for number in numbers:
            block = peer.numbers.pop(number)
            del peer.by_cid[block.cid]
            cids.append(block.cid)
        self._step(e.MissingReceived(peer.name, tuple(cids)))


def random_scenario(rng: random.Random) -> Scenario:
    """Anything that can happen, of a size that runs in milliseconds."""
    parts = tuple(
        tuple(rng.choice((16 << 10, 1 << 20, 1 << 20, 1 << 20)) for _ in range(rng.randint(1, 12)))
        for _ in range(rng.randint(1, 5))
    )
    behaviours: tuple[Behaviour, ...] = (
        *("honest",) * 4,
        "liar",
        "staller",
        "trickler",
        "claims",
        "mute",
        "misfit",
        "dies",
    )
    peers = [
        PeerModel(
            behaviour=rng.choice(behaviours),
            joins_at=rng.choice((0.0, 0.0, 0.0, rng.uniform(0, 10))),
            bandwidth=10 ** rng.uniform(5.5, 8.5),
            delay=rng.choice((0.0005, 0.02, 0.1, 0.3)),
            share=rng.choice((1.0, 1.0, 0.7, 0.3)),
            loss=rng.choice((0.0, 0.0, 0.02, 0.1)),
            after=rng.randint(2, 6),
        )
        for _ in range(rng.randint(1, 6))
    ]
    return Scenario(parts, rng.randint(0, 4), tuple(peers))


def with_honest_peer(scenario: Scenario) -> Scenario:
    """The same, and one honest peer that holds everything, somewhere."""
    steady = PeerModel(bandwidth=5e6, delay=0.05)
    return replace(scenario, peers=(*scenario.peers, steady))


def _name(codec: int, kind: str, number: int) -> CID:
    return CID.of_digest(codec, blake3(f"{kind} {number}".encode()).digest())

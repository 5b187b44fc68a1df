"""A flash crowd in virtual time: many fetch one model at once from one seeder, and from each other.

Every member is the real `Session` and `Serving`; the links between them are modelled. A member sends
pieces of 256 KiB, its requesters in turn, through an uplink, and receives through a downlink, both of
fixed rate, as the server's shell does over equal links. Nothing is lost and nobody misbehaves: that is
`simulation`'s. No I/O; the same seed gives the same run.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from blake3 import blake3

from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.transfer import events as e
from omnistore.transfer.demand import Wanted
from omnistore.transfer.messages import Cancel, Error, Have, Want
from omnistore.transfer.serve import FindHeld, Serving
from omnistore.transfer.session import Session

PIECE: Final = 256 << 10
NEWS_EVERY: Final = 0.5
TICK: Final = 0.1
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class CrowdModel:
    """Who fetches what over which links."""

    leechers: int = 50
    parts: int = 16
    blocks: int = 16
    """Of 1 MiB, in each part."""
    bandwidth: float = 6.25e6
    """Bytes per second that a member can send, and receive."""
    delay: float = 0.01
    """Seconds one way."""
    links: int = 16
    """Other leechers that a leecher fetches from, beside the seeder."""
    within: float = 1.0
    """Seconds within which all come."""
    horizon: float = 600.0
    """Seconds after which a run that did not end is a bug."""

    @property
    def size(self) -> int:
        """Bytes of the model."""
        return self.parts * self.blocks * _MIB


@dataclass(frozen=True, slots=True)
class CrowdOutcome:
    """How it went."""

    seconds: tuple[float, ...]
    """From each leecher's coming to its last block, sorted."""
    copies_seeded: float
    """Bytes the seeder sent over the size of the model."""
    duplicates: float
    """Bytes that arrived twice over bytes wanted, of all leechers."""


@dataclass(slots=True, eq=False)
class _Stream:
    """One member fetching from another."""

    client: _Member
    server: _Member
    number: int
    due: deque[tuple[int, int]] = field(default_factory=deque)
    """(ask, bytes left) to be sent, in order."""
    asked: int = 0
    wanted: dict[int, Wanted] = field(default_factory=dict)
    numbers: dict[CID, int] = field(default_factory=dict)
    alive: bool = False


@dataclass(slots=True, eq=False)
class _Member:
    name: str
    session: Session
    holds: set[CID]
    serving: Serving = field(default_factory=Serving)
    inbound: dict[int, _Stream] = field(default_factory=dict)
    outbound: dict[str, _Stream] = field(default_factory=dict)
    turns: deque[_Stream] = field(default_factory=deque)
    """Streams with something to send."""
    sending: bool = False
    down_free_at: float = 0.0
    uploaded: int = 0
    came_at: float = 0.0
    done_at: float | None = None


class Crowd:
    """One run."""

    def __init__(self, model: CrowdModel, seed: int) -> None:
        self.model = model
        self.rng = random.Random(seed)
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._parts = {
            _name(DAG_CBOR, "part", n): tuple(
                Wanted(_name(RAW, f"block {n}", i), _MIB) for i in range(model.blocks)
            )
            for n in range(model.parts)
        }
        everything = {block.cid for blocks in self._parts.values() for block in blocks}
        self._size = dict.fromkeys(everything, _MIB)
        self._seeder = _Member("seeder", Session(self.rng.random), everything)
        self._leechers = [
            _Member(f"leecher{n}", Session(random.Random(f"{seed} {n}").random), set())
            for n in range(model.leechers)
        ]

    def run(self) -> CrowdOutcome:
        """Play it to its end."""
        for leecher in self._leechers:
            leecher.came_at = self.rng.uniform(0, self.model.within)
            self._at(leecher.came_at, partial(self._come, leecher))
        self._at(NEWS_EVERY, self._news)
        while any(leecher.done_at is None for leecher in self._leechers):
            self.now, _, action = heapq.heappop(self._queue)
            assert self.now < self.model.horizon, "the crowd never ends"
            action()
        took = sorted((one.done_at or 0.0) - one.came_at for one in self._leechers)
        wasted = sum(one.session.duplicate_bytes for one in self._leechers)
        return CrowdOutcome(
            tuple(took),
            self._seeder.uploaded / self.model.size,
            wasted / (self.model.size * len(self._leechers)),
        )

    def _at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay, next(self._order), action))

    # --- requesters -------------------------------------------------------------------------

    def _come(self, me: _Member) -> None:
        for part, blocks in self._parts.items():
            self._step(me, e.WantsAdded(part, blocks, (1 << len(blocks)) - 1))
        others = [one for one in self._leechers if one is not me]
        chosen = self.rng.sample(others, min(self.model.links, len(others)))
        for server in [self._seeder, *chosen]:
            opened = server.serving.open(me.name, self.now)
            if opened is not None:
                stream = _Stream(me, server, opened[0])
                server.inbound[stream.number] = stream
                me.outbound[server.name] = stream
                joined = e.PeerJoined(server.name, opened[1].asks, opened[1].queries)
                self._at(3 * self.model.delay, partial(self._step, me, joined))
        self._at(TICK, partial(self._tick, me))

    def _tick(self, me: _Member) -> None:
        if me.done_at is None:
            for name, stream in me.outbound.items():
                if stream.alive:
                    stream.alive = False
                    self._step(me, e.BytesReceived(name))
            self._step(me, e.Tick())
            self._at(TICK, partial(self._tick, me))

    def _step(self, me: _Member, event: e.Event) -> None:
        for command in me.session.step(event, self.now):
            match command:
                case e.SendWant(peer, blocks):
                    self._want(me.outbound[peer], blocks)
                case e.SendCancel(peer, cids):
                    stream = me.outbound[peer]
                    numbers = tuple(stream.numbers[cid] for cid in cids if cid in stream.numbers)
                    if numbers:
                        self._say(stream, Cancel(numbers))
                case e.AskHave(peer, parts):
                    self._say(me.outbound[peer], Have(parts))
                case e.Verify(_, cid):
                    self._at(0.001, partial(self._verified, me, cid))
                case e.Done():
                    me.done_at = self.now
                case _:
                    raise AssertionError(f"{me.name}: {command}")

    def _want(self, stream: _Stream, blocks: tuple[Wanted, ...]) -> None:
        first = stream.asked
        stream.asked += len(blocks)
        for number, block in enumerate(blocks, first):
            stream.wanted[number] = block
            stream.numbers[block.cid] = number
        self._say(stream, Want(first, tuple(block.cid for block in blocks)))

    def _verified(self, me: _Member, cid: CID) -> None:
        me.holds.add(cid)
        self._step(me, e.BlockVerified(cid))

    def _arrived(self, stream: _Stream, number: int) -> None:
        block = stream.wanted.pop(number)
        del stream.numbers[block.cid]
        self._step(stream.client, e.BlockReceived(stream.server.name, block.cid, block.size))

    def _missing(self, stream: _Stream, numbers: tuple[int, ...]) -> None:
        blocks = [stream.wanted.pop(number) for number in numbers]
        for block in blocks:
            del stream.numbers[block.cid]
        gone = e.MissingReceived(stream.server.name, tuple(block.cid for block in blocks))
        self._step(stream.client, gone)

    # --- servers ----------------------------------------------------------------------------

    def _say(self, stream: _Stream, message: Want | Cancel | Have) -> None:
        self._at(self.model.delay, partial(self._told, stream, message))

    def _told(self, stream: _Stream, message: Want | Cancel | Have) -> None:
        reply = stream.server.serving.receive_untrusted(stream.number, message)
        assert not isinstance(reply, Error), "the requester asks for no more than it may"
        if reply is not None:
            self._at(self.model.delay, partial(self._missing, stream, reply.asks))
        self._work(stream.server)

    def _work(self, server: _Member) -> None:
        while (job := server.serving.next(self.now)) is not None:
            stream = server.inbound[job.stream]
            if isinstance(job, FindHeld):
                blocks = self._bitmap(server, job.part)
                server.serving.was_found(job.stream, job.part, blocks)
                self._tell(stream, job.part, blocks)
                continue
            for number, cid in job.asks:
                if cid not in server.holds:
                    server.serving.was_read(job.stream, None)
                    self._at(self.model.delay, partial(self._missing, stream, (number,)))
                    continue
                server.serving.was_read(job.stream, self._size[cid])
                if not stream.due:
                    server.turns.append(stream)
                stream.due.append((number, self._size[cid]))
        if not server.sending:
            self._send(server)

    def _send(self, server: _Member) -> None:
        """Send one piece of the stream whose turn it is; then the next."""
        server.sending = bool(server.turns)
        if not server.turns:
            return
        stream = server.turns.popleft()
        number, left = stream.due.popleft()
        piece = min(PIECE, left)
        if left > piece:
            stream.due.appendleft((number, left - piece))
        if stream.due:
            server.turns.append(stream)
        server.uploaded += piece
        self._at(piece / self.model.bandwidth, partial(self._sent, stream, number, piece, left == piece))

    def _sent(self, stream: _Stream, number: int, piece: int, whole: bool) -> None:
        client, rate = stream.client, self.model.bandwidth
        client.down_free_at = max(self.now + self.model.delay, client.down_free_at + piece / rate)
        self._at(client.down_free_at - self.now, partial(self._received, stream, number, whole))
        stream.server.serving.was_taken(stream.number, piece, self.now)
        if whole:
            stream.server.serving.was_sent(stream.number, _MIB, self.now)
            self._work(stream.server)
        self._send(stream.server)

    def _received(self, stream: _Stream, number: int, whole: bool) -> None:
        stream.alive = True
        if whole:
            self._arrived(stream, number)

    def _news(self) -> None:
        for server in self._leechers:
            for part in server.serving.polled:
                blocks = self._bitmap(server, part)
                for number in server.serving.news(part, blocks):
                    self._tell(server.inbound[number], part, blocks)
        self._at(NEWS_EVERY, self._news)

    def _tell(self, stream: _Stream, part: CID, blocks: bytes) -> None:
        told = e.HoldsReceived(stream.server.name, part, blocks)
        self._at(self.model.delay, partial(self._step, stream.client, told))

    def _bitmap(self, server: _Member, part: CID) -> bytes:
        blocks = self._parts[part]
        mask = sum(1 << i for i, block in enumerate(blocks) if block.cid in server.holds)
        return mask.to_bytes(-(-len(blocks) // 8), "little")


def _name(codec: int, kind: str, number: int) -> CID:
    return CID.of_digest(codec, blake3(f"{kind} {number}".encode()).digest())

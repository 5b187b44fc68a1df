"""The server's decisions: what each stream may ask, and whose blocks are read next.

Pure: no stream, store or clock. The shell (`server`) tells it what arrived and what was sent, and
takes jobs from it. Streams take turns, one job at a time, so a requester with a thousand asks
waits as long as one with two; but one that asks only for what others were given already lets those
pass that ask for more. What is in memory is bounded per peer and in all, and no more is read
than will soon be sent: a requester that asks and does not read stops getting turns, and takes them
from nobody. A peer's share of memory begins small, grows with what it takes in, and shrinks as memory
fills; half of memory is for those that have taken something in. Where others wait for memory or for
a place, the stream that has taken in nothing for longest is ended. Implements spec/05-transfer, section
"The server".
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final, TypeAlias

from omnistore.block import BLOCK_SIZE, MAX_BLOCK_SIZE
from omnistore.cid import CID
from omnistore.errors import LocalProtocolError, RemoteProtocolError
from omnistore.transfer.messages import Cancel, Error, FromRequester, Have, Hello, Missing, Want
from omnistore.transfer.outflow import Given, Outflow


@dataclass(frozen=True, slots=True)
class ServeLimits:
    """What a server gives to strangers."""

    streams: int = 256
    """Streams served at once: 256 requesters at 64 KiB of buffers are 16 MiB."""
    streams_per_peer: int = 4
    """One for each of a few fetches; they share one peer's turns."""
    asks: int = 1024
    """Asks unanswered per stream: a window of 64 MiB in blocks of 64 KiB."""
    queries: int = 256
    """Parts asked about and unanswered per stream."""
    ahead: int = 16 << 20
    """Bytes read and not yet sent per peer: two turns of four blocks, one being sent and one being read."""
    memory: int = 64 << 20
    """Bytes read and not yet sent over all streams."""
    polls: int = 1024
    """Parts that somebody waits to hear news of, over all streams; beyond it a query is answered at once."""
    batch: int = 4
    """Blocks read in one turn, of a server fast enough: one hop to a thread for four."""
    first: int = 8
    """Blocks of a stream that are given in turn, whoever had them before: headers, without which nobody
    can begin."""
    passes: int = 3
    """Rounds in which a stream that asks for nothing new lets others pass."""


LIMITS: Final = ServeLimits()
BEGIN: Final = MAX_BLOCK_SIZE
"""Bytes read ahead for a peer that has taken in nothing yet: one block."""
PROVEN: Final = BLOCK_SIZE
"""Bytes that a requester must take in to count as one that reads: more than what lies between us holds."""
HESITANT: Final = 0.25
"""Seconds in which such a one takes in no piece after which what is read for it holds up nobody else."""
DEAF: Final = 5.0
"""Seconds in which a requester takes in no piece after which it makes room for others that wait: at 64 KiB
to a piece, below 13 kB/s."""
UNUSED: Final = 10.0
"""Seconds without an ask after which a stream makes room where there is no place for another."""
BATCH_ROOM: Final = 4 << 20
"""Bytes worth reading ahead for each block of a turn: four at 32 MB/s."""


@dataclass(frozen=True, slots=True)
class ReadBlocks:
    """Read these blocks for a stream; each is then reported by `was_read`."""

    stream: int
    asks: tuple[tuple[int, CID], ...]


@dataclass(frozen=True, slots=True)
class FindHeld:
    """Find out which blocks of a part are held; reported by `was_found`."""

    stream: int
    part: CID


Job: TypeAlias = ReadBlocks | FindHeld


@dataclass(slots=True)
class _Line:
    """One stream's place in the queue."""

    peer: str
    next_ask: int = 0
    cancels: int = 0
    asks: dict[int, CID] = field(default_factory=dict)
    """Asked, not yet read."""
    ranked: list[tuple[int, int]] = field(default_factory=list)
    """Heap of (how often the block was given when last looked at, ask); cancelled ones included."""
    taken: int = 0
    """Blocks read for it so far."""
    passed: int = 0
    """Jobs given to others since its last."""
    active_at: float = 0.0
    """When it was opened, or last took something in."""
    sending_since: float | None = None
    """Since when a piece is being handed to the network; None while none is, or our own cap holds it."""
    taken_in: int = 0
    """Bytes of blocks handed to the network so far."""
    ended: bool = False
    """It is to be ended, and will soon be closed."""
    unanswered: int = 0
    """Asked, not yet handed to the stream: those being read included."""
    queries: deque[CID] = field(default_factory=deque)
    open_queries: int = 0
    told: dict[CID, int] = field(default_factory=dict)
    """Hash of what the stream was last told about a part."""
    polls: set[CID] = field(default_factory=set)
    """Parts asked about again: answered when there is something new to tell."""
    held: int = 0
    """Bytes of memory it takes up."""

    @property
    def idle(self) -> bool:
        return not self.asks and not self.queries

    @property
    def proven(self) -> bool:
        """Whether it has shown that it reads."""
        return self.taken_in >= PROVEN


class Serving:
    """The queue of one server."""

    def __init__(self, limits: ServeLimits = LIMITS) -> None:
        self.limits = limits
        self.held = 0
        """Bytes read, or being read, and not yet sent."""
        self._lines: dict[int, _Line] = {}
        self._held_by: Counter[str] = Counter()
        """The same by peer."""
        self._unproven = 0
        """The same of streams that have not shown yet that they read."""
        self._turns: deque[int] = deque()
        """Streams that have something to do, whose turn it is first."""
        self._polls: Counter[CID] = Counter()
        self._outflow = Outflow(limits.memory)
        self._given = Given()
        self._count = 0
        self._ended: list[tuple[int, str]] = []

    @property
    def streams(self) -> int:
        """How many are open."""
        return len(self._lines)

    @property
    def waits(self) -> bool:
        """Whether anybody waits for something to be read: the passing of time alone may give it a turn."""
        return any(not line.idle for line in self._lines.values())

    def owes(self, stream: int) -> bool:
        """Whether the stream has asked for something that it was not given yet; news it may wait for."""
        line = self._lines.get(stream)
        return line is not None and bool(line.unanswered or line.open_queries > len(line.polls) or line.held)

    def open(self, peer: str, now: float) -> tuple[int, Hello] | None:
        """Take in a stream from `peer`: its number and our hello; None when there is no room.

        See `ended` for whom it may have taken the place of.
        """
        mine = sum(line.peer == peer for line in self._lines.values())
        if mine >= self.limits.streams_per_peer:
            return None
        full = sum(not line.ended for line in self._lines.values()) >= self.limits.streams
        if full and not self._make_place(now):
            return None
        self._count += 1
        self._lines[self._count] = _Line(peer, active_at=now)
        return self._count, Hello(self.limits.asks, self.limits.queries)

    def close(self, stream: int) -> None:
        """The stream is gone; what it held in memory is freed, what is being read for it is ignored."""
        line = self._lines.pop(stream, None)
        if line is not None:
            self._hold(line, -line.held)
            for part in line.polls:
                self._unpoll(part)

    def ended(self) -> list[tuple[int, str]]:
        """Streams to end now, each once, and why: others need their room. Look after `open` and `next`."""
        found, self._ended = self._ended, []
        return found

    def receive_untrusted(self, stream: int, message: FromRequester) -> Missing | Error | None:
        """Take in a message; what to answer at once.

        An `Error` (more was asked than the hello allows), and a `RemoteProtocolError` raised, end the stream.
        """
        line = self._line(stream)
        was_idle = line.idle
        reply: Missing | Error | None = None
        match message:
            case Want(first, links):
                reply = self._want(line, first, links)
            case Cancel(asks):
                reply = self._cancel(line, asks)
            case Have(parts):
                if line.open_queries + len(parts) > self.limits.queries:
                    return Error("over-asked", f"over {self.limits.queries} parts asked about at once")
                line.open_queries += len(parts)
                for part in parts:
                    self._query(line, part)
        if was_idle and not line.idle and stream not in self._turns:
            self._turns.append(stream)
        return reply

    def next(self, now: float) -> Job | None:
        """The next thing to do, in fair turns; None while there is none or memory is full."""
        room = self._room(now)
        best: tuple[int, int] | None = None
        passed: list[_Line] = []
        self._make_room(now)
        for stream in tuple(self._turns):
            line = self._lines.get(stream)
            if line is None or line.idle:
                self._turns.remove(stream)
            elif line.queries:
                self._rotate(stream)
                return FindHeld(stream, line.queries.popleft())
            elif room >= MAX_BLOCK_SIZE and self._reads(line, now) and self._worth(line):
                rank = self._rank(line)
                if best is None or rank < best[0]:
                    best = (rank, stream)
                if rank == 0:
                    break
                passed.append(line)
        if best is None:
            return None
        for line in passed:
            line.passed += 1
        return self._read(best[1], room, now)

    def was_read(self, stream: int, size: int | None) -> None:
        """A block of a job is in memory (`size` bytes) or is not to be had (None)."""
        line = self._lines.get(stream)
        if line is not None:
            self._hold(line, (size or 0) - MAX_BLOCK_SIZE)
            if size is None:
                line.unanswered -= 1

    def sends(self, stream: int, now: float) -> None:
        """A piece of a block is being handed to the network."""
        line = self._lines.get(stream)
        if line is not None:
            line.sending_since = now

    def was_taken(self, stream: int, size: int, now: float) -> None:
        """A piece of `size` bytes was handed to the network."""
        line = self._lines.get(stream)
        if line is not None:
            line.sending_since, line.active_at = None, now
            unproven = not line.proven
            line.taken_in += size
            if unproven and line.proven:
                self._unproven -= line.held

    def was_sent(self, stream: int, size: int, now: float) -> None:
        """All of a block of `size` bytes was handed to the network."""
        self._outflow.sent(size, now)
        line = self._lines.get(stream)
        if line is not None:
            self._hold(line, -size)
            line.unanswered -= 1

    def may_give(self, stream: int, now: float) -> bool:
        """Whether it is worth looking for a turn, now that a block of `stream` was sent."""
        line = self._lines.get(stream)
        if line is None or any(other != stream for other in self._turns):
            return True
        return not line.idle and self._worth(line) and self._room(now) >= MAX_BLOCK_SIZE

    def was_found(self, stream: int, part: CID, blocks: bytes | None) -> None:
        """A query is answered with this."""
        line = self._lines.get(stream)
        if line is not None:
            line.open_queries -= 1
            if len(line.told) >= 2 * self.limits.queries:
                del line.told[next(iter(line.told))]
            line.told[part] = hash(blocks)

    @property
    def polled(self) -> Sequence[CID]:
        """Parts that somebody waits to hear news of."""
        return tuple(self._polls)

    def news(self, part: CID, blocks: bytes | None) -> list[int]:
        """What is held of a polled part now: the streams to tell, to which it is news."""
        found = []
        for stream, line in self._lines.items():
            if part in line.polls and line.told.get(part) != hash(blocks):
                line.polls.remove(part)
                self._unpoll(part)
                self.was_found(stream, part, blocks)
                found.append(stream)
        return found

    def _query(self, line: _Line, part: CID) -> None:
        """Answer at once what was never told, and what there is no room to remember."""
        room = part in self._polls or len(self._polls) < self.limits.polls
        if part in line.told and part not in line.polls and room:
            line.polls.add(part)
            self._polls[part] += 1
        else:
            line.queries.append(part)

    def _unpoll(self, part: CID) -> None:
        self._polls[part] -= 1
        if not self._polls[part]:
            del self._polls[part]

    def _room(self, now: float) -> int:
        """Bytes that may be read now. What is read for those who take nothing in holds up nobody else."""
        moving = sum(line.held for line in self._lines.values() if line.held and self._reads(line, now))
        return min(self._outflow.room - moving, self.limits.memory - self.held)

    def _reads(self, line: _Line, now: float) -> bool:
        """Whether the requester takes in what it asked for."""
        return not line.ended and self._deaf_for(line, now) <= (
            self._outflow.stuck if line.proven else HESITANT
        )

    def _deaf_for(self, line: _Line, now: float) -> float:
        """Seconds for which it has been taking in one piece."""
        return 0.0 if line.sending_since is None else now - line.sending_since

    def _share(self, line: _Line) -> int:
        """Bytes that may be read for the stream now, as far as its peer is concerned."""
        most = min(self.limits.ahead, BEGIN + line.taken_in, (self.limits.memory - self.held) // 2)
        share = max(MAX_BLOCK_SIZE, most) - self._held_by[line.peer]
        return share if line.proven else min(share, self.limits.memory // 2 - self._unproven)

    def _make_room(self, now: float) -> None:
        """Where somebody waits for memory, end the stream that is deaf for longest; one at a time."""
        full = self.limits.memory - self.held < MAX_BLOCK_SIZE
        half_full = self.limits.memory // 2 - self._unproven < MAX_BLOCK_SIZE
        lines = self._lines.values()
        if not (full or half_full) or any(line.ended and line.held for line in lines):
            return
        waiting = any(
            not (line.idle or line.held) and self._reads(line, now) and (full or not line.proven)
            for line in lines
        )
        deaf = [
            (self._deaf_for(line, now), stream)
            for stream, line in self._lines.items()
            if full or not line.proven
        ]
        longest, stream = max(deaf)
        if waiting and longest >= DEAF:
            self._end(stream, f"asked and then took in nothing for {longest:.0f} s, while others waited")

    def _make_place(self, now: float) -> bool:
        """End a stream that nobody misses, those first that never took anything in; whether there was one."""
        found = [
            (line.proven, line.active_at, stream)
            for stream, line in self._lines.items()
            if not line.ended
            and (
                self._deaf_for(line, now) >= DEAF
                or (not self.owes(stream) and now - line.active_at >= UNUSED)
            )
        ]
        if found:
            self._end(min(found)[2], "made room for others: it asked for nothing, or took in nothing")
        return bool(found)

    def _end(self, stream: int, reason: str) -> None:
        self._lines[stream].ended = True
        self._ended.append((stream, reason))

    def _worth(self, line: _Line) -> bool:
        """Whether a turn is worth its hop to a thread: a fast server waits until it can read several."""
        several = self._held_by[line.peer] > 0
        needed = min(self._turn(line) * MAX_BLOCK_SIZE, self.limits.ahead // 2) if several else 0
        return self._share(line) >= max(MAX_BLOCK_SIZE, needed)

    def _turn(self, line: _Line) -> int:
        """Blocks of a turn, at most: a slow server decides block by block, a fast one saves hops."""
        return min(self.limits.batch, len(line.asks), max(1, self._outflow.room // BATCH_ROOM))

    def _rank(self, line: _Line) -> int:
        """How often the least given of its blocks was given; 0 when it let others pass for long enough."""
        times = self._least(line)
        waited = line.passed >= self.limits.passes * len(self._turns)
        return 0 if waited or line.taken < self.limits.first else times

    def _least(self, line: _Line) -> int:
        """How often the block at the head of its heap was given; puts that in order first."""
        while True:
            times, ask = line.ranked[0]
            cid = line.asks.get(ask)
            if cid is None:
                heappop(line.ranked)
            elif (now := self._given.times(cid)) > times:
                heapreplace(line.ranked, (now, ask))
            else:
                return times

    def _read(self, stream: int, room: int, now: float) -> ReadBlocks:
        line = self._lines[stream]
        free = min(room, self._share(line))
        count = min(self._turn(line), free // MAX_BLOCK_SIZE)
        if not self.held:
            self._outflow.began(now)
        times = self._least(line)
        asks: list[tuple[int, CID]] = []
        while len(asks) < count and line.asks and self._least(line) == times:
            ask = heappop(line.ranked)[1]
            asks.append((ask, line.asks.pop(ask)))
        for _, cid in asks:
            self._given.add(cid)
        line.taken += len(asks)
        line.passed = 0
        self._hold(line, len(asks) * MAX_BLOCK_SIZE)
        self._rotate(stream)
        return ReadBlocks(stream, tuple(asks))

    def _rotate(self, stream: int) -> None:
        """Its peer had its turn, and with it all streams of that peer, which take it one after another."""
        peer = self._lines[stream].peer
        own = [one for one in self._turns if one in self._lines and self._lines[one].peer == peer]
        others = [one for one in self._turns if one not in own]
        own.remove(stream)
        self._turns = deque((*others, *own, stream))

    def _want(self, line: _Line, first: int, links: Sequence[CID]) -> Error | None:
        if first != line.next_ask:
            raise RemoteProtocolError(f"asks numbered from {first}; the next is {line.next_ask}")
        if line.unanswered + len(links) > self.limits.asks:
            return Error("over-asked", f"over {self.limits.asks} asks at once")
        if len(line.ranked) > 2 * self.limits.asks:
            line.ranked = [entry for entry in line.ranked if entry[1] in line.asks]
            heapify(line.ranked)
        for ask, cid in enumerate(links, first):
            line.asks[ask] = cid
            heappush(line.ranked, (self._given.times(cid), ask))
        line.next_ask += len(links)
        line.unanswered += len(links)
        return None

    def _cancel(self, line: _Line, asks: Sequence[int]) -> Missing | None:
        line.cancels += len(asks)
        if max(asks) >= line.next_ask or line.cancels > line.next_ask:
            raise RemoteProtocolError("cancels what was never asked, or twice")
        known = tuple(ask for ask in asks if line.asks.pop(ask, None) is not None)
        line.unanswered -= len(known)
        return Missing(known) if known else None

    def _hold(self, line: _Line, size: int) -> None:
        line.held += size
        self.held += size
        self._held_by[line.peer] += size
        if not self._held_by[line.peer]:
            del self._held_by[line.peer]
        if not line.proven:
            self._unproven += size

    def _line(self, stream: int) -> _Line:
        line = self._lines.get(stream)
        if line is None:
            raise LocalProtocolError(f"stream {stream} is not open")
        return line

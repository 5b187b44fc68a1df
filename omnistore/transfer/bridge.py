"""A server of the transfer protocol within this process, in front of a source that speaks something else.

What the session asks of it becomes jobs for an `Origin`, and what they bring becomes `block` messages, so
scheduling, verification, bans and end-game are those of every other peer. Knows nothing of HTTP:
`web` does. Implements spec/05-transfer, section "Web servers as sources".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import trio

from omnistore.block import MAX_BLOCK_SIZE
from omnistore.cid import CID
from omnistore.errors import PeerUnreachable, RemoteProtocolError
from omnistore.net.interface import AT_ONCE, NextRoom, spread
from omnistore.transfer.messages import (
    LIMITS,
    REQUESTER,
    Cancel,
    Decoder,
    Deliver,
    Have,
    Hello,
    Holds,
    Message,
    Missing,
    Want,
    encode,
)
from omnistore.transfer.ranges import Place, Range, RangeQueue

PLACES_PATIENCE: Final = 8.0
"""Seconds a question what is held waits for the headers, well under the session's patience."""
HELD_MOST: Final = 8 << 20
"""Bytes that arrived and wait to be taken in, before the connections are left to wait."""
_PAYLOAD: Final = memoryview(bytes(MAX_BLOCK_SIZE))
"""Stands for a payload that is still on its way where only its length counts."""


@dataclass(slots=True, eq=False)
class Delivery:
    """One block on its way: what of it arrived and was not handed on."""

    ask: int
    size: int
    pieces: deque[bytes] = field(default_factory=deque)
    lacking: int = field(init=False)

    def __post_init__(self) -> None:
        self.lacking = self.size


class Origin(Protocol):
    """One source of either kind: what it holds, and how to get it."""

    peer: str
    """Its name among the peers: a URL without secrets."""
    connections: int
    not_before: float
    """Clock time until which it asked to be left alone."""

    def place(self, cid: CID) -> Place | None:
        """How a block is queued; None if it can not be had here."""
        ...

    def bitmap(self, part: CID) -> bytes | None:
        """What of a part can be had here."""
        ...

    def most(self, queued: int) -> int:
        """Bytes of the next request when so many are queued."""
        ...

    async def probe(self) -> None:
        """See whether the server is there and has what it should."""
        ...

    async def take(self, job: Range, cids: Mapping[int, CID], stream: OriginStream) -> None:
        """Get what `job` asks for into `stream`. Raises `PeerUnreachable`, `RemoteProtocolError`."""
        ...


@dataclass(slots=True, eq=False)
class Knowledge:
    """How much is known of what lies where: shared by the streams of one fetch."""

    resolved: bool = False
    """Whether nothing more will be: the place of every block is known."""
    more: trio.Event = field(default_factory=trio.Event)
    """Set, and replaced, whenever more is known."""

    def grew(self, *, resolved: bool = False) -> None:
        """More is known: parts asked about before may be told of now."""
        self.resolved |= resolved
        self.more.set()
        self.more = trio.Event()


class OriginStream:
    """One stream to a source: a `net.interface.Stream`."""

    def __init__(self, origin: Origin, knowledge: Knowledge) -> None:
        self.peer = origin.peer
        self._origin = origin
        self._knowledge = knowledge
        self._decoder = Decoder(REQUESTER)
        self._queue = RangeQueue()
        self._cids: dict[int, CID] = {}
        """Asks queued or being answered."""
        self._parts: list[CID] = []
        self._out: deque[bytes | Delivery] = deque()
        self._fault: PeerUnreachable | RemoteProtocolError | None = None
        self._scope = trio.CancelScope()
        self._news = trio.Event()
        """Something can be received."""
        self._asked = trio.Event()
        """Something was asked for. Set, and replaced, each time."""
        self._held = 0
        """Bytes that arrived and were not received."""
        self._drained = trio.Event()

    # --- the requester's end ----------------------------------------------------------------

    async def send_all(self, *data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        for message in self._decoder.feed_untrusted(b"".join(data)):
            match message:
                case Want(first, links):
                    self._want(first, links)
                case Cancel(asks):
                    gone = tuple(ask for ask in asks if self._queue.cancel(ask))
                    for ask in gone:
                        del self._cids[ask]
                    if gone:
                        self._say(Missing(gone))
                case Have(parts):
                    self._parts += parts
        self._asked.set()
        self._asked = trio.Event()

    def _want(self, first: int, links: Sequence[CID]) -> None:
        missing = []
        for ask, cid in enumerate(links, first):
            place = self._origin.place(cid)
            if place is None:
                missing.append(ask)
            else:
                self._cids[ask] = cid
                self._queue.add(ask, place)
        if missing:
            self._say(Missing(tuple(missing)))

    async def receive_some(self, max_bytes: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            data = self._ready(max_bytes)
            if data:
                return data
            if self._fault is not None:
                raise self._fault
            self._news = trio.Event()
            await self._news.wait()

    def _ready(self, most: int) -> bytes:
        """What can be handed over now. Blocks leave in the order of their first bytes."""
        while self._out:
            front = self._out[0]
            if isinstance(front, bytes):
                self._out[0] = front[most:]
                if len(front) <= most:
                    self._out.popleft()
                return front[:most]
            if front.pieces:
                piece = front.pieces.popleft()
                if len(piece) > most:
                    front.pieces.appendleft(piece[most:])
                self._drain(len(piece[:most]))
                return piece[:most]
            if front.lacking:
                break
            self._out.popleft()
            self._drain(0)
        return b""

    def _drain(self, count: int) -> None:
        self._held -= count
        self._drained.set()
        self._drained = trio.Event()

    @property
    def superseded(self) -> bool:
        return False

    async def receive_into(self, room: memoryview, more: NextRoom | None = None) -> int:
        data = await self.receive_some(len(room) if more is None else max(len(room), AT_ONCE))
        spread(data, room, more)
        return len(data)

    async def receive_exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += await self.receive_some(count - len(data))
        return data

    async def aclose(self) -> None:
        await self.reset()

    async def reset(self) -> None:
        self._scope.cancel()
        await trio.lowlevel.cancel_shielded_checkpoint()

    # --- the source's end -------------------------------------------------------------------

    async def run(self) -> None:
        """Make requests until reset or at fault."""
        with self._scope:
            try:
                await self._origin.probe()
                self._say(Hello(LIMITS.links, LIMITS.queries))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._answer_queries)
                    for _ in range(self._origin.connections):
                        nursery.start_soon(self._work, nursery.cancel_scope)
            except (PeerUnreachable, RemoteProtocolError) as fault:
                self._fail(fault)
        self._fail(PeerUnreachable(f"{self.peer}: the stream was reset"))

    def _fail(self, fault: PeerUnreachable | RemoteProtocolError) -> None:
        if self._fault is None:
            self._fault = fault
            self._news.set()

    async def _work(self, scope: trio.CancelScope) -> None:
        """One connection: requests, one after another."""
        while True:
            job = self._queue.next(self._origin.most(self._queue.bytes))
            if job is None:
                await self._asked.wait()
                continue
            cids = {ask: self._cids.pop(ask) for ask, _ in job.asks}
            try:
                await self._origin.take(job, cids, self)
            except (PeerUnreachable, RemoteProtocolError) as fault:
                self._fail(fault)
                scope.cancel()
                return

    async def _answer_queries(self) -> None:
        """Say what is held: of each part at once if that is known, or as soon as it is."""
        while True:
            self._parts = [part for part in self._parts if not self._tell(part)]
            if not self._parts:
                await self._asked.wait()
                continue
            with trio.move_on_after(PLACES_PATIENCE) as waiting:
                await self._more_or_asked()
            if waiting.cancelled_caught:
                for part in self._parts:
                    self._say(Holds(part, None))
                self._parts = []

    def _tell(self, part: CID) -> bool:
        bitmap = self._origin.bitmap(part)
        if bitmap is None and not self._knowledge.resolved:
            return False
        self._say(Holds(part, bitmap))
        return True

    async def _more_or_asked(self) -> None:
        async with trio.open_nursery() as nursery:

            async def wait_for(event: trio.Event) -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait_for, self._knowledge.more)
            nursery.start_soon(wait_for, self._asked)

    def _say(self, message: Message) -> None:
        self._out.append(encode(message))
        self._news.set()

    def begin(self, ask: int, size: int) -> Delivery:
        """The first byte of a block arrived."""
        delivery = Delivery(ask, size)
        self._say(Deliver(ask, _PAYLOAD[:size]))
        self._out.append(delivery)
        return delivery

    async def deliver(self, delivery: Delivery, data: bytes) -> None:
        """More bytes of a block arrived. Waits while much is waiting, unless others wait for this."""
        while self._held > HELD_MOST and self._out[0] is not delivery:
            await self._drained.wait()
        delivery.pieces.append(data)
        delivery.lacking -= len(data)
        self._held += len(data)
        self._news.set()

    def lack(self, ask: int) -> None:
        """A block can not be had after all."""
        self._say(Missing((ask,)))

"""Serves the transfer protocol: the trio shell around `serve.Serving`.

One pair of tasks per stream (what arrives, what leaves) and a few readers that fetch blocks from
the store in threads. The store re-checks every digest it reads; a block that turns out rotten or
changed is answered `missing` and reported. Decides nothing about turns and bounds: `serve` does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import trio

from omnistore.block import BLOCK_SIZE, Block
from omnistore.cid import CID
from omnistore.errors import (
    BlockMissing,
    IntegrityError,
    MalformedManifest,
    OmniError,
    PeerUnreachable,
    RemoteProtocolError,
    StoreError,
)
from omnistore.manifest import part_links_untrusted
from omnistore.net.interface import Network, Stream
from omnistore.store.interface import Store
from omnistore.transfer.buffers import Buffers
from omnistore.transfer.messages import (
    LIMITS,
    PROTOCOL,
    REQUESTER,
    Cancel,
    Decoder,
    Deliver,
    Error,
    FromServer,
    Have,
    Holds,
    Missing,
    Want,
    encode,
)
from omnistore.transfer.pacing import Pacer
from omnistore.transfer.serve import FindHeld, ReadBlocks, ServeLimits, Serving

_log = logging.getLogger(__name__)

READERS: Final = 2
"""Threads that read and hash: one core's worth each, 3 GB/s."""
PIECE: Final = (1 << 20) + 4096
"""Bytes handed to the network under one deadline: a block with its head. Every hand-over costs."""
SLOW_PIECE: Final = 64 << 10
"""The same for a requester that is slow, or not known yet: what it takes in is seen as it does."""
SLOW: Final = 0.5
"""Seconds for one block after which a requester counts as slow."""
LOOK_AGAIN: Final = 0.1
"""Seconds between two looks for a turn while somebody waits for one."""
SEND_PATIENCE: Final = 120.0
"""Seconds for a requester to take in one piece: below 9 kB/s it is not reading."""
NEWS_EVERY: Final = 0.5
"""Seconds between two looks for blocks that came to be held, while somebody waits to hear of them."""
NEWS_SHARE: Final = 10
"""Looking takes at most one in so many seconds of one thread."""
IDLE_PATIENCE: Final = 600.0
"""Seconds a stream may stay open with nothing asked."""
LAST_WORDS: Final = 2.0
"""Seconds to deliver an `error` before the stream is reset."""
_RECEIVE: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Unavailable:
    """A block that the index promised could not be read: its file changed or is rotten."""

    cid: CID
    error: OmniError


@dataclass(frozen=True, slots=True)
class Served:
    """A stream ended."""

    peer: str
    blocks: int
    bytes: int
    reason: str | None
    """Why it was ended by us; None when the requester was done."""


ServeEvent: TypeAlias = Unavailable | Served

_Outgoing: TypeAlias = tuple[FromServer, memoryview | None]
"""A message, and the lent memory that its payload may lie in."""


@dataclass(slots=True, eq=False)
class _Outlet:
    """What leaves on one stream."""

    send: trio.MemorySendChannel[_Outgoing]
    receive: trio.MemoryReceiveChannel[_Outgoing]
    active_at: float
    sending_since: float | None = None
    """Since when the network has been taking in one piece; None while it has none."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Of the whole stream."""
    slow: bool = True
    blocks: int = 0
    bytes: int = 0
    reason: str | None = None
    told: bool = False
    """Whether the requester was told the reason."""

    def put(self, message: FromServer, room: memoryview | None = None) -> None:
        """Have a message sent in its turn."""
        self.send.send_nowait((message, room))

    def end(self, error: Error) -> None:
        """Have the stream ended behind this, within `LAST_WORDS`."""
        self.reason = self.reason or error.text
        self.put(error)
        self.scope.deadline = trio.current_time() + LAST_WORDS


async def serve_transfer(
    network: Network,
    store: Store,
    *,
    events: Callable[[ServeEvent], None] = lambda event: None,
    limits: ServeLimits | None = None,
    pacer: Pacer | None = None,
    task_status: Any = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requesters with everything `store` holds, until cancelled; `pacer` caps what is sent."""
    server = _Server(store, events, Serving(limits or ServeLimits()), pacer or Pacer(None))
    async with trio.open_nursery() as nursery:
        for _ in range(READERS):
            nursery.start_soon(server.work)
        nursery.start_soon(server.tell_news)
        network.serve(PROTOCOL, server.stream)
        task_status.started()


@dataclass(slots=True, eq=False)
class _Server:
    store: Store
    events: Callable[[ServeEvent], None]
    serving: Serving
    pacer: Pacer
    threads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(READERS))
    outlets: dict[int, _Outlet] = field(default_factory=dict)
    buffers: Buffers = field(default_factory=Buffers)
    lot: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    """Readers without a job."""

    async def stream(self, stream: Stream) -> None:
        """Serve one inbound stream to its end."""
        opened = self.serving.open(stream.peer, trio.current_time())
        self._end_ended()
        if opened is None:
            with trio.move_on_after(LAST_WORDS):
                await stream.send_all(encode(Error("busy", "too many streams; come back later")))
            await stream.aclose()
            return
        number, hello = opened
        outlet = _Outlet(*trio.open_memory_channel[_Outgoing](math.inf), trio.current_time())
        self.outlets[number] = outlet
        outlet.put(hello)
        try:
            async with trio.open_nursery() as nursery:
                outlet.scope = nursery.cancel_scope
                nursery.start_soon(self._send, stream, number, outlet, nursery.cancel_scope)
                nursery.start_soon(self._watch, number, outlet)
                await self._receive(stream, number, outlet)
                # First: a reader that comes back from its thread must find no closed outlet.
                del self.outlets[number]
                outlet.send.close()
                if outlet.reason is None:
                    nursery.cancel_scope.cancel()
                nursery.cancel_scope.deadline = trio.current_time() + LAST_WORDS
        finally:
            self.serving.close(number)
            self.outlets.pop(number, None)
            self.lot.unpark_all()
            self.events(Served(stream.peer, outlet.blocks, outlet.bytes, outlet.reason))
            # A reset could overtake the last word.
            await (stream.aclose() if outlet.told or outlet.reason is None else stream.reset())

    def _end_ended(self) -> None:
        """End the streams that make room for others."""
        for number, reason in self.serving.ended():
            outlet = self.outlets.get(number)
            if outlet is not None and self.serving.owes(number):
                # It takes in nothing: no word would reach it, and half a block may be on its way.
                outlet.reason = outlet.reason or reason
                outlet.scope.cancel()
            elif outlet is not None:
                outlet.end(Error("idle", reason))

    async def _receive(self, stream: Stream, number: int, outlet: _Outlet) -> None:
        """Take in what the requester says until it ends or breaks the protocol."""
        decoder = Decoder(REQUESTER)
        try:
            while data := await stream.receive_some(_RECEIVE):
                outlet.active_at = trio.current_time()
                for message in decoder.feed_untrusted(data):
                    if not isinstance(message, Want | Cancel | Have):
                        continue
                    reply = self.serving.receive_untrusted(number, message)
                    if isinstance(reply, Error):
                        _log.info("ending a stream of %s: %s", stream.peer, reply.text)
                        outlet.end(reply)
                        return
                    if reply is not None:
                        outlet.put(reply)
                self.lot.unpark_all()
        except RemoteProtocolError as error:
            _log.info("ending a stream of %s: %s", stream.peer, error)
            outlet.end(Error("malformed", error.message[: LIMITS.text]))
        except PeerUnreachable as error:
            _log.debug("a stream of %s broke: %s", stream.peer, error)

    async def _send(self, stream: Stream, number: int, outlet: _Outlet, scope: trio.CancelScope) -> None:
        """Send what is due; `_watch` sees to it that each piece is taken in."""
        try:
            while True:
                try:
                    message, room = outlet.receive.receive_nowait()
                except trio.WouldBlock:
                    message, room = await outlet.receive.receive()
                await self._send_one(stream, number, outlet, message)
                if isinstance(message, Error):
                    outlet.told = True
                    break
                now = outlet.active_at = trio.current_time()
                if isinstance(message, Deliver):
                    size = len(message.data)
                    outlet.blocks += 1
                    outlet.bytes += size
                    if room is not None:
                        self.buffers.take_back(room)
                    self.serving.was_sent(number, size, now)
                    if self.serving.may_give(number, now):
                        self.lot.unpark()
        except trio.EndOfChannel:
            pass
        except PeerUnreachable as error:
            _log.debug("a stream of %s broke: %s", stream.peer, error)
        scope.cancel()

    async def _send_one(self, stream: Stream, number: int, outlet: _Outlet, message: FromServer) -> None:
        head = encode(message)
        outlet.sending_since = trio.current_time()
        if not isinstance(message, Deliver):
            await stream.send_all(head)
            outlet.sending_since = None
            return
        data = memoryview(message.data)
        piece = self.pacer.piece(SLOW_PIECE if outlet.slow else PIECE)
        spent = 0.0
        for start in range(0, max(1, len(data)), piece):
            part = data[start : start + piece]
            outlet.sending_since = None
            await self.pacer.passes(stream.peer, len(part))
            began = outlet.sending_since = trio.current_time()
            self.serving.sends(number, began)
            # The head rides with the first piece of the payload: a frame, and a hand-over, less.
            await stream.send_all(b"" if start else head, part)
            now = trio.current_time()
            self.serving.was_taken(number, len(part), now)
            spent += now - began
        outlet.sending_since = None
        if len(data) >= BLOCK_SIZE // 2:
            # Less than that may lie in buffers between us, whether or not it is read.
            outlet.slow = spent * BLOCK_SIZE > SLOW * len(data)

    async def _watch(self, number: int, outlet: _Outlet) -> None:
        """End the stream when nothing has been asked for long, or nothing is taken in."""
        while True:
            now = trio.current_time()
            since = outlet.sending_since
            wait = outlet.active_at + IDLE_PATIENCE - now
            stuck = SEND_PATIENCE if since is None else since + SEND_PATIENCE - now
            if stuck <= 0:
                # No word would reach it.
                outlet.reason = f"asked and then took in nothing for {SEND_PATIENCE:.0f} s"
                _log.info("ending stream %d: it %s", number, outlet.reason)
                outlet.scope.cancel()
                return
            if wait <= 0 and not self.serving.owes(number):
                outlet.end(Error("idle", f"nothing was asked for {IDLE_PATIENCE:.0f} s"))
                return
            await trio.sleep(max(min(wait, stuck), 1.0))

    # --- readers ----------------------------------------------------------------------------

    async def work(self) -> None:
        """Do jobs, in the turns that `serving` gives, for ever."""
        while True:
            job = self.serving.next(trio.current_time())
            self._end_ended()
            if job is None:
                # Those who stopped reading make room for others with time, without an event of theirs.
                with trio.move_on_after(LOOK_AGAIN if self.serving.waits else math.inf):
                    await self.lot.park()
            elif isinstance(job, ReadBlocks):
                await self._read(job)
            else:
                await self._find(job)

    async def _read(self, job: ReadBlocks) -> None:
        wanted = [(cid, self.buffers.lend(BLOCK_SIZE)) for _, cid in job.asks]
        results = await trio.to_thread.run_sync(_read_blocks, self.store, wanted, limiter=self.threads)
        outlet = self.outlets.get(job.stream)
        missing = []
        for (ask, cid), (_, room), result in zip(job.asks, wanted, results, strict=True):
            if isinstance(result, Block):
                self.serving.was_read(job.stream, len(result))
                if outlet is not None:
                    outlet.put(Deliver(ask, result.data), room)
                    continue
            self.buffers.take_back(room)
            if isinstance(result, Block):
                continue
            self.serving.was_read(job.stream, None)
            missing.append(ask)
            if not isinstance(result, BlockMissing):
                _log.warning("block %s can no longer be served: %s", cid, result)
                self.events(Unavailable(cid, result))
        if missing and outlet is not None:
            outlet.put(Missing(tuple(missing)))

    async def _find(self, job: FindHeld) -> None:
        bitmap = await trio.to_thread.run_sync(_held_of, self.store, job.part, limiter=self.threads)
        self.serving.was_found(job.stream, job.part, bitmap)
        outlet = self.outlets.get(job.stream)
        if outlet is not None:
            outlet.put(Holds(job.part, bitmap))

    async def tell_news(self) -> None:
        """Tell those who wait what came to be held meanwhile, for ever."""
        pause = NEWS_EVERY
        while True:
            await trio.sleep(pause)
            started = trio.current_time()
            for part in self.serving.polled:
                bitmap = await trio.to_thread.run_sync(_held_of, self.store, part, limiter=self.threads)
                for stream in self.serving.news(part, bitmap):
                    outlet = self.outlets.get(stream)
                    if outlet is not None:
                        outlet.put(Holds(part, bitmap))
            pause = max(NEWS_EVERY, NEWS_SHARE * (trio.current_time() - started))


def _read_blocks(store: Store, wanted: Sequence[tuple[CID, memoryview]]) -> list[Block | OmniError]:
    found: list[Block | OmniError] = []
    for cid, room in wanted:
        try:
            found.append(store.read(cid, room))
        except (StoreError, IntegrityError) as error:
            found.append(error)
    return found


def _held_of(store: Store, part: CID) -> bytes | None:
    """The `holds` bitmap of a part; None when its node is not held or is no part."""
    try:
        links = part_links_untrusted(store.read(part))
    except (StoreError, IntegrityError, MalformedManifest):
        return None
    held = store.held(links)
    bitmap = bytearray(-(-len(links) // 8))
    for index, cid in enumerate(links):
        if cid in held:
            bitmap[index // 8] |= 1 << index % 8
    return bytes(bitmap) if 0 < len(bitmap) <= LIMITS.bitmap else None

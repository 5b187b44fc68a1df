"""The peers of one fetch: the trio shell around `session.Session`.

Dials candidates and keeps a stream to each, turns what arrives into events and commands into
bytes, and verifies and stores blocks in a thread, several per hop. Back-pressure runs from the
disk to the sender: while the queue before that thread is full, nothing is received. What is
wanted, and where peers come from, is `client`'s to say.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import trio

from omnistore.block import Block
from omnistore.cid import CID, RAW
from omnistore.errors import (
    DigestMismatch,
    FetchTimedOut,
    LocalProtocolError,
    NoProviders,
    OmniError,
    PeerUnreachable,
    RemoteProtocolError,
)
from omnistore.net.interface import Network, Provider, Stream
from omnistore.transfer import events as e
from omnistore.transfer.asks import Answer, Arrived, Asks, Refused
from omnistore.transfer.buffers import Buffers
from omnistore.transfer.demand import Wanted
from omnistore.transfer.messages import PROTOCOL, Error, Hello, Holds
from omnistore.transfer.session import Session

_log = logging.getLogger(__name__)

Sink = Callable[[Sequence[Block]], None]
"""Keeps verified blocks; called in a thread. Their memory is lent: it is for others once this returns."""


_Unverified: TypeAlias = tuple[str, Wanted, memoryview]
"""What a peer sent for what was wanted; the memory is lent."""


@dataclass(frozen=True, slots=True)
class SwarmLimits:
    """What one fetch may take of this machine."""

    candidates: int = 256
    """Peers remembered; more would only be strangers' claims."""
    unverified: int = 12
    """Blocks received and waiting to be verified: 12 MiB bridge the disk's pauses at 200 MB/s."""
    batch: int = 8
    """Blocks verified and written in one hop to a thread, at most."""
    gather: int = 4
    """Blocks waited for before such a hop, while more are on their way: each costs a transaction too."""
    gather_time: float = 0.01
    """Seconds that this takes at most."""
    tick: float = 0.1
    """Seconds between two looks at deadlines and at the end-game."""
    hello: float = 15.0
    """Seconds for a peer to greet."""
    redial_least: float = 1.0
    """Seconds before a peer that went away is dialled again: doubles while it delivers nothing."""
    redial_most: float = 10.0
    """Well under the session's `provider_timeout`, or the only provider could be waited for too long."""
    dials: int = 3
    """Dials without success after which a peer that never answered is no longer hoped for."""
    redial_dead: float = 60.0
    """Seconds between two dials of such a one while others are joined: records name peers that are gone
    for up to 48 hours."""


LIMITS: Final = SwarmLimits()


@dataclass(slots=True, eq=False)
class Link:
    """One joined peer."""

    stream: Stream
    scope: trio.CancelScope
    asks: Asks
    outgoing: bytearray = field(default_factory=bytearray)
    due: trio.Event = field(default_factory=trio.Event)
    alive: bool = False
    """Some bytes arrived since the last tick."""
    held_up: bool = False
    """Nothing is received from it until less is unverified."""
    moved: bool = False
    """It is given up for a better one to the same peer."""

    def send(self, data: bytes) -> None:
        """Queue bytes for the writer task."""
        self.outgoing += data
        self.due.set()


@dataclass(slots=True)
class Tally:
    """What a fetch moved so far."""

    blocks: int = 0
    bytes: int = 0
    node_bytes: int = 0
    peers: dict[str, int] = field(default_factory=dict)
    """Verified payload bytes of raw blocks, by sender."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Peers that misbehaved or stalled, and how."""
    unreachable: dict[str, str] = field(default_factory=dict)
    """Peers and addresses that could not be reached, and why."""


class Swarm:
    """The peers of one fetch. `run` it in a nursery, `add` candidates, `fetch` blocks."""

    def __init__(
        self, network: Network, session: Session, limits: SwarmLimits = LIMITS, *, finite: bool = False
    ) -> None:
        """`finite`: see the attribute."""
        self.session = session
        self.tally = Tally()
        self.progressed: Callable[[], None] = lambda: None
        """Called after blocks were verified."""
        self._network = network
        self._limits = limits
        self.finite = finite
        """Whether no candidates will come beyond those added so far."""
        self._links: dict[str, Link] = {}
        self._candidates: dict[str, Provider] = {}
        self._buffers = Buffers()
        self._slots = trio.Semaphore(session.limits.peers)
        self._threads = trio.CapacityLimiter(2)
        channel = trio.open_memory_channel[_Unverified]
        # Without a bound of its own: a link that is dropped while it waits must leave its block here, or that
        # block would be verified by nobody and asked of nobody.
        self._received, self._to_verify = channel(math.inf)
        self._taken = trio.lowlevel.ParkingLot()
        """Links that wait until less is unverified."""
        self._joined: set[str] = set()
        self._delivered: dict[str, int] = {}
        """Blocks received from each peer."""
        self._failures: dict[str, int] = {}
        """Dials of peers that never joined."""
        self._sink: Sink | None = None
        self._finished = trio.Event()
        self._failure: OmniError | None = None
        self._nursery: trio.Nursery | None = None

    @property
    def peers(self) -> int:
        """How many are joined."""
        return len(self._links)

    def joined(self) -> Sequence[Provider]:
        """Who they are."""
        return [self._candidates[peer] for peer in self._links if peer in self._candidates]

    async def run(self) -> None:
        """Keep the links, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for provider in self._candidates.values():
                nursery.start_soon(self._keep, provider)
            nursery.start_soon(self._tick)
            nursery.start_soon(self._verify)

    def settled(self) -> Sequence[str]:
        """Candidates that need not be found again: joined, or not hoped for."""
        return [peer for peer in self._candidates if peer in self._links or self._hopeless(peer)]

    def add(self, provider: Provider) -> None:
        """A peer that may hold something."""
        if provider.peer in self._candidates or provider.peer == self._network.peer_id:
            return
        if len(self._candidates) >= self._limits.candidates:
            # Strangers' claims: those that proved to be nobody make room.
            dead = next((peer for peer in self._candidates if self._hopeless(peer)), None)
            if dead is None:
                return
            del self._candidates[dead]
        self._candidates[provider.peer] = provider
        if self._nursery is not None:
            self._nursery.start_soon(self._keep, provider)

    def name(self, parts: Sequence[CID]) -> None:
        """Have peers say what they hold of parts whose blocks are wanted once they are known."""
        self._dispatch(e.PartsNamed(tuple(parts)))

    async def fetch(self, wants: Iterable[e.WantsAdded], sink: Sink) -> None:
        """Have every block of `wants` verified and given to `sink`. Raises `NetworkError` or `StoreError`.

        Each part is asked for before the next is looked at: a large model has a hundred thousand blocks.
        """
        self._sink, self._finished, some = sink, trio.Event(), False
        for want in wants:
            if want.wanted and self._finished.is_set() and self._failure is None:
                # What was wanted before is all here already.
                self._finished = trio.Event()
            some |= want.wanted > 0
            self._dispatch(want)
            await self._let_others_run()
        if some:
            await self._finished.wait()
        if self._failure is not None:
            raise self._failure

    async def _let_others_run(self) -> None:
        await trio.lowlevel.checkpoint()

    # --- events and commands ----------------------------------------------------------------

    def _dispatch(self, event: e.Event) -> bool:
        """Step the session and carry out its commands; whether the block just received is to be verified."""
        verify = False
        for command in self.session.step(event, trio.current_time()):
            match command:
                case e.Verify():
                    verify = True
                case e.SendWant(peer, blocks):
                    self._links[peer].send(self._links[peer].asks.want(blocks))
                case e.SendCancel(peer, cids):
                    self._links[peer].send(self._links[peer].asks.cancel(cids))
                case e.AskHave(peer, parts):
                    self._links[peer].send(self._links[peer].asks.have(parts))
                case e.DropPeer(peer, reason, banned):
                    _log.log(logging.WARNING if banned else logging.INFO, "dropped %s: %s", peer, reason)
                    self.tally.dropped[peer] = reason
                    if peer in self._links:
                        self._links[peer].scope.cancel()
                case e.Done():
                    self._finished.set()
                case e.Failed():
                    self._fail(self._explain(command))
        return verify

    def _fail(self, error: OmniError) -> None:
        self._failure = self._failure or error
        self._finished.set()

    def _explain(self, command: e.Failed) -> OmniError:
        count = len(command.missing)
        lacking = f"{count} block{'s' * (count > 1)} missing, the first {command.missing[0]}"
        told_of = {**self.tally.unreachable, **self.tally.dropped}
        # What could not be reached names itself.
        faults = [why if peer in why else f"{peer}: {why}" for peer, why in told_of.items()]
        told = "; ".join(faults[:5])
        if command.kind == "timed-out":
            limit = self.session.limits.stall_timeout
            message = f"nothing useful arrived for {limit:.0f} s ({lacking})"
            return FetchTimedOut(message, remedy=told or "Run the same command again: it resumes by block.")
        found = (
            "no peer found" if not (faults or self._candidates) else "no reachable peer holds what is needed"
        )
        return NoProviders(
            f"{found} ({lacking})" + (f": {told}" if told else ""),
            remedy="Check that a seed is running and reachable, or name one with --peer.",
        )

    async def _tick(self) -> None:
        while True:
            await trio.sleep(self._limits.tick)
            for peer, link in list(self._links.items()):
                if link.stream.superseded:
                    link.moved = True
                    link.scope.cancel()
                elif link.alive or link.held_up:
                    link.alive = False
                    self._dispatch(e.BytesReceived(peer, link.held_up))
            self._dispatch(e.Tick())
            if self.finite and all(self._hopeless(peer) for peer in self._candidates):
                self._dispatch(e.SourcesExhausted())

    def _hopeless(self, peer: str) -> bool:
        return peer in self.session.banned or self._failures.get(peer, 0) >= self._limits.dials

    # --- links ------------------------------------------------------------------------------

    async def _keep(self, provider: Provider) -> None:
        """Stay joined to one candidate for as long as it behaves."""
        pause = self._limits.redial_least
        # Forgotten for others and found again, it is another task's.
        while provider.peer not in self.session.banned and self._candidates.get(provider.peer) is provider:
            async with self._slots:
                delivered = self._delivered.get(provider.peer, 0)
                try:
                    while await self._join(provider):
                        _log.info("%s is asked over a better connection", provider.peer)
                except PeerUnreachable as error:
                    self.tally.unreachable[provider.peer] = error.message
                    if provider.peer not in self._joined:
                        self._failures[provider.peer] = self._failures.get(provider.peer, 0) + 1
                    _log.debug("peer %s: %s", provider.peer, error)
            if self._delivered.get(provider.peer, 0) > delivered:
                pause = self._limits.redial_least
            late = self._links and self._hopeless(provider.peer)
            await trio.sleep(self._limits.redial_dead if late else pause)
            pause = min(2 * pause, self._limits.redial_most)

    async def _join(self, provider: Provider) -> bool:
        """One stream, from its opening to its end; whether there is to be another at once."""
        stream = await self._network.open_stream(provider, PROTOCOL)
        peer = provider.peer
        link = Link(stream, trio.CancelScope(), Asks(self._buffers))
        fault: PeerUnreachable | None = None
        try:
            with link.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, link, nursery.cancel_scope)
                    try:
                        await self._read(peer, link)
                    except PeerUnreachable as error:
                        # Raised below: a nursery would wrap it into a group.
                        fault = error
                    nursery.cancel_scope.cancel()
        finally:
            if self._links.get(peer) is link:
                del self._links[peer]
                self._dispatch(e.PeerLeft(peer))
            await stream.reset()
        if fault is not None and not link.moved:
            raise fault
        return link.moved

    async def _write(self, link: Link, scope: trio.CancelScope) -> None:
        try:
            while True:
                await link.due.wait()
                link.due = trio.Event()
                data, link.outgoing = link.outgoing, bytearray()
                await link.stream.send_all(data)
        except PeerUnreachable as error:
            _log.debug("peer %s: %s", link.stream.peer, error)
            scope.cancel()

    async def _read(self, peer: str, link: Link) -> None:
        """Receive until the stream ends; a peer that breaks the protocol is banned."""
        try:
            with trio.move_on_after(self._limits.hello):
                while not link.asks.greeted:
                    await self._receive(peer, link)
            if not link.asks.greeted:
                raise PeerUnreachable(f"{peer} did not greet within {self._limits.hello:.0f} s")
            while True:
                await self._receive(peer, link)
        except RemoteProtocolError as error:
            self.tally.dropped[peer] = error.message
            self.session.banned.setdefault(peer, error.message)
            self._dispatch(e.PeerBroke(peer, error.message))

    async def _receive(self, peer: str, link: Link) -> None:
        """Take in what comes next."""
        if link.asks.greeted:
            # Also here: one that is dropped while it waits, and comes again, would bring a block each time.
            await self._room(link)
        count = await link.stream.receive_into(link.asks.room(), link.asks.next_room)
        if not count:
            raise PeerUnreachable(f"{peer} ended the stream")
        link.alive = True
        for answer in link.asks.answers_untrusted(count):
            await self._answered(peer, link, answer)

    async def _room(self, link: Link) -> None:
        """Return when little enough is unverified."""
        while self._received.statistics().current_buffer_used > self._limits.unverified:
            link.held_up = True
            await self._taken.park()
        link.held_up = False

    async def _answered(self, peer: str, link: Link, answer: Answer) -> None:
        match answer:
            case Hello(asks, queries):
                self._links[peer] = link
                self._joined.add(peer)
                self._failures.pop(peer, None)
                self.tally.unreachable.pop(peer, None)
                self._dispatch(e.PeerJoined(peer, asks, queries))
            case Arrived(wanted, data):
                self._delivered[peer] = self._delivered.get(peer, 0) + 1
                if self._dispatch(e.BlockReceived(peer, wanted.cid, len(data))):
                    self._received.send_nowait((peer, wanted, data))
                    await self._room(link)
                else:
                    self._buffers.take_back(data)
            case Refused(cids):
                self._dispatch(e.MissingReceived(peer, cids))
            case Holds(part, blocks):
                self._dispatch(e.HoldsReceived(peer, part, blocks))
            case Error(code, text):
                raise PeerUnreachable(f"{peer} ended the stream: {code}: {text}")

    # --- verification -----------------------------------------------------------------------

    async def _verify(self) -> None:
        """Verify and keep what arrived, as many blocks at a time as have come together."""
        while True:
            batch = await self._gather()
            self._taken.unpark_all()
            if self._sink is None:
                raise LocalProtocolError("a block arrived that nothing was to be done with")
            try:
                refused = await trio.to_thread.run_sync(
                    _keep_verified, batch, self._sink, limiter=self._threads
                )
            except OmniError as error:
                self._fail(error)
                return
            for peer, wanted, data in batch:
                if wanted.cid in refused:
                    self._dispatch(e.BlockRefused(peer, wanted.cid))
                    continue
                self._count(peer, wanted.cid, len(data))
                self._dispatch(e.BlockVerified(wanted.cid))
            for _, _, data in batch:
                self._buffers.take_back(data)
            self.progressed()

    async def _gather(self) -> list[_Unverified]:
        """One block at least; some more, if they are on their way."""
        batch = [await self._to_verify.receive()]
        with trio.move_on_after(self._limits.gather_time):
            while len(batch) < self._limits.gather and self.session.outstanding:
                batch.append(await self._to_verify.receive())
        while len(batch) < self._limits.batch:
            try:
                batch.append(self._to_verify.receive_nowait())
            except trio.WouldBlock:
                break
        return batch

    def _count(self, peer: str, cid: CID, size: int) -> None:
        tally = self.tally
        if cid.codec == RAW:
            tally.blocks += 1
            tally.bytes += size
            tally.peers[peer] = tally.peers.get(peer, 0) + size
        else:
            tally.node_bytes += size
            tally.peers.setdefault(peer, 0)


def _keep_verified(batch: Sequence[_Unverified], sink: Sink) -> set[CID]:
    """Give the blocks that match their CIDs to `sink`; the CIDs of the others."""
    good, refused = [], set()
    for _, wanted, data in batch:
        try:
            good.append(Block.verify_untrusted(wanted.cid, data))
        except DigestMismatch:
            refused.add(wanted.cid)
    if good:
        sink(good)
    return refused

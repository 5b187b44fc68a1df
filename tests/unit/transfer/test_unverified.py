"""Blocks between their arrival and the disk: whatever becomes of their link, none is lost and none too many.

The thread that verifies is held by a gate in the sink, so that all this happens in one known order.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
import trio
import trio.testing

from omnistore import dagcbor
from omnistore.block import Block
from omnistore.cid import CID
from omnistore.errors import NoProviders, PeerUnreachable, StoreFull
from omnistore.net.interface import NextRoom, Provider, Stream, StreamServer, spread
from omnistore.transfer.demand import Wanted
from omnistore.transfer.events import WantsAdded
from omnistore.transfer.messages import REQUESTER, Decoder, Deliver, Have, Hello, Holds, Want, encode
from omnistore.transfer.session import Session
from omnistore.transfer.swarm import Swarm, SwarmLimits

BLOCKS = tuple(Block.raw(bytes((number,)) * 1000) for number in range(24))
WANTED = tuple(Wanted(block.cid, len(block)) for block in BLOCKS)
PART = Block.node(dagcbor.encode({})).cid
BATCH = 2
LIMITS = SwarmLimits(
    unverified=2, batch=BATCH, gather=BATCH, gather_time=60, tick=0.01, redial_least=0.01, redial_most=0.01
)
HANG = 10.0
"""Seconds that nothing here takes: what takes them has no end."""


@dataclass(eq=False)
class Peer:
    """Serves blocks, all that were asked for in one piece."""

    peer: str
    lies: frozenset[int] = frozenset()
    """Which blocks it sends wrong bytes for."""
    order: tuple[int, ...] = ()
    """Blocks to send first."""
    gate: trio.Event = field(default_factory=trio.Event)
    """Greets nobody before."""
    better: bool = False
    """A second stream would be over a better connection than the first."""
    joined: int = 0
    sent: list[int] = field(default_factory=list)


@dataclass(eq=False)
class PeerStream:
    """A stream to one."""

    server: Peer
    outgoing: trio.MemorySendChannel[bytes]
    incoming: trio.MemoryReceiveChannel[bytes]
    number: int
    """Of its streams, from 1."""
    decoder: Decoder = field(default_factory=lambda: Decoder(REQUESTER))
    asked: dict[int, int] = field(default_factory=dict)
    """Number of each ask, by block."""

    @property
    def peer(self) -> str:
        return self.server.peer

    @property
    def superseded(self) -> bool:
        return self.server.better and self.number == 1

    async def send_all(self, *data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        out = bytearray()
        for message in self.decoder.feed_untrusted(b"".join(data)):
            match message:
                case Have(parts):
                    for part in parts:
                        out += encode(Holds(part, b"\xff" * (len(BLOCKS) // 8)))
                case Want(first, links):
                    for number, cid in enumerate(links, first):
                        self.asked[next(i for i, block in enumerate(BLOCKS) if block.cid == cid)] = number
        if set(self.server.order) <= self.asked.keys() | set(self.server.sent):
            for index in sorted(self.asked, key=lambda i: (i not in self.server.order, i)):
                payload = bytes(1000) if index in self.server.lies else bytes(BLOCKS[index].data)
                out += encode(Deliver(self.asked.pop(index), payload)) + payload
                self.server.sent.append(index)
        if out:
            self.outgoing.send_nowait(bytes(out))

    async def receive_some(self, max_bytes: int) -> bytes:
        await self.server.gate.wait()
        return await self.incoming.receive()

    async def receive_into(self, room: memoryview, more: NextRoom | None = None) -> int:
        data = await self.receive_some(1 << 20)
        spread(data, room, more)
        return len(data)

    async def receive_exactly(self, count: int) -> bytes:
        raise AssertionError("a requester takes what comes")

    async def aclose(self) -> None:
        pass

    async def reset(self) -> None:
        pass


@dataclass(eq=False)
class Peers:
    """A network of them."""

    peers: dict[str, Peer]
    peer_id = "me"

    async def open_stream(self, provider: Provider, protocol: str) -> Stream:
        await trio.lowlevel.checkpoint()
        peer = self.peers[provider.peer]
        peer.joined += 1
        send, receive = trio.open_memory_channel[bytes](1000)
        send.send_nowait(encode(Hello(1024, 256)))
        return PeerStream(peer, send, receive, peer.joined)

    def addrs(self) -> Sequence[str]:
        return ()

    async def connect(self, addr: str) -> str:
        raise PeerUnreachable(addr)

    def serve(self, protocol: str, server: StreamServer) -> None:
        raise AssertionError("a requester serves nothing")


@dataclass(eq=False)
class Gated:
    """A sink that waits until it may."""

    gate: threading.Event = field(default_factory=threading.Event)
    kept: list[CID] = field(default_factory=list)
    failure: Exception | None = None

    def __call__(self, blocks: Sequence[Block]) -> None:
        assert self.gate.wait(HANG)
        if self.failure is not None:
            raise self.failure
        self.kept += [block.cid for block in blocks]


@dataclass(eq=False)
class Fetching:
    """A fetch of BLOCKS under way."""

    swarm: Swarm
    sink: Gated
    fetch: Callable[[], Awaitable[None]]


@asynccontextmanager
async def fetching(
    *peers: Peer, wanted: int = len(BLOCKS), finite: bool = False, limits: SwarmLimits = LIMITS
) -> AsyncIterator[Fetching]:
    """A swarm of `peers`; its sink is shut."""
    swarm = Swarm(Peers({peer.peer: peer for peer in peers}), Session(lambda: 0.0), limits, finite=finite)
    for peer in peers:
        swarm.add(Provider(peer.peer))
    sink = Gated()

    async def fetch() -> None:
        await swarm.fetch([WantsAdded(PART, WANTED, (1 << wanted) - 1)], sink)

    with trio.fail_after(HANG):
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(swarm.run)
                yield Fetching(swarm, sink, fetch)
                nursery.cancel_scope.cancel()
        finally:
            sink.gate.set()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # what is waited for is inside of what is tested
        await trio.sleep(0.001)
    await trio.testing.wait_all_tasks_blocked()


def open_now(*peers: Peer) -> None:
    for peer in peers:
        peer.gate.set()


def test_a_liar_dropped_while_its_link_waits_leaves_its_last_block_to_be_verified() -> None:
    """The first two are in the thread, one of them a lie; as many wait as may, and the link with one more."""
    liar, honest = Peer("liar", frozenset({1}), (0, 1, 2, 3, 4)), Peer("honest")

    async def main() -> None:
        async with fetching(liar, honest) as under_way, trio.open_nursery() as nursery:
            open_now(liar)
            nursery.start_soon(under_way.fetch)
            await until(lambda: bool(liar.sent))
            await trio.sleep(0.05)
            assert under_way.swarm.tally.dropped == {}
            under_way.sink.gate.set()
            await until(lambda: "liar" in under_way.swarm.tally.dropped)
            open_now(honest)
        assert sorted(under_way.sink.kept) == sorted(block.cid for block in BLOCKS)
        assert 1 in honest.sent
        assert not {0, 2, 3, 4} & set(honest.sent), "kept already: what the liar sent before and after"

    trio.run(main)


def test_a_link_dropped_twice_with_a_block_of_its_own_each_time_loses_neither() -> None:
    flaky = Peer("flaky")

    async def main() -> None:
        async with fetching(flaky) as under_way, trio.open_nursery() as nursery:
            open_now(flaky)
            nursery.start_soon(under_way.fetch)
            for times in (1, 2):
                await until(lambda times=times: flaky.joined == times and under_way.swarm.peers == 1)  # type: ignore[misc]
                await trio.sleep(0.05)
                # As when its connection breaks.
                under_way.swarm._links["flaky"].scope.cancel()
            await until(lambda: flaky.joined == 3)
            under_way.sink.gate.set()
        assert sorted(under_way.sink.kept) == sorted(block.cid for block in BLOCKS)

    trio.run(main)


def test_no_more_is_received_than_may_wait_however_often_a_peer_comes_again() -> None:
    peers = [Peer(f"peer{number}") for number in range(3)]

    async def main() -> None:
        async with fetching(*peers) as under_way, trio.open_nursery() as nursery:
            open_now(*peers)
            nursery.start_soon(under_way.fetch)
            for times in range(1, 8):
                await until(lambda times=times: all(peer.joined >= times for peer in peers))  # type: ignore[misc]
                await trio.sleep(0.03)
                for link in list(under_way.swarm._links.values()):
                    link.scope.cancel()
            waiting = under_way.swarm._received.statistics().current_buffer_used
            assert waiting <= LIMITS.unverified + len(peers)
            under_way.sink.gate.set()
        assert sorted(under_way.sink.kept) == sorted(block.cid for block in BLOCKS)

    trio.run(main)


@pytest.mark.parametrize("failure", [StoreFull("the disk is full"), OSError(5, "Input/output error")])
def test_a_disk_that_fails_while_links_wait_ends_the_fetch(failure: Exception) -> None:
    peer = Peer("peer")

    async def main() -> None:
        async with fetching(peer) as under_way:
            under_way.sink.failure = failure
            open_now(peer)

            async def open_late() -> None:
                await until(lambda: bool(peer.sent))
                await trio.sleep(0.05)
                under_way.sink.gate.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(open_late)
                await under_way.fetch()

    with pytest.RaisesGroup(type(failure), flatten_subgroups=True, allow_unwrapped=True):
        trio.run(main)


def test_a_fetch_cancelled_while_links_wait_ends_when_the_thread_does() -> None:
    peer = Peer("peer")

    async def main() -> None:
        async with fetching(peer) as under_way, trio.open_nursery() as nursery:
            open_now(peer)
            nursery.start_soon(under_way.fetch)
            await until(lambda: bool(peer.sent))
            await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
            trio.lowlevel.current_trio_token().run_sync_soon(under_way.sink.gate.set)
        # Those in the thread were written; nothing else was.
        assert sorted(under_way.sink.kept) == sorted(BLOCKS[number].cid for number in peer.sent[:BATCH])

    trio.run(main)


def test_a_liar_that_is_all_there_is_ends_the_fetch_with_what_it_got_right() -> None:
    liar = Peer("liar", frozenset({1}), (0, 1, 2, 3, 4))

    async def main() -> None:
        async with fetching(liar, finite=True) as under_way:
            open_now(liar)
            under_way.sink.gate.set()
            with pytest.raises(NoProviders, match="liar: sent bytes that do not match"):
                await under_way.fetch()

    trio.run(main)


class Late(Peers):
    """The first three dials of anybody fail."""

    async def open_stream(self, provider: Provider, protocol: str) -> Stream:
        self.peers[provider.peer].joined += 1
        if self.peers[provider.peer].joined <= 3:
            raise PeerUnreachable("not there yet")
        return await super().open_stream(provider, protocol)


def test_a_candidate_that_made_room_and_is_found_again_is_joined_once() -> None:
    """Its first task is still asleep then."""
    late, other = Peer("late"), Peer("other")

    async def main() -> None:
        limits = SwarmLimits(candidates=1, redial_least=1, redial_most=1)
        swarm = Swarm(Late({"late": late, "other": other}), Session(lambda: 0.0), limits)
        swarm.add(Provider("late"))
        open_now(late)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(swarm.run)
            await trio.sleep(2.5)
            assert late.joined == 3
            swarm.session.banned["other"] = "so that it makes room too"
            swarm.add(Provider("other"))
            swarm.add(Provider("late"))
            await trio.sleep(5)
            assert swarm.peers == 1
            # Somebody who came late is hoped for like anybody: found again, it need not be.
            assert late.joined == 5
            assert swarm.settled() == ["late"]
            assert not swarm._hopeless("late")
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_peer_with_a_better_connection_is_asked_over_that_at_once() -> None:
    """And nothing is lost by it, nor counted against the peer."""
    # Sends nothing over its first stream: it waits to be asked for what is not wanted.
    peer = Peer("moving", order=(len(BLOCKS),))

    async def main() -> None:
        # One that went away would not be dialled again within this test.
        limits = replace(LIMITS, redial_least=10 * HANG, redial_most=10 * HANG)
        async with fetching(peer, limits=limits) as under_way, trio.open_nursery() as nursery:
            open_now(peer)
            nursery.start_soon(under_way.fetch)
            await until(lambda: peer.joined == 1 and under_way.swarm.peers == 1)
            peer.order, peer.better = (), True
            await until(lambda: peer.joined == 2)
            under_way.sink.gate.set()
        assert peer.joined == 2
        assert sorted(under_way.sink.kept) == sorted(block.cid for block in BLOCKS)
        assert under_way.swarm.tally.dropped == under_way.swarm.tally.unreachable == {}

    trio.run(main)

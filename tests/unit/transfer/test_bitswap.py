"""Bitswap 1.2: our bytes against another implementation's protobuf, and a server on a virtual network."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from omnistore import varint
from omnistore.block import Block
from omnistore.cid import CID
from omnistore.errors import PeerUnreachable, RemoteProtocolError
from omnistore.keys import PrivateKey
from omnistore.net.interface import Provider, Stream
from omnistore.store.memory import MemoryStore
from omnistore.testing.network import LinkModel, VirtualNetwork, VirtualNode
from omnistore.testing.seeding import seeded
from omnistore.testing.tiny_gguf import tiny_model
from omnistore.transfer.bitswap import (
    MAX_MESSAGE,
    MAX_WANTS,
    PROTOCOL,
    Entry,
    Messages,
    Wantlist,
    Wants,
    block_message,
    presence_message,
    wantlist_untrusted,
)
from omnistore.transfer.bitswap_server import PEERS, serve_bitswap
from omnistore.transfer.pacing import Pacer
from omnistore.transfer.server import Served

KEY = PrivateKey(bytes(32))
UNKNOWN = CID.of_digest(0x55, bytes(32))
Model = tuple[MemoryStore, CID]


@pytest.fixture(scope="module")
def pb() -> Any:
    """Bitswap's messages by protobuf itself, as the libp2p library ships them."""
    from libp2p.bitswap.pb import bitswap_pb2

    return bitswap_pb2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(tiny_model(3, width=128).build())
    return seeded(path, KEY)


def wants(pb: Any, *cids: CID, have: bool = False, dont_have: bool = True, full: bool = False) -> bytes:
    """A wantlist message, its length included."""
    entry = pb.Message.Wantlist.Entry
    entries = [
        entry(block=cid.binary, priority=-1, wantType=int(have), sendDontHave=dont_have) for cid in cids
    ]
    data = pb.Message(wantlist=pb.Message.Wantlist(entries=entries, full=full)).SerializeToString()
    return varint.encode(len(data)) + data


# --- bytes ----------------------------------------------------------------------------------


def test_a_wantlist_of_another_implementation_is_understood(pb: Any) -> None:
    data = wants(pb, UNKNOWN, have=True, full=True)
    (message,) = Messages().feed_untrusted(data)
    assert wantlist_untrusted(message) == Wantlist((Entry(UNKNOWN.binary, False, True, True),), True)
    cancel = pb.Message.Wantlist.Entry(block=b"x", cancel=True)
    message = pb.Message(wantlist=pb.Message.Wantlist(entries=[cancel]), pendingBytes=7).SerializeToString()
    assert wantlist_untrusted(message) == Wantlist((Entry(b"x", cancel=True),), False)


def test_what_we_send_is_understood_by_another_implementation(pb: Any) -> None:
    block = Block.raw(b"weights" * 50_000)
    size, start = varint.decode(block_message(block)) or (0, 0)
    message = pb.Message.FromString(block_message(block)[start:])
    assert size == len(block_message(block)) - start
    assert [(p.prefix + block.cid.digest, p.data) for p in message.payload] == [
        (block.cid.binary, block.data)
    ]
    message = pb.Message.FromString(presence_message([b"a"], [b"b"])[1:])
    assert [(p.cid, p.type) for p in message.blockPresences] == [(b"a", 0), (b"b", 1)]


def test_messages_come_in_any_pieces(pb: Any) -> None:
    data = wants(pb, UNKNOWN) + wants(pb, UNKNOWN, have=True)
    messages = Messages()
    found = [message for byte in data for message in messages.feed_untrusted(bytes((byte,)))]
    assert len(found) == 2


def test_blocks_that_nobody_asked_for_are_passed_over(pb: Any) -> None:
    message = pb.Message(payload=[pb.Message.Block(prefix=b"p", data=b"d")], blocks=[b"x"])
    assert wantlist_untrusted(message.SerializeToString()) is None


@pytest.mark.parametrize(
    "data",
    [varint.encode(MAX_MESSAGE + 1), b"\xff" * 12],
    ids=["too-long", "endless-length"],
)
def test_lengths_that_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Messages().feed_untrusted(data)


@pytest.mark.parametrize(
    "data",
    [b"\x0a\x05\x00", b"\x0a", b"\x08\x01", b"\x0b", b"\x0a\x02\x08\x80", b"\x0a\x02\x0a\x09", b"\xff" * 11],
)
def test_messages_that_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        wantlist_untrusted(data)


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    for parse in (wantlist_untrusted, Messages().feed_untrusted):
        try:
            parse(data)
        except RemoteProtocolError:
            continue


@given(st.integers(0, 2**63 - 1), st.binary(max_size=3))
def test_varints(number: int, behind: bytes) -> None:
    data = varint.encode(number)
    assert varint.decode(data + behind) == (number, len(data))
    assert varint.decode(data[:-1]) is None


# --- wants ----------------------------------------------------------------------------------


def test_what_is_wanted_is_bounded_cancelled_and_replaced() -> None:
    asked = Wants()
    asked.receive(Wantlist(tuple(Entry(bytes((n % 256, n // 256))) for n in range(MAX_WANTS + 10)), False))
    assert len(asked) == MAX_WANTS
    asked.receive(Wantlist((Entry(b"\0\0", cancel=True),), False))
    assert len(asked) == MAX_WANTS - 1
    asked.receive(Wantlist((Entry(b"a", have=True), Entry(b"b")), True))
    # A block that is wanted is not downgraded, a presence that is wanted becomes a block.
    asked.receive(Wantlist((Entry(b"b", have=True), Entry(b"a")), False))
    assert asked.presences() == []
    assert [asked.block(), asked.block(), asked.block()] == [Entry(b"a"), Entry(b"b"), None]


# --- a server -------------------------------------------------------------------------------


class Asker:
    """A Bitswap client on a virtual network: says what it wants, collects what comes."""

    def __init__(self, node: VirtualNode, pb: Any) -> None:
        self.node, self.pb = node, pb
        self.blocks: dict[bytes, bytes] = {}
        self.held: dict[bytes, int] = {}
        self.news = trio.Event()
        node.serve(PROTOCOL, self._receive)

    async def _receive(self, stream: Stream) -> None:
        buffer = b""
        while data := await stream.receive_some(1 << 20):
            buffer += data
            while (head := varint.decode(buffer)) and len(buffer) >= sum(head):
                message = self.pb.Message.FromString(buffer[head[1] : sum(head)])
                buffer = buffer[sum(head) :]
                for payload in message.payload:
                    block = Block.raw(payload.data)
                    self.blocks[payload.prefix + block.cid.digest] = payload.data
                self.held |= {presence.cid: presence.type for presence in message.blockPresences}
                self.news.set()

    async def ask(self, data: bytes) -> None:
        stream = await self.node.open_stream(Provider("seed"), PROTOCOL)
        await stream.send_all(data)
        await stream.aclose()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(20):
            while not condition():
                self.news = trio.Event()
                await self.news.wait()


def virtually(
    store: MemoryStore, pb: Any, test: Callable[[Asker, VirtualNetwork], Awaitable[None]]
) -> list[Served]:
    events: list[Served] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            network = VirtualNetwork(nursery, random.Random(1), LinkModel(bandwidth=1e9))

            async def serve(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
                seed = network.node("seed")
                await serve_bitswap(seed, store, Pacer(None), events=events.append, task_status=task_status)

            await nursery.start(serve)
            await test(Asker(network.node("asker"), pb), network)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.02))
    return events


def test_a_part_and_its_blocks(pb: Any, model: Model) -> None:
    seed, cid = model
    ref = seed.model(cid).manifest.parts[-1]
    links = list(dict.fromkeys(block for block, _ in seed.model(cid).parts[ref.key].links()))

    async def test(asker: Asker, network: VirtualNetwork) -> None:
        await asker.ask(wants(pb, ref.cid, UNKNOWN, have=True))
        await asker.until(lambda: len(asker.held) == 2)
        assert asker.held == {ref.cid.binary: 0, UNKNOWN.binary: 1}
        await asker.ask(wants(pb, ref.cid, *links, UNKNOWN))
        await asker.until(lambda: len(asker.blocks) == 1 + len(links))
        assert all(asker.blocks[one.binary] == seed.read(one).data for one in [ref.cid, *links])

    events = virtually(seed, pb, test)
    assert sum(event.blocks for event in events) <= 1 + len(links)


def test_what_is_not_held_is_said_when_asked_for(pb: Any, model: Model) -> None:
    async def test(asker: Asker, network: VirtualNetwork) -> None:
        await asker.ask(wants(pb, UNKNOWN, dont_have=False) + wants(pb, model[1], have=True))
        await asker.until(lambda: bool(asker.held))
        assert asker.held == {model[1].binary: 0}
        await asker.ask(wants(pb, UNKNOWN))
        await asker.until(lambda: len(asker.held) == 2)
        assert asker.held[UNKNOWN.binary] == 1 and not asker.blocks

    virtually(model[0], pb, test)


def test_garbage_and_crowds_do_not_hurt_others(pb: Any, model: Model) -> None:
    seed, cid = model

    async def test(asker: Asker, network: VirtualNetwork) -> None:
        await asker.ask(b"\xff" * 100)
        crowd = []
        for number in range(PEERS + 2):
            stream = await network.node(f"mute-{number}").open_stream(Provider("seed"), PROTOCOL)
            crowd.append(stream)
        with pytest.raises(PeerUnreachable):
            await crowd[-1].receive_exactly(1)
        for stream in crowd:
            await stream.reset()
        await asker.ask(wants(pb, cid))
        await asker.until(lambda: cid.binary in asker.blocks)

    virtually(seed, pb, test)

"""The DHT over real sockets: copies that are counted exist, and no answer hurts the asker."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from omnistore.cid import CID, RAW
from omnistore.dht.records import provider_key
from omnistore.dht.service import DHTService
from omnistore.dht.values import MAX_VALUE
from omnistore.errors import MalformedManifest, PeerUnreachable, RemoteProtocolError
from omnistore.keys import PrivateKey
from omnistore.net.interface import Provider, Stream
from omnistore.net.kad_protocol import PROTOCOL
from omnistore.net.kademlia import MAX_KEYS, KademliaNode, open_kademlia
from omnistore.net.libp2p import Libp2pNetwork, open_network


def some_cid() -> CID:
    return CID.of_digest(RAW, secrets.token_bytes(32))


class Numbers:
    """Values are decimal numbers, and the largest is right."""

    def check_untrusted(self, key: bytes, value: bytes) -> None:
        if not value.isdigit():
            raise MalformedManifest(f"{value!r} is not a number")

    def rank(self, key: bytes, value: bytes) -> int:
        return int(value)


@asynccontextmanager
async def member(*, server: bool = True) -> AsyncIterator[KademliaNode]:
    key = PrivateKey(secrets.token_bytes(32))
    async with (
        open_network(key, ["/ip4/127.0.0.1/tcp/0"]) as network,
        open_kademlia(network, server=server, namespaces={"numbers": Numbers()}) as node,
    ):
        yield node


async def join(node: KademliaNode, other: KademliaNode) -> None:
    peer = await node.network.connect(other.network.addrs()[0])
    assert await node.meet(peer)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110  # the library has no event for it
            await trio.sleep(0.02)


def table(node: KademliaNode) -> set[str]:
    return {peer.peer for peer in node.start_peers(b"any")}


@pytest.mark.trio
async def test_every_announcement_counted_is_there() -> None:
    """Forty in a row from one peer: the library's own limits would drop most of them in silence."""
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(member()) for _ in range(8)]
        for node in nodes[1:]:
            await join(node, nodes[0])
        await until(lambda: len(table(nodes[0])) == 7)
        service = DHTService(nodes[1])
        cids = [some_cid() for _ in range(40)]
        copies: dict[CID, int] = {}

        async def provide(some: list[CID]) -> None:
            for cid in some:
                copies[cid] = await service.provide(cid)

        async with trio.open_nursery() as nursery:
            for start in range(6):
                nursery.start_soon(provide, cids[start::6])
        holders = {cid: sum(bool(node.own_records(provider_key(cid))) for node in nodes) - 1 for cid in cids}
        assert copies == holders
        assert set(copies.values()) == {7}
        found = await DHTService(nodes[7]).find_providers(cids[0])
        assert [provider.peer for provider in found] == [nodes[1].peer_id]


@pytest.mark.trio
async def test_a_find_caches_nothing() -> None:
    async with member() as middle, member() as holder, member() as seeker:
        await join(holder, middle)
        await join(seeker, middle)
        cid = some_cid()
        await DHTService(holder).provide(cid)
        assert len(await DHTService(seeker).find_providers(cid)) == 1
        key = provider_key(cid)
        for node in (middle, holder, seeker):
            node.dht.provider_store.providers.pop(key, None)
        assert await DHTService(seeker).find_providers(cid) == []


@pytest.mark.trio
async def test_only_servers_enter_the_routing_table() -> None:
    async with member() as middle, member() as server, member(server=False) as client:
        await join(server, middle)
        await join(client, middle)
        await DHTService(client).find_providers(some_cid())
        await until(lambda: server.peer_id in table(middle))
        assert client.peer_id not in table(middle)
        assert not await middle.meet(client.peer_id)


@pytest.mark.trio
async def test_whoever_connects_is_met_by_both_sides() -> None:
    async with member() as one, member() as other:
        seen = trio.Event()
        one.on_peer(seen.set)
        await other.network.connect(one.network.addrs()[0])
        with trio.fail_after(10):
            await seen.wait()
        await until(lambda: one.peer_id in table(other) and other.peer_id in table(one))


@pytest.mark.trio
async def test_a_newcomer_learns_of_others_and_forgets_who_is_gone() -> None:
    async with member() as middle, member() as newcomer:
        async with member() as passing:
            await join(passing, middle)
            await join(newcomer, middle)
            await newcomer.refresh()
            assert table(newcomer) == {middle.peer_id, passing.peer_id}
        await until(lambda: passing.peer_id not in newcomer.network.peers())
        assert await DHTService(newcomer).find_providers(some_cid()) == []
        assert table(newcomer) == {middle.peer_id}


@pytest.mark.trio
async def test_records_for_others_are_bounded() -> None:
    async with member() as keeper, member() as sender:
        await join(sender, keeper)
        store = keeper.dht.provider_store
        store.providers.update({n.to_bytes(4, "big"): {} for n in range(MAX_KEYS)})
        assert await DHTService(sender).provide(some_cid()) == 0
        store.providers.popitem()
        assert await DHTService(sender).provide(some_cid()) == 1


@pytest.mark.trio
async def test_values_reach_every_node_and_old_ones_never_win() -> None:
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(member()) for _ in range(4)]
        for node in nodes[1:]:
            await join(node, nodes[0])
        await until(lambda: len(table(nodes[0])) == 3)
        one, other, third = (DHTService(node) for node in nodes[:3])
        assert await one.put_value(b"/numbers/a", b"7") == 3
        assert await other.get_values(b"/numbers/a") == [b"7"]
        # Once more the same: kept for another day, where the library would refuse it.
        before = {node.dht.value_store.get(b"/numbers/a").timeReceived for node in nodes[1:]}
        assert await one.put_value(b"/numbers/a", b"7") == 3
        after = {node.dht.value_store.get(b"/numbers/a").timeReceived for node in nodes[1:]}
        assert before.isdisjoint(after)
        assert await third.put_value(b"/numbers/a", b"8") == 3
        assert await other.put_value(b"/numbers/a", b"7") == 0
        assert [node.own_value(b"/numbers/a") for node in nodes] == [b"8"] * 4
        assert await other.get_values(b"/numbers/a") == [b"8"]
        assert await other.get_values(b"/numbers/b") == []


JUNK = {
    "no number": (b"/numbers/a", b"seven"),
    "empty": (b"/numbers/a", b""),
    "no namespace": (b"numbers", b"7"),
    "nothing in the namespace": (b"/numbers/", b"7"),
    "another namespace": (b"/letters/a", b"7"),
    "not text": (b"/numbers/\xff", b"7"),
    "long key": (b"/numbers/" + b"a" * 200, b"7"),
    "long value": (b"/numbers/a", b"7" * (MAX_VALUE + 1)),
}


@pytest.mark.trio
@pytest.mark.parametrize(("key", "value"), JUNK.values(), ids=JUNK)
async def test_junk_is_refused_where_it_would_be_kept(key: bytes, value: bytes) -> None:
    async with member() as keeper, member() as sender:
        await join(sender, keeper)
        # Past the checks on the sender's own side.
        await sender.put_value(Provider(keeper.peer_id), key, value)
        assert not keeper.dht.value_store.store
        with pytest.raises(RemoteProtocolError):
            await DHTService(sender).put_value(key, value)


@pytest.mark.trio
async def test_junk_that_a_liar_answers_is_left_out() -> None:
    async with member() as liar, member() as seeker:
        await join(seeker, liar)
        liar.dht.value_store.put(b"/numbers/a", b"seven")
        assert await DHTService(seeker).get_values(b"/numbers/a") == []
        # Nor does what it keeps hide a true one.
        assert await DHTService(seeker).put_value(b"/numbers/a", b"7") in (0, 1)
        assert await DHTService(seeker).get_values(b"/numbers/a") == [b"7"]


async def garbage(stream: Stream) -> None:
    await stream.send_all(b"\x05\xff\xff\xff\xff\xff")


async def endless_length(stream: Stream) -> None:
    await stream.send_all(b"\xff" * 20)


async def huge_length(stream: Stream) -> None:
    await stream.send_all(b"\xff\xff\xff\x7f")


async def wrong_type(stream: Stream) -> None:
    await stream.send_all(b"\x02\x08\x05")


async def bad_peer(stream: Stream) -> None:
    # Message{type: GET_PROVIDERS, providerPeers: [{id: "x"}]}
    await stream.send_all(b"\x07\x08\x03\x4a\x03\x0a\x01x")


async def cut_short(stream: Stream) -> None:
    await stream.send_all(b"\x10\x08\x03")


async def nothing(stream: Stream) -> None:
    await stream.receive_exactly(1)


LIARS = [garbage, endless_length, huge_length, wrong_type, bad_peer, cut_short, nothing]


@pytest.mark.trio
@pytest.mark.parametrize("answer", LIARS, ids=lambda server: server.__name__)
async def test_a_bad_answer_is_one_error(answer: Callable[[Stream], None]) -> None:
    key = PrivateKey(secrets.token_bytes(32))
    async with member() as asker, open_network(key, ["/ip4/127.0.0.1/tcp/0"]) as liar:
        liar.serve(PROTOCOL, answer)  # type: ignore[arg-type]  # parametrize loses the coroutine's type
        peer = Provider(await asker.network.connect(liar.addrs()[0]))
        with pytest.raises((RemoteProtocolError, PeerUnreachable)), trio.fail_after(5):
            await asker.ask_providers(peer, b"key")


@pytest.mark.trio
async def test_garbage_sent_to_a_node_leaves_it_answering() -> None:
    async with member() as node, member() as honest:
        attacker_key = PrivateKey(secrets.token_bytes(32))
        async with open_network(attacker_key, ["/ip4/127.0.0.1/tcp/0"]) as attacker:
            await attack(attacker, node.network.addrs()[0])
            await join(honest, node)
            assert await DHTService(honest).provide(some_cid()) == 1


async def attack(attacker: Libp2pNetwork, addr: str) -> None:
    peer = Provider(await attacker.connect(addr))
    for data in (
        b"\xff" * 100,
        b"\x05hello",
        b"\x02\x08\x02",
        b"\x04\x08\x02\x12\0",
        secrets.token_bytes(10_000),
        b"",
    ):
        stream = await attacker.open_stream(peer, PROTOCOL)
        try:
            await stream.send_all(data)
        except PeerUnreachable:
            continue
        await stream.aclose()

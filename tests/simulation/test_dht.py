"""The DHT service among hundreds of simulated nodes, with churn, liars and silence; virtual time."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from omnistore.cid import CID, RAW
from omnistore.dht.interface import Answer
from omnistore.dht.lookup import MAX_KNOWN, PARALLEL, WIDTH, Lookup
from omnistore.dht.records import peer_id_bytes_untrusted, provider_key
from omnistore.dht.service import ASK_DEADLINE, FIND_GRACE, WALK_DEADLINE, DHTService
from omnistore.errors import PeerUnreachable, RemoteProtocolError
from omnistore.keys import base58
from omnistore.net.interface import Provider

EXPIRY = 48 * 3600.0


@dataclass
class SimulatedNode:
    """A Kademlia node that knows some others, and the records left with it."""

    world: World
    peer_id: str
    knows: list[str] = field(default_factory=list)
    records: dict[bytes, dict[str, float]] = field(default_factory=dict)
    """When each provider of a key was last announced."""
    values: dict[bytes, bytes] = field(default_factory=dict)
    """Of which the largest is right."""
    delay: float = 0.05
    dead: bool = False
    """Refuses at once."""
    silent: bool = False
    """Never answers."""
    lies: bool = False
    """Names itself and peers that do not exist for every key."""
    forgetful: int = 0
    """Announcements dropped, from the first, while their sender thinks them kept."""
    asked: int = 0
    callbacks: list[Callable[[], None]] = field(default_factory=list)

    def start_peers(self, key: bytes) -> Sequence[Provider]:
        return [Provider(peer) for peer in closest(key, self.knows)[:WIDTH]]

    def own_records(self, key: bytes) -> Sequence[Provider]:
        oldest = trio.current_time() - EXPIRY
        return [Provider(peer) for peer, when in self.records.get(key, {}).items() if when > oldest]

    def keep_own(self, key: bytes) -> None:
        self.records.setdefault(key, {})[self.peer_id] = float("inf")

    def forget_own(self, key: bytes) -> None:
        self.records.get(key, {}).pop(self.peer_id, None)

    def own_value(self, key: bytes) -> bytes | None:
        return self.values.get(key)

    def keep_value(self, key: bytes, value: bytes) -> None:
        self.values[key] = max(value, self.values.get(key, b""))

    def sort_values(self, key: bytes, values: Iterable[bytes]) -> Sequence[bytes]:
        return sorted(set(values), reverse=True)

    async def ask_value(self, peer: Provider, key: bytes) -> Answer:
        other = await self.world.reach(peer.peer)
        return Answer((), other.start_peers(key), other.own_value(key))

    async def put_value(self, peer: Provider, key: bytes, value: bytes) -> None:
        (await self.world.reach(peer.peer)).keep_value(key, value)

    def drop_peer(self, peer: str) -> None:
        if peer in self.knows:
            self.knows.remove(peer)

    def on_peer(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    async def ask_providers(self, peer: Provider, key: bytes) -> Answer:
        other = await self.world.reach(peer.peer)
        other.asked += 1
        if other.lies:
            ghosts = [Provider(self.world.fresh_id()) for _ in range(60)]
            return Answer([Provider(other.peer_id)], ghosts)
        return Answer(other.own_records(key), other.start_peers(key))

    async def add_provider(self, peer: Provider, key: bytes) -> None:
        other = await self.world.reach(peer.peer)
        if other.forgetful:
            other.forgetful -= 1
        else:
            other.records.setdefault(key, {})[self.peer_id] = trio.current_time()


class World:
    def __init__(self, seed: int, count: int) -> None:
        self.rng = random.Random(seed)
        self.nodes: dict[str, SimulatedNode] = {}
        for _ in range(count):
            node = SimulatedNode(self, self.fresh_id())
            self.nodes[node.peer_id] = node
        names = list(self.nodes)
        for node in self.nodes.values():
            # What Kademlia's buckets come to: all close neighbours, and some of everybody.
            others = [name for name in names if name != node.peer_id]
            near = closest(peer_id_bytes_untrusted(node.peer_id), others)[:WIDTH]
            node.knows = list(dict.fromkeys([*near, *self.rng.sample(others, min(30, len(others)))]))

    def fresh_id(self) -> str:
        return base58(bytes((0x12, 32)) + self.rng.randbytes(32))

    async def reach(self, peer: str) -> SimulatedNode:
        node = self.nodes.get(peer)
        if node is None or node.dead:
            raise PeerUnreachable(f"{peer} is gone")
        await trio.sleep(float("inf") if node.silent else node.delay)
        return node

    def refresh_tables(self) -> None:
        """What every node does now and then: forget whoever is gone."""
        for node in self.nodes.values():
            node.knows = [name for name in node.knows if not self.nodes[name].dead]

    def service(self, index: int) -> DHTService:
        return DHTService(list(self.nodes.values())[index])

    def true_closest(self, key: bytes, without: str) -> list[str]:
        alive = [name for name, node in self.nodes.items() if not (node.dead or node.silent)]
        return closest(key, [name for name in alive if name != without])[:WIDTH]


def closest(key: bytes, peers: Iterable[str]) -> list[str]:
    here = int.from_bytes(hashlib.sha256(key).digest(), "big")
    return sorted(peers, key=lambda peer: here ^ _position(peer))


@functools.cache
def _position(peer: str) -> int:
    """Where a peer stands: what `distance` computes, once."""
    return int.from_bytes(hashlib.sha256(peer_id_bytes_untrusted(peer)).digest(), "big")


def some_cid(number: int) -> CID:
    return CID.of_digest(RAW, number.to_bytes(32, "big"))


@pytest.mark.trio
@pytest.mark.parametrize("seed", range(5))
async def test_provides_reach_the_closest_peers_and_are_found_from_anywhere(
    seed: int, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(seed, 200)
    cid = some_cid(seed)
    assert await world.service(0).provide(cid) == WIDTH
    holders = world.true_closest(provider_key(cid), without=world.service(0).node.peer_id)
    assert all(world.nodes[name].own_records(provider_key(cid)) for name in holders)
    for index in (1, 50, 199):
        found = await world.service(index).find_providers(cid)
        assert [provider.peer for provider in found] == [world.service(0).node.peer_id]
    assert await world.service(7).find_providers(some_cid(99)) == []


@pytest.mark.trio
@pytest.mark.parametrize("seed", range(5))
async def test_half_of_the_network_being_gone_is_survived(
    seed: int, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(seed, 200)
    cid = some_cid(seed)
    service = world.service(0)
    await service.provide(cid)
    others = [node for name, node in world.nodes.items() if name != service.node.peer_id]
    for node in world.rng.sample(others, 100):
        node.dead, node.silent = (True, False) if world.rng.random() < 0.5 else (False, True)
    finder = next(node for node in others if not (node.dead or node.silent))
    before = trio.current_time()
    found = await DHTService(finder).find_providers(cid)
    assert [provider.peer for provider in found] == [service.node.peer_id]
    assert trio.current_time() - before <= 2 * ASK_DEADLINE + FIND_GRACE + 1
    assert await service.provide(cid) >= WIDTH // 2
    assert trio.current_time() - before <= 3 * WALK_DEADLINE


@pytest.mark.trio
async def test_liars_neither_exhaust_a_lookup_nor_hide_the_truth(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World(3, 100)
    cid = some_cid(3)
    service = world.service(0)
    await service.provide(cid)
    for node in world.rng.sample(list(world.nodes.values())[2:], 20):
        node.lies = True
    with trio.fail_after(2 * WALK_DEADLINE):
        found = await world.service(1).find_providers(cid, limit=100)
    assert service.node.peer_id in {provider.peer for provider in found}
    # Once by each lookup, and once or twice by whoever confirms an announcement.
    assert all(node.asked <= 4 for node in world.nodes.values())


@pytest.mark.trio
async def test_announcements_that_got_lost_are_sent_again_and_never_counted(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World(4, 30)
    for number, node in enumerate(world.nodes.values()):
        node.forgetful = number % 3
    cid = some_cid(4)
    confirmed = await world.service(0).provide(cid)
    key = provider_key(cid)
    holders = [node for node in world.nodes.values() if node.own_records(key)]
    assert confirmed == len(holders) - 1 < WIDTH  # but one: the announcer keeps its own


@pytest.mark.trio
async def test_a_node_alone_announces_nothing_until_somebody_appears(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World(5, 2)
    node, other = world.nodes.values()
    node.knows = []
    log: list[tuple[CID, int]] = []
    service = DHTService(node, on_provided=lambda cid, copies: log.append((cid, copies)))
    cids = [some_cid(n) for n in range(20)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        service.hold(cids)
        await trio.sleep(3)
        assert {copies for _, copies in log} == {0}
        assert all(node.own_records(provider_key(cid)) for cid in cids)
        log.clear()
        node.knows = [other.peer_id]
        for callback in node.callbacks:
            callback()
        await trio.sleep(5)
        assert sorted(log) == [(cid, 1) for cid in cids]
        service.hold(cids[:5])
        await trio.sleep(1)
        assert [bool(node.own_records(provider_key(cid))) for cid in cids] == [True] * 5 + [False] * 15
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_records_outlive_the_peers_that_kept_them(autojump_clock: trio.testing.MockClock) -> None:
    """Every holder of a record goes; a day later it is back at those who are closest now."""
    world = World(6, 60)
    node = next(iter(world.nodes.values()))
    service = DHTService(node)
    cid = some_cid(6)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        service.hold([cid])
        await trio.sleep(60)
        for name in world.true_closest(provider_key(cid), without=node.peer_id):
            world.nodes[name].dead = True
        world.refresh_tables()
        await trio.sleep(24 * 3600)
        nursery.cancel_scope.cancel()
    key = provider_key(cid)
    assert all(world.nodes[name].own_records(key) for name in world.true_closest(key, node.peer_id))


def test_a_lookup_asks_a_bounded_number_at_once_and_remembers_a_bounded_number() -> None:
    world = World(7, 0)
    lookup = Lookup(b"key", world.fresh_id())
    lookup.learn(Provider(world.fresh_id()) for _ in range(5 * MAX_KNOWN))
    first = lookup.next_peers()
    assert len(first) == PARALLEL
    assert lookup.next_peers() == []
    assert not lookup.done
    lookup.failed(first[0].peer)
    first = [*first, *lookup.next_peers()]
    assert len(first) == PARALLEL + 1
    asked = {peer.peer for peer in first}
    for peer in first:
        lookup.failed(peer.peer)
    while not lookup.done:
        for peer in lookup.next_peers():
            assert peer.peer not in asked
            asked.add(peer.peer)
            lookup.failed(peer.peer)
    assert len(asked) < MAX_KNOWN
    assert lookup.closest() == []


def test_a_lookup_never_asks_us_and_refuses_ids_that_are_none() -> None:
    world = World(8, 0)
    us = world.fresh_id()
    lookup = Lookup(b"key", us)
    lookup.learn([Provider(us)])
    assert lookup.done
    with pytest.raises(RemoteProtocolError):
        lookup.learn([Provider("nonsense")])


@pytest.mark.trio
@pytest.mark.parametrize("seed", range(3))
async def test_the_newest_value_is_found_wherever_old_ones_linger(
    seed: int, autojump_clock: trio.testing.MockClock
) -> None:
    world = World(seed, 100)
    key = b"/test/name"
    assert await world.service(0).put_value(key, b"1") == WIDTH
    holders = world.true_closest(key, without=world.service(0).node.peer_id)
    gone = [world.nodes[name] for name in holders[: WIDTH - 1]]
    for node in gone:
        node.silent = True
    assert await world.service(1).put_value(key, b"2") == WIDTH
    for node in gone:
        node.silent = False
    assert await world.service(2).get_values(key) == [b"2", b"1"]
    # An old one changes nothing, and says so.
    assert await world.service(3).put_value(key, b"1") < WIDTH
    assert (await world.service(4).get_values(key))[0] == b"2"
    assert await world.service(4).get_values(b"/test/other") == []


@pytest.mark.trio
async def test_peers_known_to_be_dead_take_no_place_in_what_is_found(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World(9, 60)
    cid = some_cid(9)
    providers = [await _provided(world, index, cid) for index in range(30)]
    seeker = world.service(59)
    found = [provider.peer for provider in await seeker.find_providers(cid)]
    assert len(found) == len(set(found)) == 20
    rest = [provider.peer for provider in await seeker.find_providers(cid, skip=found)]
    assert sorted(rest) == sorted(set(providers) - set(found))
    assert await seeker.find_providers(cid, skip=providers) == []


async def _provided(world: World, index: int, cid: CID) -> str:
    service = world.service(index)
    await service.provide(cid)
    return service.node.peer_id


async def keep_and_lose(count: int, peers: int) -> tuple[float, int]:
    """Hold `count` keys for three days while peers come and go; the seconds of the first round, the
    announcements in all."""
    world = World(10, peers)
    node = next(iter(world.nodes.values()))
    log: list[tuple[float, int]] = []
    service = DHTService(node, on_provided=lambda cid, copies: log.append((trio.current_time(), copies)))
    cids = [some_cid(number) for number in range(count)]
    started = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service.run)
        service.hold(cids)
        for hour in range(72):
            await trio.sleep(3600)
            other = world.rng.choice(list(world.nodes.values())[1:])
            other.dead = not other.dead
            if hour % 6 == 5:
                world.refresh_tables()
        nursery.cancel_scope.cancel()
    # Longer than any record of the first round lives: these are renewed ones.
    seeker = DHTService(next(other for other in list(world.nodes.values())[1:] if not other.dead))
    for cid in world.rng.sample(cids, min(count, 100)):
        assert [provider.peer for provider in await seeker.find_providers(cid)] == [node.peer_id]
        assert sum(bool(other.own_records(provider_key(cid))) for other in world.nodes.values()) > WIDTH // 2
    assert all(copies for _, copies in log)
    return log[count - 1][0] - started, len(log)


@pytest.mark.trio
async def test_what_is_held_stays_findable_for_days(autojump_clock: trio.testing.MockClock) -> None:
    first, announcements = await keep_and_lose(100, 40)
    assert first < 60
    assert announcements <= 100 * 6


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.trio
async def test_ten_thousand_keys_stay_findable_for_days(autojump_clock: trio.testing.MockClock) -> None:
    first, announcements = await keep_and_lose(10_000, 40)
    assert first < 2400
    assert announcements <= 10_000 * 5

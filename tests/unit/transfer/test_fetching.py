"""`fetch_model` and `serve_transfer` on a virtual network, in virtual time, among bad peers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from omnistore.block import Block
from omnistore.cid import CID, RAW
from omnistore.errors import (
    BadConfig,
    DigestMismatch,
    FetchTimedOut,
    MalformedManifest,
    NoProviders,
    StoreFull,
)
from omnistore.keys import PrivateKey
from omnistore.manifest import Manifest, PartKey
from omnistore.net.interface import Provider, Stream
from omnistore.selection import parse_parts
from omnistore.store.memory import MemoryStore
from omnistore.testing.faulty import ANNOYANCES, BROKEN, ENDED, FAULTS, Annoyance, Fault, FaultyPeer, annoy
from omnistore.testing.network import LinkModel, VirtualNetwork, VirtualNode, VirtualRouting
from omnistore.testing.seeding import seeded
from omnistore.testing.tiny_gguf import tiny_model
from omnistore.transfer.client import FetchOptions, FetchProgress, FetchReport, fetch_model
from omnistore.transfer.messages import PROTOCOL
from omnistore.transfer.serve import ServeLimits
from omnistore.transfer.server import Served, ServeEvent, Unavailable, serve_transfer
from omnistore.transfer.window import FlowLimits, SessionLimits

KEY = PrivateKey(bytes(32))
THREADS_MAY_TAKE = 0.002
"""Real seconds of idleness before virtual time jumps: the clock does not know of threads at work."""

Model = tuple[Path, MemoryStore, CID]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(tiny_model(3, width=128).build())
    return path, *seeded(path, KEY)


def virtually(test: Callable[[VirtualNetwork], Awaitable[None]], link: LinkModel | None = None) -> None:
    """Run `test` in virtual time."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await test(VirtualNetwork(nursery, random.Random(1), link or LinkModel(bandwidth=1e9)))
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=THREADS_MAY_TAKE))


async def serving(node: VirtualNode, store: MemoryStore, events: list[ServeEvent] | None = None) -> None:
    """Have `node` serve `store` from here on."""
    seen = events if events is not None else []

    async def serve(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await serve_transfer(node, store, events=seen.append, task_status=task_status)

    await node.network._nursery.start(serve)


def at(*names: str) -> tuple[str, ...]:
    return tuple(f"/memory/{name}/p2p/{name}" for name in names)


def distinct(seed: MemoryStore, cid: CID, parts: Collection[PartKey] | None = None) -> int:
    """Bytes of the model's distinct blocks: equal tensors, such as norms of ones, are fetched once."""
    found = seed.model(cid).parts
    wanted = [part for key, part in found.items() if parts is None or key in parts]
    return sum({block: size for part in wanted for block, size in part.links()}.values())


def whole(store: MemoryStore, seed: MemoryStore, cid: CID) -> bool:
    model = seed.model(cid)
    return all(store.has(block) for part in model.parts.values() for block, _ in part.links())


def test_from_two_seeders(model: Model, tmp_path: Path) -> None:
    path, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        await serving(network.node("a"), seed)
        await serving(network.node("b"), seed)
        mine = MemoryStore()
        options = FetchOptions(peers=at("a", "b"), output=tmp_path / "out.gguf")
        report = await fetch_model(network.node("me"), None, mine, cid, options)
        assert report.paths == (tmp_path / "out.gguf",)
        assert report.paths[0].read_bytes() == path.read_bytes()
        assert report.bytes_fetched == distinct(seed, cid) == sum(report.peers.values())
        assert min(report.peers.values()) > 0
        assert (report.blocks_local, report.duplicate_bytes, report.dropped) == (0, 0, {})
        assert mine.status(cid).pinned == {ref.key for ref in report.model.manifest.parts}

    virtually(test)


def test_found_through_routing_and_again_for_nothing(model: Model) -> None:
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        node = network.node("a")
        await serving(node, seed)
        await VirtualRouting(node).provide(cid)
        me, mine = network.node("me"), MemoryStore()
        first = await fetch_model(me, VirtualRouting(me), mine, cid)
        again = await fetch_model(me, VirtualRouting(me), mine, cid)
        assert list(first.peers) == ["a"]
        assert (again.bytes_fetched, again.node_bytes, again.peers) == (0, 0, {})
        assert again.blocks_local == first.blocks_fetched

    virtually(test)


def test_dead_providers_hide_no_live_one_and_are_not_dialled_on_and_on(model: Model) -> None:
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        node = network.node("alive")
        await serving(node, seed)
        network.records[cid] = [f"dead{number}" for number in range(45)]
        await VirtualRouting(node).provide(cid)
        node.link = replace(node.link, bandwidth=30_000)
        me, dials = network.node("me"), Counter[str]()
        open_stream = me.open_stream

        async def counting(provider: Provider, protocol: str) -> Stream:
            dials[provider.peer] += protocol == PROTOCOL
            return await open_stream(provider, protocol)

        me.open_stream = counting  # type: ignore[method-assign]  # an observer
        started = trio.current_time()
        report = await fetch_model(me, VirtualRouting(me), MemoryStore(), cid)
        seconds = trio.current_time() - started
        assert list(report.peers) == ["alive"]
        assert dials.pop("alive") == 1
        assert len(dials) == 45
        # Not every few seconds for as long as the fetch lasts.
        assert seconds > 60
        assert max(dials.values()) <= 10 + seconds / 60

    virtually(test)


def test_some_layers_only(model: Model) -> None:
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        await serving(network.node("a"), seed)
        mine = MemoryStore()

        def select(manifest: Manifest) -> frozenset[PartKey]:
            return parse_parts("1-2", manifest)

        options = FetchOptions(select, at("a"))
        report = await fetch_model(network.node("me"), None, mine, cid, options)
        wanted = {PartKey("header"), PartKey("layer", 1), PartKey("layer", 2)}
        assert report.bytes_fetched == distinct(seed, cid, wanted)
        assert mine.status(cid).complete == wanted

    virtually(test)


def test_urgent_layers_come_first(model: Model) -> None:
    _, seed, cid = model
    layers = {PartKey("layer", 1), PartKey("layer", 2)}
    wanted = {block for key in layers for block, _ in seed.model(cid).parts[key].links()}

    async def test(network: VirtualNetwork) -> None:
        await serving(network.node("a", LinkModel(bandwidth=1e5)), seed)
        mine = MemoryStore()
        early: list[bool] = []

        def told(now: FetchProgress) -> None:
            held = mine.held(wanted)
            others = {c for part in seed.model(cid).parts.values() for c, _ in part.links()} - wanted
            early.append(len(held) < len(wanted) and len(mine.held(others)) > 0.5 * len(others))

        options = FetchOptions(
            peers=at("a"),
            urgent=lambda manifest: parse_parts("1-2", manifest) & layers,
            limits=SessionLimits(flow=FlowLimits(least=180 << 10)),
        )
        await fetch_model(network.node("me"), None, mine, cid, options, told)
        assert whole(mine, seed, cid)
        assert len(early) > 3
        assert not any(early)

    virtually(test)


def test_what_a_fetching_node_got_it_serves_at_once(model: Model) -> None:
    """Two fetch from one slow seeder, and from each other: each hears of what the other got meanwhile."""
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        await serving(network.node("seed", LinkModel(bandwidth=100e3)), seed)
        reports: dict[str, FetchReport] = {}

        async def leech(name: str, other: str) -> None:
            store = MemoryStore()
            node = network.nodes[name]
            await serving(node, store)
            options = FetchOptions(
                peers=at("seed", other), limits=SessionLimits(flow=FlowLimits(least=180 << 10))
            )
            reports[name] = await fetch_model(node, None, store, cid, options)

        network.node("x")
        network.node("y")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leech, "x", "y")
            nursery.start_soon(leech, "y", "x")
        for name, other in (("x", "y"), ("y", "x")):
            assert reports[name].peers[other] > 0.2 * reports[name].bytes_fetched
        seconds = max(report.seconds for report in reports.values())
        assert seconds < 0.85 * 2 * reports["x"].bytes_fetched / 100e3

    virtually(test)


def test_a_peer_that_holds_a_part_serves_it_on(model: Model) -> None:
    path, seed, cid = model
    mine = {PartKey("layer", 0), PartKey("embed")}
    every = {ref.key for ref in seed.model(cid).manifest.parts}
    half, _ = seeded(path, KEY, mine)
    rest, _ = seeded(path, KEY, every - mine)

    async def test(network: VirtualNetwork) -> None:
        await serving(network.node("a"), half)
        await serving(network.node("b"), rest)
        store = MemoryStore()
        report = await fetch_model(network.node("me"), None, store, cid, FetchOptions(peers=at("a", "b")))
        assert whole(store, seed, cid)
        assert distinct(seed, cid, mine) - 2048 < report.peers["a"] <= distinct(seed, cid, mine)

    virtually(test)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_peer_beside_an_honest_one(model: Model, fault: Fault) -> None:
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        network.node("bad").serve(PROTOCOL, FaultyPeer(seed, fault).stream)
        await serving(network.node("good", LinkModel(bandwidth=2e6)), seed)
        mine = MemoryStore()
        report = await fetch_model(network.node("me"), None, mine, cid, FetchOptions(peers=at("bad", "good")))
        assert whole(mine, seed, cid)
        assert report.duplicate_bytes <= 4 << 20
        assert (fault in BROKEN) == ("bad" in report.dropped) or fault in ("stalls", "trickles", "silent")

    virtually(test)


@pytest.mark.parametrize("fault", sorted(BROKEN))
def test_a_peer_that_broke_the_protocol_is_all_there_is(model: Model, fault: Fault) -> None:
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        network.node("bad").serve(PROTOCOL, FaultyPeer(seed, fault).stream)
        with pytest.raises(NoProviders, match="bad: ") as caught:
            await fetch_model(network.node("me"), None, MemoryStore(), cid, FetchOptions(peers=at("bad")))
        assert " missing, the first " in caught.value.message
        assert trio.current_time() < 10

    virtually(test)


@pytest.mark.parametrize("fault", ["stalls", "trickles"])
def test_a_peer_that_stalls_is_all_there_is(model: Model, fault: Fault) -> None:
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        network.node("bad").serve(PROTOCOL, FaultyPeer(seed, fault).stream)
        with pytest.raises((FetchTimedOut, NoProviders)):
            await fetch_model(network.node("me"), None, MemoryStore(), cid, FetchOptions(peers=at("bad")))
        assert trio.current_time() < 300

    virtually(test)


def test_nobody_there(model: Model) -> None:
    _, _, cid = model

    async def test(network: VirtualNetwork) -> None:
        with pytest.raises(NoProviders, match=r"1 block missing, the first \S+\): nobody can not be reached"):
            await fetch_model(network.node("me"), None, MemoryStore(), cid, FetchOptions(peers=at("nobody")))
        assert trio.current_time() < 15
        me = network.node("me")
        with pytest.raises(NoProviders, match="no peer found"):
            await fetch_model(me, VirtualRouting(me), MemoryStore(), cid)

    virtually(test)


def test_an_address_without_a_peer(model: Model) -> None:
    async def test(network: VirtualNetwork) -> None:
        with pytest.raises(BadConfig, match="which peer"):
            await fetch_model(
                network.node("me"), None, MemoryStore(), model[2], FetchOptions(peers=["/ip4/1.2.3.4/tcp/1"])
            )

    virtually(test)


def test_a_seeder_dies_and_another_comes(model: Model) -> None:
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        first, second = network.node("first"), network.node("second")
        first.link = LinkModel(bandwidth=100e3)
        await serving(first, seed)
        await serving(second, seed)
        second.up = False
        await VirtualRouting(first).provide(cid)
        await VirtualRouting(second).provide(cid)
        me, mine = network.node("me"), MemoryStore()
        reports: list[FetchReport] = []

        async def fetch() -> None:
            reports.append(await fetch_model(me, VirtualRouting(me), mine, cid))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch)
            await trio.sleep(2)
            first.leave()
            await trio.sleep(10)
            second.come_back()
        assert whole(mine, seed, cid)
        assert min(reports[0].peers.values()) > 0

    virtually(test)


def test_a_frozen_peer_is_left_for_another(model: Model) -> None:
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        frozen = network.node("frozen", LinkModel(bandwidth=200e3))
        await serving(frozen, seed)
        await serving(network.node("good", LinkModel(bandwidth=200e3)), seed)
        mine = MemoryStore()

        async def freeze() -> None:
            await trio.sleep(1)
            frozen.frozen = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(freeze)
            await fetch_model(network.node("me"), None, mine, cid, FetchOptions(peers=at("frozen", "good")))
        assert whole(mine, seed, cid)
        assert trio.current_time() < 30

    virtually(test)


def test_links_that_reset_now_and_then(model: Model) -> None:
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        for name in "abc":
            await serving(network.node(name, LinkModel(bandwidth=1e6, loss=0.05)), seed)
        mine = MemoryStore()
        await fetch_model(network.node("me"), None, mine, cid, FetchOptions(peers=at("a", "b", "c")))
        assert whole(mine, seed, cid)

    virtually(test)


# --- the server -----------------------------------------------------------------------------


@pytest.mark.parametrize("annoyance", ANNOYANCES)
def test_an_annoying_requester_does_not_hurt_others(model: Model, annoyance: Annoyance) -> None:
    _, seed, cid = model
    held = tuple(block for part in seed.model(cid).parts.values() for block, _ in part.links())[:20]
    events: list[ServeEvent] = []

    async def test(network: VirtualNetwork) -> None:
        await serving(network.node("seed"), seed, events)
        async with trio.open_nursery() as nursery:
            for name in ("x", "y", "z"):
                nursery.start_soon(annoy, network.node(name), Provider("seed"), annoyance, held)
            await trio.sleep(1)
            mine = MemoryStore()
            report = await fetch_model(network.node("me"), None, mine, cid, FetchOptions(peers=at("seed")))
            assert report.seconds < 5
            ended = [event for event in events if isinstance(event, Served) and event.reason]
            if annoyance in ENDED:
                assert len(ended) == 3
            elif annoyance == "never-reads":
                await trio.sleep(60)
                assert {event.peer for event in events if isinstance(event, Served)} >= {"x", "y", "z"}
            nursery.cancel_scope.cancel()

    virtually(test)


def test_too_many_streams_are_told_so(model: Model) -> None:
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        node = network.node("seed")

        async def serve(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            await serve_transfer(node, seed, limits=ServeLimits(streams=1), task_status=task_status)

        await network._nursery.start(serve)
        stream = await network.node("first").open_stream(Provider("seed"), PROTOCOL)
        await stream.receive_some(100)
        with pytest.raises(NoProviders, match="busy"):
            await fetch_model(network.node("me"), None, MemoryStore(), cid, FetchOptions(peers=at("seed")))
        await stream.aclose()

    virtually(test)


class Rotten(MemoryStore):
    """A store in which one block rotted."""

    def __init__(self, seed: MemoryStore, rotten: CID) -> None:
        super().__init__()
        self._blocks = dict(seed._blocks)
        self._models = dict(seed._models)
        self._pins = dict(seed._pins)
        self._rotten = rotten

    def read(self, cid: CID, room: memoryview | None = None) -> Block:
        if cid == self._rotten:
            self._blocks.pop(cid, None)
            raise DigestMismatch(f"block {cid} is rotten")
        return super().read(cid, room)


def test_a_rotten_block_is_reported_and_comes_from_elsewhere(model: Model) -> None:
    _, seed, cid = model
    rotten = seed.model(cid).parts[PartKey("layer", 1)].links()[3][0]
    events: list[ServeEvent] = []

    async def test(network: VirtualNetwork) -> None:
        await serving(network.node("a"), Rotten(seed, rotten), events)
        slow = network.node("b", LinkModel(bandwidth=100e3))
        await serving(slow, seed)
        mine = MemoryStore()
        report = await fetch_model(network.node("me"), None, mine, cid, FetchOptions(peers=at("a", "b")))
        assert whole(mine, seed, cid)
        assert report.dropped == {}
        assert [event.cid for event in events if isinstance(event, Unavailable)] in ([rotten], [])

    virtually(test)


# --- what is not the network's fault --------------------------------------------------------


class Full(MemoryStore):
    """A store whose disk is full after a few blocks."""

    def put(self, blocks: object) -> None:
        super().put(blocks)  # type: ignore[arg-type]
        if sum(cid.codec == RAW for cid in self._blocks) > 5:
            raise StoreFull("the disk is full")


def test_a_full_disk_ends_the_fetch(model: Model) -> None:
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        await serving(network.node("a"), seed)
        with pytest.raises(StoreFull):
            await fetch_model(network.node("me"), None, Full(), cid, FetchOptions(peers=at("a")))

    virtually(test)


def test_a_cid_that_names_no_manifest(model: Model) -> None:
    _, seed, cid = model
    part = seed.model(cid).manifest.parts[0].cid

    async def test(network: VirtualNetwork) -> None:
        await serving(network.node("a"), seed)
        with pytest.raises(MalformedManifest):
            await fetch_model(network.node("me"), None, MemoryStore(), part, FetchOptions(peers=at("a")))

    virtually(test)

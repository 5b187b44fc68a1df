"""Caps: what a server sends over all peers, what a fetch asks for, and how peers share a capped server."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from omnistore.cid import CID
from omnistore.keys import PrivateKey
from omnistore.store.memory import MemoryStore
from omnistore.testing.network import LinkModel, VirtualNetwork
from omnistore.testing.seeding import seeded
from omnistore.testing.simulation import PeerModel, Scenario, Simulation
from omnistore.testing.tiny_gguf import tiny_model
from omnistore.transfer.client import FetchOptions, fetch_model
from omnistore.transfer.pacing import Pacer
from omnistore.transfer.rate import TokenBucket
from omnistore.transfer.server import serve_transfer

MIB = 1 << 20
Model = tuple[MemoryStore, CID]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(tiny_model(3, width=128).build())
    return seeded(path, PrivateKey(bytes(32)))


def virtually(test: Callable[[VirtualNetwork], Awaitable[None]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await test(VirtualNetwork(nursery, random.Random(1), LinkModel(bandwidth=1e9)))
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.005))


async def serving(network: VirtualNetwork, name: str, store: MemoryStore, pacer: Pacer) -> None:
    async def serve(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await serve_transfer(network.node(name), store, pacer=pacer, task_status=task_status)

    await network._nursery.start(serve)


@pytest.mark.parametrize("requesters", [1, 3])
def test_a_server_sends_no_more_than_its_cap_to_all_together(model: Model, requesters: int) -> None:
    store, cid = model
    rate = 200_000

    async def test(network: VirtualNetwork) -> None:
        await serving(network, "seed", store, Pacer(rate))
        fetched: list[int] = []

        async def fetch(name: str) -> None:
            options = FetchOptions(peers=("/memory/seed/p2p/seed",))
            report = await fetch_model(network.node(name), None, MemoryStore(), cid, options)
            fetched.append(report.bytes_fetched + report.node_bytes)

        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(requesters):
                nursery.start_soon(fetch, f"me{number}")
        ideal = sum(fetched) / rate
        assert 0.95 * ideal - 0.1 < trio.current_time() - started < 1.05 * ideal + 0.5

    virtually(test)


def test_two_capped_servers_add_up(model: Model) -> None:
    store, cid = model

    async def test(network: VirtualNetwork) -> None:
        await serving(network, "a", store, Pacer(200_000))
        await serving(network, "b", store, Pacer(200_000))
        options = FetchOptions(peers=("/memory/a/p2p/a", "/memory/b/p2p/b"))
        report = await fetch_model(network.node("me"), None, MemoryStore(), cid, options)
        assert report.seconds < 1.3 * report.bytes_fetched / 400_000 + 0.5

    virtually(test)


def test_peers_share_a_cap_whatever_number_of_streams_they_open() -> None:
    async def main() -> None:
        pacer = Pacer(1_000_000)
        sent = {"greedy": 0, "modest": 0}

        async def stream(peer: str) -> None:
            while True:
                await pacer.passes(peer, 10_000)
                sent[peer] += 10_000

        with trio.move_on_after(10):
            async with trio.open_nursery() as nursery:
                for _ in range(9):
                    nursery.start_soon(stream, "greedy")
                nursery.start_soon(stream, "modest")
        assert sum(sent.values()) == pytest.approx(10_000_000, rel=0.03)
        assert sent["modest"] == pytest.approx(sent["greedy"], rel=0.05)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_whoever_gives_up_waiting_leaves_no_trace() -> None:
    async def main() -> None:
        pacer = Pacer(1000)
        await pacer.passes("p", 5000)
        with trio.move_on_after(1):
            await pacer.passes("q", 1)
        started = trio.current_time()
        await pacer.passes("p", 1)
        assert trio.current_time() - started == pytest.approx(4, abs=0.1)
        assert not pacer._lines

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_fetch_asks_for_no_more_than_its_cap(model: Model) -> None:
    store, cid = model

    async def test(network: VirtualNetwork) -> None:
        for name in "abc":
            await serving(network, name, store, Pacer(None))
        peers = tuple(f"/memory/{name}/p2p/{name}" for name in "abc")
        options = FetchOptions(peers=peers, download=TokenBucket(100_000, trio.current_time()))
        report = await fetch_model(network.node("me"), None, MemoryStore(), cid, options)
        ideal = (report.bytes_fetched + report.node_bytes) / 100_000
        assert 0.8 * ideal < report.seconds < 1.2 * ideal + 1

    virtually(test)


def test_two_fetches_share_a_cap(model: Model) -> None:
    store, cid = model

    async def test(network: VirtualNetwork) -> None:
        await serving(network, "a", store, Pacer(None))
        bucket = TokenBucket(200_000, trio.current_time())
        total: list[int] = []

        async def fetch(name: str) -> None:
            options = FetchOptions(peers=("/memory/a/p2p/a",), download=bucket)
            report = await fetch_model(network.node(name), None, MemoryStore(), cid, options)
            total.append(report.bytes_fetched)

        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, "me")
            nursery.start_soon(fetch, "you")
        assert trio.current_time() - started > 0.85 * sum(total) / 200_000

    virtually(test)


@pytest.mark.parametrize("rate", [5e3, 1e6, 20e6])
def test_a_capped_session_uses_the_whole_cap_and_never_gives_up(rate: float) -> None:
    """At 5 kB/s a block takes longer than the session's patience, and waiting is no fault of peers."""
    one = PeerModel(bandwidth=50e6)
    count = 5 if rate < 1e5 else 200
    scenario = Scenario(((MIB,) * count,), 0, (one, one, PeerModel(behaviour="dies")), cap=rate)
    outcome = Simulation(scenario, 1).run()
    assert outcome.done
    ideal = (count - 1) * MIB / rate
    assert 0.95 * ideal < outcome.seconds < 1.1 * ideal + 2

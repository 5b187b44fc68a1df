"""Every limit that a user may set: `omni config` shows it with its unit, a file sets it, and it holds."""

from __future__ import annotations

import ast
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

import omninfer
import omnistore
import omnistore.node
from omnistore.cid import CID, DAG_CBOR
from omnistore.cli.seed import _relay_limits
from omnistore.config import FILE_NAME, Config, settings
from omnistore.dht.records import provider_key
from omnistore.errors import NoProviders, PeerUnreachable, StoreFull
from omnistore.keys import PrivateKey
from omnistore.net import admission
from omnistore.net.circuits import RelayLimits
from omnistore.net.interface import ContentRouting, Provider
from omnistore.net.libp2p import Libp2pNetwork, open_network
from omnistore.node import Node, NodeOptions, open_node
from omnistore.settings import allowed_range, written
from omnistore.store.disk import check_room
from omnistore.transfer.client import FetchOptions, fetch_model
from omnistore.transfer.messages import PROTOCOL, SERVER, Decoder, Error, Hello
from omnistore.transfer.serve import ServeLimits
from tests.conftest import Run
from tests.system.circuits import node as hidden_node
from tests.system.conftest import LOCAL, StartSeed

UNITS = ("bytes", "bytes/s", "seconds", "count")
LIMITS = {name: one for name, one in settings().items() if one.unit in UNITS}


def test_omni_config_shows_each_with_its_unit_and_default(omni: Run, home: Path) -> None:
    shown = omni("config").stdout
    defaults = Config(home)
    for name, described in LIMITS.items():
        default = written(described, getattr(defaults, name))
        line = next(line for line in shown.splitlines() if line.startswith(f"# {name} = "))
        assert line == f"# {name} = {default}  # default; {described.unit}, {allowed_range(described)}"


def other(name: str) -> int | float:
    """A value that is allowed, and no default."""
    described = LIMITS[name]
    assert described.low is not None
    return type(getattr(Config(Path("unused")), name) or 1)(described.low + 7)


OBSERVED: dict[str, Callable[[Node, ServeLimits], object]] = {
    "window": lambda node, serve: node.limits.flow.ceiling,
    "stall_timeout": lambda node, serve: node.limits.stall_timeout,
    "provider_timeout": lambda node, serve: node.limits.provider_timeout,
    "fetch_peers": lambda node, serve: node.limits.peers,
    "dial_timeout": lambda node, serve: node.network.dialer.deadline,
    "connections": lambda node, serve: node.network.options.connections,
    "serve_streams": lambda node, serve: serve.streams,
    "serve_memory": lambda node, serve: serve.memory,
    "serve_peer_memory": lambda node, serve: serve.ahead,
    "up_limit": lambda node, serve: node.upload._rate,
    "down_limit": lambda node, serve: node.download and node.download.rate,
    "busy_timeout": lambda node, serve: node.store.database._busy_timeout,
    "disk_reserve": lambda node, serve: node.store.config.disk_reserve,
    "copy_batch": lambda node, serve: node.store.config.copy_batch,
    "sync_batch": lambda node, serve: node.store.config.sync_batch,
    "node_grace": lambda node, serve: node.store.config.node_grace,
    "relay_reservations": lambda node, serve: _relay_limits(node.store.config).reservations,
    "relay_circuits": lambda node, serve: _relay_limits(node.store.config).circuits,
    "relay_bytes": lambda node, serve: _relay_limits(node.store.config).circuit_bytes,
    "relay_time": lambda node, serve: _relay_limits(node.store.config).circuit_seconds,
}
"""Where the limit is in a running node."""
ELSEWHERE = {
    "dht_keys": "test_records_for_others_are_bounded, and below",
    "http_connections": "below",
    "disk_cap": "test_daemon",
    "kv_memory": "test_kept_prompts",
    "kv_kept": "test_prompt_cache",
}
"""Tests of what the others do."""


@pytest.mark.trio
async def test_a_file_sets_each_and_it_reaches_what_it_bounds(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert OBSERVED.keys() | ELSEWHERE.keys() == LIMITS.keys(), "a limit without a line here"
    config = configured(home, **{name: other(name) for name in LIMITS})
    served: list[ServeLimits] = []
    original = omnistore.node.serve_transfer

    async def noted(*args: Any, limits: ServeLimits, **fields: Any) -> None:
        served.append(limits)
        await original(*args, limits=limits, **fields)

    monkeypatch.setattr(omnistore.node, "serve_transfer", noted)
    async with open_node(config, NodeOptions(server=True, listen=[LOCAL])) as node:
        for name, observe in OBSERVED.items():
            assert observe(node, served[0]) == other(name) != getattr(Config(home), name), name


def test_each_is_read_by_the_product() -> None:
    """Somewhere other than where it is declared."""
    read: set[str] = set()
    for package in (omnistore, omninfer):
        for path in Path(str(package.__file__)).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())) if path.name != "config.py" else ():
                if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith(
                    ("config", "settings")
                ):
                    read.add(node.attr)
    assert LIMITS.keys() <= read


# --- what they do, over real sockets ----------------------------------------------------------


def configured(home: Path, **values: int | float) -> Config:
    home.mkdir(exist_ok=True)
    lines = [f"{name} = {written(settings()[name], value)}" for name, value in values.items()]
    (home / FILE_NAME).write_text("\n".join(lines))
    return Config.from_environment({"OMNI_HOME": str(home)})


@asynccontextmanager
async def seed(home: Path, **values: int | float) -> AsyncIterator[Node]:
    async with open_node(configured(home, **values), NodeOptions(server=True, listen=[LOCAL])) as node:
        yield node


@asynccontextmanager
async def stranger() -> AsyncIterator[Libp2pNetwork]:
    async with open_network(PrivateKey(secrets.token_bytes(32)), []) as network:
        yield network


def target(node: Node) -> Provider:
    where, _, peer = node.network.addrs()[0].rpartition("/p2p/")
    return Provider(peer, (where,))


@pytest.mark.trio
async def test_connections(home: Path) -> None:
    async with seed(home, connections=16) as node, AsyncExitStack() as stack:
        first = await stack.enter_async_context(stranger())
        await first.connect(node.network.addrs()[0])
        for _ in range(20):
            late = await stack.enter_async_context(stranger())
            with trio.move_on_after(2):
                try:
                    await late.connect(node.network.addrs()[0])
                except PeerUnreachable:
                    continue
        await trio.sleep(0.2)
        assert len(node.network.host.get_network().get_connections()) == 16
        assert isinstance(await first_word(first, target(node)), Hello)


@pytest.mark.trio
async def test_a_reservation_keeps_its_place_in_a_full_house(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "LEFT_ALONE", 0.0)
    options = NodeOptions(server=True, listen=[LOCAL], relay=RelayLimits())
    async with (
        open_node(configured(home, connections=16), options) as node,
        hidden_node() as (hidden, circuits),
        trio.open_nursery() as nursery,
        AsyncExitStack() as stack,
    ):
        nursery.start_soon(circuits.keep_reserved, node.network.addrs()[0])
        with trio.fail_after(10):
            while not hidden.circuits:  # noqa: ASYNC110  # no event for it
                await trio.sleep(0.02)
        came = []
        for _ in range(18):
            came.append(await stack.enter_async_context(stranger()))
            await came[-1].connect(node.network.addrs()[0])
            # Until those before have said who they are, nobody is idle but the one with a reservation.
            await trio.sleep(1 if len(came) == 14 else 0.1)
        peers = set(node.network.peers())
        assert len(peers) == 16
        assert hidden.peer_id in peers
        assert came[0].peer_id not in peers, "the oldest of the others made room"
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_streams(home: Path) -> None:
    async with seed(home, serve_streams=4) as node, stranger() as many, stranger() as late:
        streams = [await many.open_stream(target(node), PROTOCOL) for _ in range(4)]
        for stream in streams:
            await stream.receive_some(100)
        word = await first_word(late, target(node))
        assert isinstance(word, Error) and word.code == "busy"


async def first_word(network: Libp2pNetwork, server: Provider) -> object:
    stream = await network.open_stream(server, PROTOCOL)
    with trio.fail_after(10):
        (word, *_) = Decoder(SERVER).feed_untrusted(await stream.receive_some(1000))
    await stream.reset()
    return word


@pytest.mark.trio
async def test_keys_of_others(home: Path, tmp_path: Path) -> None:
    async with seed(home, dht_keys=100) as keeper, seed(tmp_path / "other") as sender:
        await sender.network.connect(keeper.network.addrs()[0])
        with trio.fail_after(10):
            while not sender.routing.node.start_peers(b""):  # noqa: ASYNC110  # no event for it
                await trio.sleep(0.02)
        kept = 0
        for number in range(104):
            cid = CID.of_digest(DAG_CBOR, number.to_bytes(32, "big"))
            kept += await sender.routing.provide(cid)
        assert kept == 100
        assert len(keeper.routing.node.own_records(provider_key(cid))) == 0


@pytest.mark.trio
async def test_how_long_a_fetch_waits_for_somebody(home: Path) -> None:
    class Nobody:
        """A routing that finds nobody."""

        async def find_providers(self, cid: CID, **fields: Any) -> list[Provider]:
            return []

    async with seed(home, provider_timeout=1) as node:
        routing: ContentRouting = Nobody()  # type: ignore[assignment]
        cid = CID.of_digest(DAG_CBOR, bytes(32))
        with trio.fail_after(15), pytest.raises(NoProviders):
            await fetch_model(node.network, routing, node.store, cid, FetchOptions(limits=node.limits))


@pytest.mark.trio
async def test_how_long_a_dial_may_take(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with seed(home, dial_timeout=1) as node:
            peer, port = PrivateKey(bytes(32)).public.peer_id, silent.getsockname()[1]
            provider = Provider(peer, (f"/ip4/127.0.0.1/tcp/{port}",))
            with pytest.raises(PeerUnreachable, match="within 1 s"):
                await node.network.open_stream(provider, PROTOCOL)


def test_disk_that_stays_free(home: Path, tmp_path: Path) -> None:
    config = configured(home, disk_reserve=10**15)
    with pytest.raises(StoreFull):
        check_room(tmp_path, 1, config.disk_reserve, "a model")


@pytest.fixture
def client() -> Iterator[Callable[[str], socket.socket]]:
    opened: list[socket.socket] = []

    def connect(url: str) -> socket.socket:
        host, _, port = url.removeprefix("http://").rpartition(":")
        opened.append(socket.create_connection((host, int(port)), timeout=5))
        return opened[-1]

    yield connect
    for one in opened:
        one.close()


def test_connections_to_the_gateway(
    start_seed: StartSeed, home: Path, client: Callable[[str], socket.socket]
) -> None:
    configured(home, http_connections=1)
    ready = start_seed(home, "--no-mdns", "--http", "127.0.0.1:0").event("ready")
    asked = b"GET /ipfs/bafkqaaa?format=raw HTTP/1.1\r\nHost: x\r\n\r\n"
    first = client(ready["http"][0])
    first.sendall(asked)
    assert first.recv(100).startswith(b"HTTP/1.1 200")
    second = client(ready["http"][0])
    second.sendall(asked)
    assert second.recv(100).startswith(b"HTTP/1.1 503")

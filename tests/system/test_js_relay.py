"""Relays, dial backs and direct connections with js-libp2p at either end, and in the middle.

Stock js-libp2p as in test_js_libp2p. What it does only at public addresses runs in network namespaces.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from omnistore.net.addresses import CIRCUIT
from omnistore.net.interface import Provider
from omnistore.net.libp2p import Libp2pNetwork
from omnistore.net.relay import HOP, Relay
from tests.system.circuits import node
from tests.system.js_peer import JsPeer, js_peer, needs_js
from tests.system.machines import PORT, internet

pytestmark = needs_js

LOCAL = "/ip4/127.0.0.1/tcp/0"
SOME = 60_000
"""Bytes: js-libp2p's relay carries 128 KiB on a circuit."""


@asynccontextmanager
async def relay() -> AsyncIterator[Relay]:
    async with node(LOCAL) as (network, _), trio.open_nursery() as nursery:
        made = Relay(network)
        nursery.start_soon(made.run)
        with trio.fail_after(5):
            while HOP not in network.served:  # noqa: ASYNC110  # no event for it
                await trio.sleep(0.01)
        yield made
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def js_beside(*listen: str) -> AsyncIterator[JsPeer]:
    """One that may need an answer of this process before it has started."""
    with ExitStack() as stack:
        yield await trio.to_thread.run_sync(lambda: stack.enter_context(js_peer(*listen)))


async def echoes(network: Libp2pNetwork, peer: str) -> None:
    stream = await network.open_stream(Provider(peer), "/test/echo")
    data = secrets.token_bytes(SOME)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            assert await stream.receive_exactly(SOME) == data
    await stream.aclose()


@pytest.mark.trio
async def test_js_is_reached_through_our_relay() -> None:
    async with (
        relay() as middle,
        node() as (seeker, _),
        js_beside(f"{middle.network.addrs()[0]}{CIRCUIT}") as js,
    ):
        assert js.addrs == [f"{middle.network.addrs()[0]}{CIRCUIT}/p2p/{js.peer}"]
        assert await seeker.connect(js.addrs[0]) == js.peer
        await echoes(seeker, js.peer)
        assert middle.state.bytes_relayed > 2 * SOME


@pytest.mark.trio
async def test_js_reaches_us_through_our_relay() -> None:
    async with relay() as middle, node() as (hidden, circuits), trio.open_nursery() as nursery:
        nursery.start_soon(circuits.keep_reserved, middle.network.addrs()[0])
        with trio.fail_after(10):
            while not hidden.circuits:  # noqa: ASYNC110  # no event for it
                await trio.sleep(0.02)
        async with js_beside() as js:
            assert await js.do("dial", hidden.addrs()[0]) == {"peer": hidden.peer_id, "limited": True}
            back = await js.do("echo", hidden.peer_id, 5_000_000)
            assert back["sent"] == back["back"]
            assert middle.state.bytes_relayed > 10_000_000
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_we_are_reached_through_a_relay_of_js() -> None:
    async with (
        node() as (hidden, circuits),
        node() as (seeker, _),
        js_beside() as js,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(circuits.keep_reserved, js.addrs[0])
        with trio.fail_after(10):
            while not hidden.circuits:  # noqa: ASYNC110  # no event for it
                await trio.sleep(0.02)
        assert await seeker.connect(hidden.addrs()[0]) == hidden.peer_id
        await echoes(seeker, hidden.peer_id)
        nursery.cancel_scope.cancel()


def test_js_that_reached_us_through_a_relay_is_dialled_directly(tmp_path: Path) -> None:
    """It is public, we are behind a router.

    Nobody asks it by AutoNAT (see `autonat.MISLED`): the relay's question would close the connection that the
    circuit runs over.
    """
    with internet() as net:
        there, middle = net.machine(1), net.machine(4)
        relaying = middle.seed(tmp_path / "relay", "--relay")
        relaying.event("ready")
        addr = middle.addr(tmp_path / "relay")
        inside, _ = net.home(5)
        hidden = inside.seed(tmp_path / "hidden", "--bootstrap", addr, "--relay-via", addr)
        hidden.event("moved")
        peer = hidden.seen[0]["peer_id"]
        with js_peer(f"/ip4/{there.host}/tcp/{PORT}", inside=there.command()) as js:
            assert js.do_now("dial", f"{addr}{CIRCUIT}/p2p/{peer}") == {"peer": peer, "limited": True}
            assert hidden.event("direct", peer=js.peer)["how"] == "reversal"
            kinds = {one["limited"] for one in js.do_now("connections") if one["peer"] == peer}
            assert False in kinds
            # What is asked of us now goes there.
            assert js.do_now("ping", peer) < 5000

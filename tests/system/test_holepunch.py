"""From a relay to a direct connection: on one machine, and through routers."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from libp2p.connection_types import ConnectionType
from libp2p.peer.id import ID

from omnistore.keys import PrivateKey
from omnistore.net.circuit_transport import Circuits
from omnistore.net.circuits import RelayLimits
from omnistore.net.dcutr import PROTOCOL, HolePunching
from omnistore.net.interface import Provider, Stream
from omnistore.net.libp2p import Libp2pNetwork, NetworkOptions, open_network
from omnistore.net.relay import HOP, Relay
from omnistore.testing.tiny_gguf import tiny_model
from tests.system.machines import PORT, Internet, Machine, internet

LOCAL = "/ip4/127.0.0.1/tcp/0"


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(1 << 20):
        await stream.send_all(data)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(15):
        while not condition():  # noqa: ASYNC110  # the library has no event for it
            await trio.sleep(0.02)


@asynccontextmanager
async def node(
    *listen: str, psk: bytes | None = None
) -> AsyncIterator[tuple[Libp2pNetwork, Circuits, HolePunching]]:
    async with (
        open_network(PrivateKey(secrets.token_bytes(32)), listen, NetworkOptions(psk=psk)) as network,
        trio.open_nursery() as nursery,
    ):
        network.serve("/test/echo", echo)
        circuits = Circuits(network)
        circuits.install()
        punching = HolePunching(network)
        nursery.start_soon(punching.run)
        yield network, circuits, punching
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def three(
    *seeker: str, psk: bytes | None = None
) -> AsyncIterator[tuple[Relay, tuple[Libp2pNetwork, HolePunching], tuple[Libp2pNetwork, HolePunching]]]:
    """A relay, a node reached through it alone, and one that will; `seeker`: where that one listens."""
    async with (
        node(LOCAL, psk=psk) as (middle, _, _),
        node(LOCAL, psk=psk) as (hidden, reserving, hidden_punching),
        node(*seeker, psk=psk) as (other, _, punching),
        trio.open_nursery() as nursery,
    ):
        relay = Relay(middle, RelayLimits())
        nursery.start_soon(relay.run)
        await until(lambda: HOP in middle.served)
        nursery.start_soon(reserving.keep_reserved, middle.addrs()[0])
        await until(lambda: bool(hidden.circuits))
        yield relay, (hidden, hidden_punching), (other, punching)
        nursery.cancel_scope.cancel()


def kinds(network: Libp2pNetwork, peer: str) -> list[bool]:
    """Of each connection to a peer: whether it is direct."""
    conns = network.host.get_network().get_connections(ID.from_base58(peer))
    return sorted(c.get_connection_type() == ConnectionType.DIRECT for c in conns if not c.is_closed)


@pytest.mark.trio
@pytest.mark.parametrize("psk", [None, bytes(32)])
@pytest.mark.parametrize(("listen", "how"), [((LOCAL,), "reversal"), ((), "punch")])
async def test_a_relayed_connection_gets_a_direct_one_beside_it(
    listen: tuple[str, ...], how: str, psk: bytes | None
) -> None:
    async with three(*listen, psk=psk) as (relay, (hidden, punching), (seeker, _)):
        (through,) = hidden.circuits
        await seeker.connect(f"{through}/p2p/{hidden.peer_id}")
        await until(lambda: punching.outcomes[how] == 1)
        assert punching.outcomes["failed"] == 0
        assert kinds(hidden, seeker.peer_id) == [False, True]
        assert hidden.is_direct(seeker.peer_id)
        assert [host for host, _ in hidden.remote_addresses(seeker.peer_id)] == ["127.0.0.1"]
        await until(lambda: kinds(seeker, hidden.peer_id) == [False, True])
        # What is opened from now on goes there, either way.
        before = relay.state.bytes_relayed
        for one, other in ((seeker, hidden), (hidden, seeker)):
            stream = await one.open_stream(Provider(other.peer_id), "/test/echo")
            await stream.send_all(bytes(100_000))
            assert await stream.receive_exactly(100_000) == bytes(100_000)
            await stream.aclose()
        assert relay.state.bytes_relayed < before + 10_000
        assert (seeker.peer_id in punching.punched) == (how == "punch")


@pytest.mark.trio
@pytest.mark.parametrize(
    "data",
    [b"", b"\xff" * 10, b"\x00", b"\x03\x08\xac\x02", b"\x05hello", b"\xff\x3f" + bytes(100)],
    ids=["nothing", "endless", "empty", "SYNC first", "junk", "too long"],
)
async def test_what_makes_no_sense_ends_that_stream_alone(data: bytes) -> None:
    async with three() as (_, (hidden, punching), (seeker, _)):
        # Nobody begins: it is we who speak.
        punching._throttle.may(seeker.peer_id, trio.current_time())
        (through,) = hidden.circuits
        await seeker.connect(f"{through}/p2p/{hidden.peer_id}")
        bad = await seeker.open_stream(Provider(hidden.peer_id), PROTOCOL)
        await bad.send_all(data)
        await bad.aclose()
        stream = await seeker.open_stream(Provider(hidden.peer_id), "/test/echo")
        await stream.send_all(b"still here")
        with trio.fail_after(10):
            assert await stream.receive_exactly(10) == b"still here"
        assert kinds(seeker, hidden.peer_id) == [False]


def pinned_through_routers(
    net: Internet, tmp_path: Path, inside: Machine, elsewhere: Machine, *options: str
) -> tuple[int, int, dict[str, Any]]:
    """A model is pinned from `inside` at `elsewhere`, which know a relay and one another through it alone.

    How many bytes the relay carried of it, how many the file has, and how it was found.
    """
    file = tmp_path / "tiny.gguf"
    file.write_bytes(tiny_model(5, width=256).build())
    relay, home = net.machine(9), tmp_path / "relay"
    home.mkdir()
    addr = relay.addr(home)
    relaying = relay.seed(home, "--relay")
    relaying.event("ready")
    cid = json.loads(inside.omni(tmp_path / "hidden", "add", file, "--json").stdout)["cid"]
    # Slowly, so that most is still to come when the direct connection stands.
    hidden = inside.seed(
        tmp_path / "hidden", "--bootstrap", addr, "--relay-via", addr, "--up-limit", "2MB/s", *options
    )
    hidden.event("moved")
    circuit = f"{addr}/p2p-circuit/p2p/{hidden.seen[0]['peer_id']}"
    done = elsewhere.omni(tmp_path / "there", "pin", cid, "--peer", circuit, "--json", "--no-mdns")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert Path(report["path"]).read_bytes() == file.read_bytes()
    status = json.loads(relay.omni(home, "status", "--json").stdout)["relay"]
    found = [event for event in hidden.told() if event["event"] == "direct"]
    return status["bytes"], file.stat().st_size, found[0] if found else {}


def homes(net: Internet) -> tuple[Machine, Machine]:
    """Each behind a router of its own."""
    return net.home(5)[0], net.home(6)[0]


def firewalls(net: Internet) -> tuple[Machine, Machine]:
    """Each drops what it did not ask for."""
    return net.machine(5, firewall=True), net.machine(6, firewall=True)


def homes_with_another_port(net: Internet) -> tuple[Machine, Machine]:
    """The port that a seed listens at is not the one outside, though the same for all; the relay tells it."""
    inside, router = net.home(5)
    router.nft("flush chain ip nat out")
    router.nft(f"add rule ip nat out tcp sport {PORT} snat to {router.host}:30000")
    router.nft('add rule ip nat out oifname "wan0" masquerade')
    return inside, net.home(6)[0]


@pytest.mark.parametrize(
    "places",
    [
        homes,
        pytest.param(firewalls, marks=pytest.mark.slow),
        pytest.param(homes_with_another_port, marks=pytest.mark.slow),
    ],
)
def test_two_that_nobody_can_connect_to_talk_directly(
    places: Callable[[Internet], tuple[Machine, Machine]], tmp_path: Path
) -> None:
    with internet() as net:
        inside, elsewhere = places(net)
        carried, size, found = pinned_through_routers(net, tmp_path, inside, elsewhere)
        assert found["how"] == "punch"
        # What was under way moved.
        assert carried < size / 2, (carried, size)


@pytest.mark.slow
def test_where_no_hole_can_be_punched_the_relay_goes_on(tmp_path: Path) -> None:
    """A router that takes another port for every connection: nobody can know which."""
    with internet() as net:
        inside, router = net.home(5)
        elsewhere, other = net.home(6)
        for one in (router, other):
            one.nft("flush chain ip nat out")
            one.nft('add rule ip nat out oifname "wan0" masquerade fully-random')
        carried, size, found = pinned_through_routers(net, tmp_path, inside, elsewhere)
        assert not found
        assert carried > size

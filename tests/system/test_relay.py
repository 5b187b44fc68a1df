"""A relay: who can not be dialled is reached through it, within bounds, by whom it really is."""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from omnistore.errors import PeerUnreachable
from omnistore.keys import PrivateKey
from omnistore.net.addresses import CIRCUIT
from omnistore.net.circuits import RelayLimits
from omnistore.net.interface import Provider, Stream
from omnistore.net.libp2p import Libp2pNetwork
from omnistore.net.reachability import State
from omnistore.net.relay import HOP, Relay
from omnistore.net.relay_use import RelayUse
from omnistore.testing.tiny_gguf import tiny_model
from tests.system.circuits import node

if TYPE_CHECKING:
    from tests.system.conftest import StartSeed

LOCAL = "/ip4/127.0.0.1/tcp/0"


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110  # the library has no event for it
            await trio.sleep(0.02)


@asynccontextmanager
async def three(
    limits: RelayLimits | None = None, kind: type[Relay] = Relay
) -> AsyncIterator[tuple[Relay, Libp2pNetwork, Libp2pNetwork]]:
    """A relay, a node that listens nowhere and is reserved there, and one that knows neither."""
    async with (
        node(LOCAL) as (middle, _),
        node() as (hidden, reserving),
        node() as (seeker, _),
        trio.open_nursery() as nursery,
    ):
        relay = kind(middle, limits or RelayLimits())
        nursery.start_soon(relay.run)
        await until(lambda: HOP in middle.served)
        nursery.start_soon(reserving.keep_reserved, middle.addrs()[0])
        await until(lambda: bool(hidden.circuits))
        yield relay, hidden, seeker
        nursery.cancel_scope.cancel()


async def echoes(network: Libp2pNetwork, peer: str, size: int) -> None:
    stream = await network.open_stream(Provider(peer), "/test/echo")
    data = secrets.token_bytes(size)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            assert await stream.receive_exactly(size) == data
    await stream.aclose()


@pytest.mark.trio
async def test_who_listens_nowhere_is_reached_both_ways() -> None:
    async with three() as (relay, hidden, seeker):
        (addr,) = hidden.addrs()
        assert addr == f"{relay.network.addrs()[0]}{CIRCUIT}/p2p/{hidden.peer_id}"
        assert await seeker.connect(addr) == hidden.peer_id
        await echoes(seeker, hidden.peer_id, 5_000_000)
        # Over the same connection, as over any other.
        await echoes(hidden, seeker.peer_id, 5_000_000)
        assert relay.state.circuits == 1
        assert relay.state.bytes_relayed > 20_000_000
        # Its end is the circuit's end.
        await seeker.disconnect(hidden.peer_id)
        await until(lambda: relay.state.circuits == 0)
        await until(lambda: seeker.peer_id not in hidden.peers())


@pytest.mark.trio
async def test_without_a_reservation_nobody_is_reached() -> None:
    async with three() as (relay, hidden, seeker), node() as (other, _):
        await other.connect(relay.network.addrs()[0])
        with pytest.raises(PeerUnreachable, match="NO_RESERVATION"):
            await seeker.connect(f"{relay.network.addrs()[0]}{CIRCUIT}/p2p/{other.peer_id}")
        relay.state.lost(hidden.peer_id)
        with pytest.raises(PeerUnreachable, match="NO_RESERVATION"):
            await seeker.connect(hidden.addrs()[0])


@pytest.mark.trio
async def test_a_circuit_that_carried_its_share_is_cut_and_another_opens() -> None:
    async with three(RelayLimits(circuit_bytes=1_000_000)) as (relay, hidden, seeker):
        await seeker.connect(hidden.addrs()[0])
        with pytest.raises(BaseExceptionGroup) as caught:
            await echoes(seeker, hidden.peer_id, 2_000_000)
        assert caught.group_contains(PeerUnreachable)
        await until(lambda: relay.state.circuits == 0)
        assert relay.state.bytes_relayed <= 1_000_000
        await seeker.connect(hidden.addrs()[0])
        await echoes(seeker, hidden.peer_id, 100_000)


@pytest.mark.trio
async def test_a_circuit_ends_with_its_time() -> None:
    async with three(RelayLimits(circuit_seconds=0.5)) as (relay, hidden, seeker):
        await seeker.connect(hidden.addrs()[0])
        await until(lambda: relay.state.circuits == 0)
        await until(lambda: hidden.peer_id not in seeker.peers())


@pytest.mark.trio
async def test_another_peer_in_the_place_of_the_one_wanted_is_noticed() -> None:
    """The relay decides where a circuit leads; the handshake decides who is there."""

    class LyingRelay(Relay):
        async def _open(self, source: str, target: str) -> Stream | None:
            (other,) = set(self.state.holders()) - {target}
            return await Relay._open(self, source, other)

    async with three(kind=LyingRelay) as (relay, hidden, seeker):
        wanted = PrivateKey(secrets.token_bytes(32)).public.peer_id
        relay.state.reserve(wanted, "127.0.0.1", trio.current_time())
        with pytest.raises(PeerUnreachable, match="does not correspond"):
            await seeker.connect(f"{relay.network.addrs()[0]}{CIRCUIT}/p2p/{wanted}")
        assert hidden.peer_id not in seeker.peers()


@pytest.mark.trio
@pytest.mark.parametrize("data", [b"", b"\xff" * 10, b"\x00", b"\x02\x08\x09", b"\x05hello", b"\x02\x08\x01"])
async def test_questions_that_make_no_sense_leave_it_relaying(data: bytes) -> None:
    async with three() as (relay, hidden, seeker):
        bad = await seeker.open_stream(Provider(await seeker.connect(relay.network.addrs()[0])), HOP)
        await bad.send_all(data)
        await bad.aclose()
        with trio.fail_after(5):
            try:
                while await bad.receive_some(1000):
                    pass
            except PeerUnreachable:
                pass
        await seeker.connect(hidden.addrs()[0])
        await echoes(seeker, hidden.peer_id, 1000)


@pytest.mark.trio
async def test_relays_are_used_while_nobody_can_connect_and_dropped_after() -> None:
    state: list[State] = ["unknown"]
    async with (
        node(LOCAL) as (middle, _),
        node(LOCAL) as (other, _),
        node() as (hidden, reserving),
        trio.open_nursery() as nursery,
    ):
        relay = Relay(middle, RelayLimits())
        nursery.start_soon(relay.run)
        await until(lambda: HOP in middle.served)
        # Connected to both, it asks the one that says it relays, and nobody it is not connected to.
        await hidden.connect(middle.addrs()[0])
        await hidden.connect(other.addrs()[0])
        use = RelayUse(reserving, lambda: state[0])
        nursery.start_soon(use.run)
        await trio.sleep(0.2)
        assert not hidden.circuits
        state[0] = "private"
        await until(lambda: bool(hidden.circuits))
        assert hidden.circuits == [middle.addrs()[0] + CIRCUIT]
        assert list(relay.state.holders()) == [hidden.peer_id]
        # Too few answers are no reason to give it up; that others can connect is.
        state[0] = "unknown"
        await trio.sleep(2.5)
        assert hidden.circuits
        state[0] = "public"
        await until(lambda: not hidden.circuits)
        async with node() as (seeker, _):
            with pytest.raises(PeerUnreachable):
                await seeker.connect(f"{middle.addrs()[0]}{CIRCUIT}/p2p/{hidden.peer_id}")
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_a_relay_that_refuses_is_given_up() -> None:
    async with (
        node(LOCAL) as (middle, _),
        node() as (hidden, reserving),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(Relay(middle, RelayLimits(reservations=0)).run)
        await until(lambda: HOP in middle.served)
        await hidden.connect(middle.addrs()[0])
        with trio.fail_after(5):
            await reserving.keep_reserved(middle.addrs()[0], tries=2)
        assert not hidden.circuits
        nursery.cancel_scope.cancel()


def test_addresses_change_when_a_relay_is_lost_and_when_it_is_back(
    tmp_path: Path, start_seed: StartSeed
) -> None:
    """`Moved`: the seed says so, and announces what it holds again."""
    file = tmp_path / "tiny.gguf"
    file.write_bytes(tiny_model(2).build())
    relay = start_seed(tmp_path / "relay", "--relay", "--no-mdns")
    other = start_seed(tmp_path / "other", "--no-mdns")
    addr = relay.addr
    hidden = start_seed(
        tmp_path / "hidden", "--no-mdns", "--bootstrap", other.addr, "--relay-via", addr
    )  # fmt: skip
    direct = hidden.addr
    assert hidden.event("moved")["addrs"] == [direct, f"{addr}{CIRCUIT}/p2p/{hidden.peer_id}"]
    assert relay.stop() == 0
    assert hidden.event("moved")["addrs"] == [direct]
    listen = addr.partition("/p2p/")[0]
    start_seed(tmp_path / "relay", "--relay", "--no-mdns", listen=listen)
    assert len(hidden.event("moved", timeout=40)["addrs"]) == 2


@pytest.mark.trio
async def test_what_changes_is_told_once_and_announced_again() -> None:
    """The callback behind `Moved`."""
    told: list[list[str]] = []
    async with node(LOCAL) as (middle, _), node() as (hidden, circuits), trio.open_nursery() as nursery:
        circuits.on_change = lambda: told.append(list(hidden.circuits))
        nursery.start_soon(Relay(middle, RelayLimits()).run)
        await until(lambda: HOP in middle.served)
        nursery.start_soon(circuits.keep_reserved, middle.addrs()[0])
        await until(lambda: bool(told))
        through = middle.addrs()[0] + CIRCUIT
        circuits._set(middle.peer_id, through)
        assert told == [[through]]
        circuits.release(middle.peer_id)
        circuits.release(middle.peer_id)
        assert told == [[through], []]
        nursery.cancel_scope.cancel()


def test_a_model_is_pinned_through_a_relay(
    tmp_path: Path, start_seed: StartSeed, omni: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Four processes: a relay, a seed that gives nobody an address of its own, and one that pins from it."""
    file, home = tmp_path / "tiny.gguf", tmp_path / "publisher"
    file.write_bytes(tiny_model(2, width=128).build())
    cid = json.loads(omni("add", file, "--json", home=home).stdout)["cid"]
    relay = start_seed(tmp_path / "relay", "--relay", "--no-mdns")
    hidden = start_seed(home, "--no-mdns", "--bootstrap", relay.addr, "--relay-via", relay.addr)
    addrs = hidden.event("moved")["addrs"]
    (circuit,) = [addr for addr in addrs if CIRCUIT in addr]
    assert circuit == f"{relay.addr}{CIRCUIT}/p2p/{hidden.peer_id}"
    done = omni("pin", cid, "--peer", circuit, "--json", home=tmp_path / "c")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert Path(report["path"]).read_bytes() == file.read_bytes()
    status = json.loads(omni("status", "--json", home=tmp_path / "relay").stdout)["relay"]
    assert status["reservations"] == 1
    assert status["bytes"] > file.stat().st_size
    # What the DHT says of it has the address too.
    listed = json.loads(
        omni("providers", cid, "--bootstrap", relay.addr, "--json", home=tmp_path / "d").stdout
    )
    assert any(CIRCUIT in addr for one in listed["providers"] for addr in one["addrs"])
    assert hidden.stop() == 0
    assert relay.stop() == 0

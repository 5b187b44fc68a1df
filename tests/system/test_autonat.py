"""Whether others can connect: asked of real nodes, over loopback and across routers."""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from libp2p.host.autonat.pb import autonat_pb2 as pb
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from omnistore.errors import PeerUnreachable
from omnistore.http.client import running_seed
from omnistore.keys import PrivateKey
from omnistore.net import delimited
from omnistore.net.addresses import CIRCUIT
from omnistore.net.autonat import LOOK_EVERY, PROTOCOL, Autonat, DialBackServer
from omnistore.net.dialback import DialBackLimits
from omnistore.net.interface import Provider, Stream
from omnistore.net.libp2p import Libp2pNetwork, NetworkOptions, open_network
from omnistore.net.observed import PROTOCOL as IDENTIFY
from omnistore.net.reachability import Vote
from omnistore.testing.tiny_gguf import tiny_model
from tests.system.machines import PORT, Machine, internet
from tests.system.seeds import SeedProcess

LOCAL = "/ip4/127.0.0.1/tcp/0"
ELSEWHERE = bytes.fromhex("0408080808060001")


@asynccontextmanager
async def pair(**options: Any) -> AsyncIterator[tuple[Libp2pNetwork, DialBackServer]]:
    """One that asks, and one it is connected to, which dials back on this very machine too."""
    async with (
        open_network(PrivateKey(secrets.token_bytes(32)), [LOCAL], NetworkOptions(**options)) as asker,
        open_network(PrivateKey(secrets.token_bytes(32)), [LOCAL], NetworkOptions(**options)) as other,
    ):
        server = DialBackServer(other, DialBackLimits(loopback=True, seconds=2))
        server.install()
        await asker.connect(other.addrs()[0])
        yield asker, server


async def ask(network: Libp2pNetwork, peer: str, addrs: list[str]) -> Vote | None:
    autonat = Autonat(network, _addrs=frozenset(addrs))
    return await autonat._ask_untrusted(peer)


async def raw(network: Libp2pNetwork, peer: str, question: Any) -> Any:
    stream = await network.open_stream(Provider(peer), PROTOCOL)
    await delimited.send(stream, question)
    with trio.fail_after(10):
        answer = await delimited.receive_untrusted(stream, pb.Message)
    await stream.aclose()
    return answer.dialResponse


def dial(peer: str, *addrs: str) -> Any:
    question = pb.Message(type=pb.Message.DIAL)
    question.dial.peer.id = ID.from_base58(peer).to_bytes()
    question.dial.peer.addrs.extend(Multiaddr(addr).to_bytes() for addr in addrs)
    return question


@pytest.mark.trio
@pytest.mark.parametrize("psk", [None, bytes(32)])
async def test_who_listens_is_reached_by_a_new_connection(psk: bytes | None) -> None:
    async with pair(psk=psk) as (asker, server):
        vote = await ask(asker, server.network.peer_id, list(asker.addrs()))
        assert vote is not None
        assert (vote.reached, vote.addr) == (True, asker.addrs()[0].partition("/p2p/")[0])
        assert server.state.outcomes == {"reached": 1, "failed": 0, "refused": 0}
        # It hung up again, and the connection that there was is as it was.
        with trio.fail_after(5):
            while len(asker.host.get_network().get_connections()) > 1:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert server.network.peer_id in asker.peers()


@pytest.mark.trio
async def test_a_closed_port_is_closed_although_they_are_connected() -> None:
    """The library's own says that it is open."""
    async with pair() as (asker, server):
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            closed = f"/ip4/127.0.0.1/tcp/{bound.getsockname()[1]}"
            vote = await ask(asker, server.network.peer_id, [f"{closed}/p2p/{asker.peer_id}"])
        assert vote is not None
        assert not vote.reached
        assert server.state.outcomes["failed"] == 1


@pytest.mark.trio
@pytest.mark.parametrize(
    ("agent", "asked"), [("omni/0.1", 1), ("helia/7.1.15 js-libp2p/3.3.11 node/22.21.0", 0)]
)
async def test_who_would_close_the_connection_for_it_is_not_asked(agent: str, asked: int) -> None:
    async def identify(stream: Stream) -> None:
        said = Identify(agent_version=agent).SerializeToString()
        await stream.send_all(bytes((len(said),)) + said)

    async with pair() as (asker, server):
        server.network.serve(IDENTIFY, identify)
        autonat = Autonat(asker, _addrs=frozenset(asker.addrs()))
        await autonat._ask(server.network.peer_id)
        assert server.state.outcomes["reached"] == asked
        # Not again soon either.
        assert not autonat.votes.to_ask({server.network.peer_id: "127.0.0.1"}, trio.current_time())


@pytest.mark.trio
async def test_somebody_else_at_that_port_is_not_us() -> None:
    async with (
        pair() as (asker, server),
        open_network(PrivateKey(secrets.token_bytes(32)), [LOCAL]) as other,
    ):
        where = other.addrs()[0].partition("/p2p/")[0]
        said = await raw(asker, server.network.peer_id, dial(asker.peer_id, where))
        assert said.status == pb.Message.E_DIAL_ERROR


@pytest.mark.trio
async def test_nobody_is_dialled_for_somebody_else_or_elsewhere() -> None:
    async with pair() as (asker, server):
        peer, own = server.network.peer_id, asker.addrs()[0].partition("/p2p/")[0]
        said = await raw(asker, peer, dial(peer, own))
        assert said.status == pb.Message.E_BAD_REQUEST
        with socket.socket() as victim:
            # A listener at another address of this machine hears nothing.
            victim.bind(("127.0.0.2", 0))
            victim.listen(8)
            victim.settimeout(0.3)
            where = f"/ip4/127.0.0.2/tcp/{victim.getsockname()[1]}"
            many = [where, *(f"/ip4/127.0.0.2/tcp/{port}" for port in range(2, 700))]
            said = await raw(asker, peer, dial(asker.peer_id, *many))
            assert said.status == pb.Message.E_DIAL_REFUSED
            with pytest.raises(TimeoutError):
                victim.accept()
        assert server.state.outcomes == {"reached": 0, "failed": 0, "refused": 1}


@pytest.mark.trio
@pytest.mark.parametrize("data", [b"", b"\xff" * 10, b"\x00", b"\x02\x08\x01", b"\x05hello"])
async def test_questions_that_make_no_sense_leave_it_answering(data: bytes) -> None:
    async with pair() as (asker, server):
        bad = await asker.open_stream(Provider(server.network.peer_id), PROTOCOL)
        await bad.send_all(data)
        await bad.aclose()
        with trio.fail_after(5):
            try:
                while await bad.receive_some(1000):
                    pass
            except PeerUnreachable:
                pass
        vote = await ask(asker, server.network.peer_id, list(asker.addrs()))
        assert vote is not None
        assert vote.reached


@pytest.mark.trio
@pytest.mark.parametrize(
    "answer",
    [
        pb.Message(),
        pb.Message(type=pb.Message.DIAL_RESPONSE),
        pb.Message(
            type=pb.Message.DIAL_RESPONSE,
            dialResponse=pb.Message.DialResponse(status=pb.Message.E_DIAL_REFUSED),
        ),
        pb.Message(
            type=pb.Message.DIAL_RESPONSE,
            dialResponse=pb.Message.DialResponse(status=pb.Message.OK, addr=b"\xff"),
        ),
        # At a port where nobody listens.
        pb.Message(
            type=pb.Message.DIAL_RESPONSE,
            dialResponse=pb.Message.DialResponse(status=pb.Message.OK, addr=ELSEWHERE),
        ),
    ],
)  # fmt: skip
async def test_an_answer_that_says_nothing_is_no_vote(answer: Any) -> None:
    async def server(stream: Stream) -> None:
        await delimited.receive_untrusted(stream, pb.Message)
        await delimited.send(stream, answer)

    async with pair() as (asker, other):
        other.network.serve(PROTOCOL, server)
        assert await ask(asker, other.network.peer_id, list(asker.addrs())) is None


def status(machine: Machine, seed: SeedProcess) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(machine.omni(seed.home, "status", "--json").stdout)["reachability"]
    return found


def test_who_is_public_and_who_is_behind_a_router(tmp_path: Path) -> None:
    with internet() as net:
        every = net.crowd((1, 2, 3), tmp_path)
        # Public: whoever asks three others is told so.
        open_one = net.machine(4)
        reachable = open_one.seed(tmp_path / "open", *every)
        # Behind a router, and on a machine that drops what it did not ask for: not.
        inside, router = net.home(5)
        hidden = inside.seed(tmp_path / "hidden", *every)
        walled = net.machine(6, firewall=True).seed(tmp_path / "walled", *every)
        found = reachable.event("reachability")
        assert (found["state"], found["no"]) == ("public", 0)
        assert found["addrs"] == [f"/ip4/{open_one.host}/tcp/{PORT}"]
        assert walled.event("reachability")["state"] == "private"
        assert hidden.event("reachability")["state"] == "private"
        told = status(inside, hidden)
        assert (told["state"], told["scope"], told["yes"]) == ("private", "public", 0)
        assert told["no"] >= told["needed"] == 3
        assert "--relay-via" in told["remedy"]
        assert "private" in inside.omni(hidden.home, "status").stdout
        # The seed that runs is asked, and tries no ports out.
        assert nat(inside, hidden.home, *every) == ("warning", "private", None)
        assert hidden.stop() == 0
        # Under another name: one peer is dialled back three times a minute.
        assert nat(inside, tmp_path / "new", *every) == ("warning", "private", "ok")
        # With the port forwarded it is, under the router's address, which it learns and hands out.
        router.nft(f'add rule ip nat in iifname "wan0" tcp dport {PORT} dnat to {inside.host}')
        assert nat(inside, hidden.home, *every) == ("ok", "public", None)
        forwarded = inside.seed(tmp_path / "hidden", *every)
        outside = f"/ip4/{router.host}/tcp/{PORT}"
        assert outside in forwarded.event("moved")["addrs"][0]
        assert forwarded.event("reachability")["addrs"] == [outside]


def test_a_confirmed_address_is_still_where_we_listen(tmp_path: Path) -> None:
    """It counted as none of ours any more: the votes were void, those of the only address again and again."""
    with internet() as net:
        every = net.crowd((1, 2, 3), tmp_path)
        machine = net.machine(4)
        seed = machine.seed(tmp_path / "fourth", "--listen", f"/ip4/{machine.host}/tcp/{PORT}", *every)
        assert seed.event("reachability")["state"] == "public"
        time.sleep(3 * LOOK_EVERY)
        assert not [event for event in seed.told() if event["event"] == "reachability"][1:]
        assert status(machine, seed)["state"] == "public"


def test_the_doctor_says_where_no_hole_can_be_punched(tmp_path: Path) -> None:
    with internet() as net:
        every = net.crowd((1, 2, 3), tmp_path)
        inside, router = net.home(5)
        router.nft("flush chain ip nat out")
        router.nft('add rule ip nat out oifname "wan0" masquerade fully-random')
        assert nat(inside, tmp_path / "inside", *every) == ("warning", "private", "warning")


def nat(machine: Machine, home: Path, *args: str) -> tuple[str, str, str | None]:
    """What `omni doctor` finds: its state, the first word, and what it says of hole punching."""
    done = machine.omni(home, "doctor", "--json", "--no-mdns", *args)
    found = {one["check"]: one for one in json.loads(done.stdout)}
    punching = found.get("hole punching", {}).get("state")
    return found["nat"]["state"], found["nat"]["text"].split(":")[0], punching


def test_two_witnesses_are_not_enough(tmp_path: Path) -> None:
    with internet() as net:
        every = net.crowd((1, 2), tmp_path)
        machine = net.machine(3)
        seed = machine.seed(tmp_path / "third", *every)
        seed.event("joined")
        seed.event("joined")
        deadline = time.monotonic() + 20
        while (told := status(machine, seed))["yes"] < 2:
            assert time.monotonic() < deadline, told
            time.sleep(0.2)
        assert (told["state"], told["text"]) == ("unknown", "unknown: 2 of 3 answers that are needed")
        # The home's socket is a file, whatever network one is in.
        assert 'omni_reachability{state="unknown"} 1' in trio.run(metrics, seed.home)


async def metrics(home: Path) -> str:
    seed = await running_seed(home)
    assert seed is not None
    return await seed.text("/metrics")


def test_who_is_private_finds_a_relay_by_itself(tmp_path: Path) -> None:
    """Two homes behind routers and a relay that both can reach: nothing is said of it to either."""
    file = tmp_path / "tiny.gguf"
    file.write_bytes(tiny_model(2, width=128).build())
    with internet() as net:
        relay = net.machine(9)
        (tmp_path / "relay").mkdir()
        every = [*net.crowd((1, 2), tmp_path), "--bootstrap", relay.addr(tmp_path / "relay")]
        relaying = relay.seed(tmp_path / "relay", "--relay", *every)
        relaying.event("ready")
        inside, _ = net.home(5)
        added = inside.omni(tmp_path / "hidden", "add", file, "--json")
        cid = json.loads(added.stdout)["cid"]
        hidden = inside.seed(tmp_path / "hidden", *every)
        assert hidden.event("reachability")["state"] == "private"
        addrs = hidden.event("moved")["addrs"]
        (circuit,) = [addr for addr in addrs if CIRCUIT in addr]
        assert circuit.startswith(relay.addr(tmp_path / "relay"))
        told = status(inside, hidden)
        assert "reached through 1 relay" in told["text"]
        # Another home fetches from it, knowing nothing but where to join.
        elsewhere, _ = net.home(6)
        done = elsewhere.omni(tmp_path / "fetcher", "pin", cid, "--json", "--no-mdns", *every[:2])
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout.splitlines()[-1])
        assert Path(report["path"]).read_bytes() == file.read_bytes()
        assert list(report["peers"]) == [hidden.seen[0]["peer_id"]]

"""Private swarms over real sockets: members meet, everybody else is refused below the handshake."""

from __future__ import annotations

import contextlib
import secrets

import pytest
import trio

from omnistore.errors import PeerUnreachable
from omnistore.keys import PrivateKey
from omnistore.net.interface import Provider, Stream
from omnistore.net.libp2p import Libp2pNetwork, NetworkOptions, open_network

LOCAL = "/ip4/127.0.0.1/tcp/0"
KEY = secrets.token_bytes(32)
PROTOCOL = "/test/echo"


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(1 << 20):
        await stream.send_all(data)


def identity() -> PrivateKey:
    return PrivateKey(secrets.token_bytes(32))


async def ask(network: Libp2pNetwork, provider: Provider, data: bytes) -> bytes:
    stream = await network.open_stream(provider, PROTOCOL)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, data)
        answer = await stream.receive_exactly(len(data))
    await stream.aclose()
    return answer


@pytest.mark.trio
async def test_members_talk_and_strangers_do_not() -> None:
    options = NetworkOptions(psk=KEY, dial_deadline=8)
    async with (
        open_network(identity(), [LOCAL], options) as seed,
        open_network(identity(), [], options) as member,
        open_network(identity(), [], NetworkOptions(psk=secrets.token_bytes(32), dial_deadline=8)) as other,
        open_network(identity(), [], NetworkOptions(dial_deadline=8)) as stranger,
    ):
        seed.serve(PROTOCOL, echo)
        where, _, peer = seed.addrs()[0].rpartition("/p2p/")
        provider = Provider(peer, (where,))
        data = secrets.token_bytes(3 << 20)
        assert await ask(member, provider, data) == data
        for outsider, why in (
            (other, "the pre-shared keys differ"),
            (stranger, "it may be in a private swarm"),
        ):
            with pytest.raises(PeerUnreachable, match=why), trio.fail_after(10):
                await outsider.connect(seed.addrs()[0])
            assert not outsider.peers()
        # Neither is the swarm's node connected to them, nor did they disturb it.
        assert set(seed.peers()) == {member.peer_id}
        assert await ask(member, provider, b"still here") == b"still here"


@pytest.mark.trio
async def test_a_member_does_not_speak_to_the_world_outside() -> None:
    async with (
        open_network(identity(), [LOCAL]) as public,
        open_network(identity(), [], NetworkOptions(psk=KEY, dial_deadline=1)) as member,
    ):
        with pytest.raises(PeerUnreachable), trio.fail_after(10):
            await member.connect(public.addrs()[0])
        assert not public.peers()


@pytest.mark.trio
async def test_what_a_port_scan_learns() -> None:
    async with open_network(identity(), [LOCAL], NetworkOptions(psk=KEY)) as seed:
        port = int(seed.addrs()[0].split("/")[4])
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(b"\x13/multistream/1.0.0\n\x07/noise\n")
            said = b""
            with trio.fail_after(10), contextlib.suppress(trio.BrokenResourceError):
                while piece := await stream.receive_some(1000):
                    said += piece
        assert b"multistream" not in said and b"noise" not in said

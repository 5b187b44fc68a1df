"""Our connections and the library's own understand each other: the bytes on the wire are the same."""

from __future__ import annotations

import secrets
from typing import Any

import blake3
import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.host.ping import PingService, handle_ping
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.network.config import ConnectionConfig
from libp2p.peer.peerinfo import PeerInfo
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from omnistore.cid import CID, RAW
from omnistore.dht.records import provider_key
from omnistore.dht.service import DHTService
from omnistore.keys import PrivateKey
from omnistore.net.interface import Provider, Stream
from omnistore.net.kad_protocol import OwnProtocolHost, protocols
from omnistore.net.kademlia import open_kademlia
from omnistore.net.libp2p import open_network

SIZES = [1, 11, 12, 65_507, 65_508, 65_536, 3_000_000]


def stock() -> Any:
    return new_host(
        key_pair=create_new_key_pair(secrets.token_bytes(32)),
        connection_config=ConnectionConfig(min_connections=0, low_watermark=0),
    )


async def exactly(stream: Any, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += await stream.read(count - len(data))
    return data


async def spoken(host: Any, peer: Any) -> set[str]:
    """The protocols that a peer named in identify, once it did."""
    with trio.fail_after(10):
        while not protocols(host, peer):  # noqa: ASYNC110  # the library has no event for it
            await trio.sleep(0.02)
    return set(protocols(host, peer))


@pytest.mark.trio
@pytest.mark.parametrize("dialler", ["we dial", "they dial"])
async def test_connect_identify_ping_and_bulk(dialler: str) -> None:
    async def our_sink(stream: Stream) -> None:
        hasher = blake3.blake3()
        while data := await stream.receive_some(1 << 20):
            hasher.update(data)
        await stream.send_all(hasher.digest())

    async def their_source(stream: Any) -> None:
        await stream.write(data)
        await stream.close()

    host, data = stock(), secrets.token_bytes(8_000_000)
    host.set_stream_handler("/ipfs/ping/1.0.0", handle_ping)
    host.set_stream_handler("/test/source", their_source)
    async with (
        open_network(PrivateKey(secrets.token_bytes(32)), ["/ip4/127.0.0.1/tcp/0"]) as network,
        host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]),
    ):
        network.serve("/test/sink", our_sink)
        us, them = network.host.get_id(), host.get_id()
        if dialler == "we dial":
            await network.connect(f"{host.get_transport_addrs()[0]}/p2p/{them}")
        else:
            await host.connect(PeerInfo(us, network.host.get_transport_addrs()))
            await spoken(network.host, them)
        with trio.fail_after(20):
            assert {"/ipfs/ping/1.0.0", "/test/source"} <= await spoken(network.host, them)
            assert {"/ipfs/ping/1.0.0", "/test/sink"} <= await spoken(host, us)
            # In whole milliseconds; a wrong answer raises.
            assert len(await PingService(host).ping(us)) == 1
            pinging = await network.open_stream(Provider(str(them)), "/ipfs/ping/1.0.0")
            await pinging.send_all(data[:32])
            assert await pinging.receive_exactly(32) == data[:32]
            await pinging.aclose()
            source = await network.open_stream(Provider(str(them)), "/test/source")
            assert await source.receive_exactly(len(data)) == data
            assert await source.receive_some(1) == b""
            sink = await host.new_stream(us, ["/test/sink"])
            await sink.write(data)
            await sink.muxed_stream.close()
            assert await exactly(sink, 32) == blake3.blake3(data).digest()
        with trio.CancelScope(shield=True):
            await host.close()


@pytest.mark.trio
async def test_streams_both_ways() -> None:
    async def our_echo(stream: Stream) -> None:
        for size in SIZES:
            await stream.send_all(await stream.receive_exactly(size))

    async def their_echo(stream: Any) -> None:
        for size in SIZES:
            await stream.write(await exactly(stream, size))
        await stream.close()

    host = stock()
    async with (
        open_network(PrivateKey(secrets.token_bytes(32)), ["/ip4/127.0.0.1/tcp/0"]) as network,
        host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]),
    ):
        network.serve("/test/ours", our_echo)
        host.set_stream_handler("/test/theirs", their_echo)
        peer = await network.connect(f"{host.get_transport_addrs()[0]}/p2p/{host.get_id()}")
        ours = await network.open_stream(Provider(peer), "/test/theirs")
        # Who dials goes on before the other side knows that all is agreed.
        with trio.fail_after(5):
            while network.host.get_id() not in host.get_connected_peers():  # noqa: ASYNC110  # nobody tells
                await trio.sleep(0.01)
        theirs = await host.new_stream(network.host.get_id(), ["/test/ours"])
        for size in SIZES:
            data = secrets.token_bytes(size)
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ours.send_all, data)
                    assert await ours.receive_exactly(size) == data
                    nursery.start_soon(theirs.write, data)
                    assert await exactly(theirs, size) == data
        assert await ours.receive_some(1) == b""
        with trio.CancelScope(shield=True):
            await host.close()


@pytest.mark.trio
async def test_records_both_ways() -> None:
    host = stock()
    dht = KadDHT(OwnProtocolHost(host), DHTMode.SERVER)
    async with (
        open_network(PrivateKey(secrets.token_bytes(32)), ["/ip4/127.0.0.1/tcp/0"]) as network,
        open_kademlia(network, server=True) as node,
        host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]),
        background_trio_service(dht),
    ):
        await host.connect(PeerInfo(network.host.get_id(), network.host.get_transport_addrs()))
        with trio.fail_after(10):
            while not node.start_peers(b"any"):  # noqa: ASYNC110  # the library has no event for it
                await trio.sleep(0.02)
        service = DHTService(node)
        ours, theirs = (CID.of_digest(RAW, secrets.token_bytes(32)) for _ in range(2))
        assert await service.provide(ours) == 1
        found = await dht.find_providers(provider_key(ours).hex())
        assert [str(info.peer_id) for info in found] == [network.peer_id]
        assert await dht.provide(provider_key(theirs).hex())
        # It does not wait for its announcement to arrive.
        with trio.fail_after(5):
            while not (listed := await service.find_providers(theirs)):  # noqa: ASYNC110  # nor has it an event
                await trio.sleep(0.05)
        assert [provider.peer for provider in listed] == [str(host.get_id())]
        with trio.CancelScope(shield=True):
            await host.close()

"""What went through a network, by peer."""

from __future__ import annotations

import random

import trio
from trio.testing import MockClock

from omnistore.net.interface import Provider, Stream
from omnistore.net.metering import REMEMBERED, MeteredNetwork, Traffic
from omnistore.testing.network import VirtualNetwork


def test_both_ends_count_the_same_bytes() -> None:
    trio.run(_echoed, clock=MockClock(autojump_threshold=0))


async def _echoed() -> None:
    async with trio.open_nursery() as nursery:
        network = VirtualNetwork(nursery, random.Random(1))
        server, client = MeteredNetwork(network.node("server")), MeteredNetwork(network.node("client"))

        async def echo(stream: Stream) -> None:
            await stream.send_all(await stream.receive_exactly(1000))

        server.serve("/echo", echo)
        stream = await client.open_stream(Provider("server"), "/echo")
        assert client.traffic.streams == 1
        await stream.send_all(bytes(1000))
        assert await stream.receive_exactly(1000) == bytes(1000)
        await stream.aclose()
        await stream.aclose()
        await trio.sleep(1)
        for end, other in ((client, "server"), (server, "client")):
            counts = end.traffic.peers()[other]
            assert (end.traffic.sent, end.traffic.received, end.traffic.streams) == (1000, 1000, 0)
            assert (counts.sent, counts.received, counts.streams) == (1000, 1000, 0)
        nursery.cancel_scope.cancel()


def test_peers_long_gone_are_forgotten_and_those_with_streams_never() -> None:
    traffic = Traffic()
    traffic.opened("stays")
    for number in range(REMEMBERED + 50):
        traffic.closed(traffic.opened(f"peer {number}"))
    known = traffic.peers()
    assert len(known) == REMEMBERED + 1
    assert known["stays"].streams == 1
    assert "peer 49" not in known
    assert "peer 50" in known

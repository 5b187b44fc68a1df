"""js-libp2p by itself as a peer, both ways: connections, streams, transfer and the DHT.

The other end is stock js-libp2p, which shares no code with ours nor with py-libp2p; the requester of
the transfer protocol is written from spec/05 alone. Needs `make interop-js`; skipped where it was not run.
"""

from __future__ import annotations

import json
import secrets
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import blake3
import pytest
import trio

from omnistore.cid import CID, RAW
from omnistore.dht.service import DHTService
from omnistore.keys import PrivateKey
from omnistore.net.interface import Provider, Stream
from omnistore.net.kad_protocol import PROTOCOL as KAD
from omnistore.net.kad_protocol import protocols
from omnistore.net.kademlia import open_kademlia
from omnistore.net.libp2p import Libp2pNetwork, open_network
from omnistore.testing.tiny_gguf import tiny_model
from tests.system.js_peer import JsPeer, js_peer, needs_js

if TYPE_CHECKING:
    from tests.system.conftest import StartSeed

pytestmark = needs_js

LOCAL = "/ip4/127.0.0.1/tcp/0"
BULK = 8_000_000
"""Bytes each way: many windows' worth of either muxer."""


@pytest.fixture
def js() -> Iterator[JsPeer]:
    with js_peer() as started:
        yield started


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(1 << 20):
        await stream.send_all(data)


async def identified(network: Libp2pNetwork, peer: str) -> list[str]:
    from libp2p.peer.id import ID

    with trio.fail_after(10):
        while not protocols(network.host, ID.from_base58(peer)):  # noqa: ASYNC110  # no event for it
            await trio.sleep(0.02)
    return list(protocols(network.host, ID.from_base58(peer)))


async def echoed(network: Libp2pNetwork, peer: str, data: bytes) -> bytes:
    stream = await network.open_stream(Provider(peer), "/test/echo")
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(data)
                await stream.aclose()

            nursery.start_soon(send)
            back = await stream.receive_exactly(len(data))
            assert await stream.receive_some(1) == b""
    return back


@pytest.mark.trio
@pytest.mark.parametrize("dialler", ["we dial", "they dial"])
async def test_connect_identify_ping_and_bulk(js: JsPeer, dialler: str) -> None:
    async with open_network(PrivateKey(secrets.token_bytes(32)), [LOCAL]) as network:
        network.serve("/test/echo", echo)
        if dialler == "we dial":
            assert await network.connect(js.addrs[0]) == js.peer
        else:
            dialled = await js.do("dial", network.addrs()[0])
            assert dialled == {"peer": network.peer_id, "limited": False}
        # Identify, read by either side.
        theirs = await identified(network, js.peer)
        assert {"/ipfs/ping/1.0.0", "/test/echo", KAD} <= set(theirs)
        with trio.fail_after(10):
            while "/test/echo" not in (await js.do("identified", network.peer_id))["protocols"]:  # noqa: ASYNC110
                await trio.sleep(0.05)
        told = await js.do("identified", network.peer_id)
        assert [addr.partition("/p2p/")[0] for addr in network.addrs()] == told["addrs"]
        # Ping.
        assert await js.do("ping", network.peer_id) < 5000
        pinging = await network.open_stream(Provider(js.peer), "/ipfs/ping/1.0.0")
        payload = secrets.token_bytes(32)
        await pinging.send_all(payload)
        with trio.fail_after(5):
            assert await pinging.receive_exactly(32) == payload
        await pinging.aclose()
        # Megabytes both ways at once, on streams that either side opened.
        data = secrets.token_bytes(BULK)
        assert await echoed(network, js.peer, data) == data
        theirs_back = await js.do("echo", network.peer_id, BULK)
        assert theirs_back["sent"] == theirs_back["back"]
        sink = await network.open_stream(Provider(js.peer), "/test/sink")
        await sink.send_all(data)
        await sink.aclose()
        with trio.fail_after(20):
            assert await sink.receive_exactly(32) == blake3.blake3(data).digest()


def test_a_part_fetched_over_the_transfer_protocol_and_found_in_the_dht(
    js: JsPeer,
    tmp_path: Path,
    start_seed: StartSeed,
    omni: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    file, home = tmp_path / "tiny.gguf", tmp_path / "publisher"
    file.write_bytes(tiny_model(3, width=256).build())
    added = json.loads(omni("add", file, "--json", home=home).stdout)
    seed = start_seed(home, "--no-mdns")
    assert js.do_now("dial", seed.addr)["peer"] == seed.peer_id
    last = added["parts"][-1]
    fetched = js.do_now("fetch", seed.peer_id, added["cid"])
    assert fetched["part"] == last["cid"]
    assert fetched["blocks"] and fetched["bytes"] <= last["size"]
    assert seed.event("served", peer=js.peer)["bytes"] >= fetched["bytes"]
    # It asks the seed, which answers for its own keys.
    for cid in (added["cid"], last["cid"]):
        found = js.do_now("find", cid)
        assert [provider["peer"] for provider in found] == [seed.peer_id]
        assert seed.addr.partition("/p2p/")[0] in {addr.partition("/p2p/")[0] for addr in found[0]["addrs"]}
    # What it announces is what the command line finds; that it can not be asked for blocks, too.
    js.do_now("provide", added["cid"])
    listed = json.loads(
        omni("providers", added["cid"], "--bootstrap", seed.addr, "--json", home=tmp_path / "other").stdout
    )
    by_peer = {one["peer"]: one for one in listed["providers"]}
    assert set(by_peer) == {seed.peer_id, js.peer}
    assert by_peer[seed.peer_id]["reachable"] and by_peer[seed.peer_id]["bytes_held"]
    assert by_peer[js.peer]["claims"] == 1 and not by_peer[js.peer]["reachable"]
    assert seed.stop() == 0


@pytest.mark.trio
async def test_records_left_with_either_side_are_found_by_the_other(js: JsPeer) -> None:
    """Those of SHA-256 keys: see the next test."""
    key = PrivateKey(secrets.token_bytes(32))
    async with open_network(key, [LOCAL]) as network, open_kademlia(network, server=True) as node:
        await network.connect(js.addrs[0])
        assert await node.meet(js.peer)
        ours = b"\x12\x20" + secrets.token_bytes(32)
        await node.add_provider(Provider(js.peer), ours)
        answer = await node.ask_providers(Provider(js.peer), ours)
        assert [provider.peer for provider in answer.providers] == [network.peer_id]
        theirs = CID.of_digest(RAW, secrets.token_bytes(32))
        await js.do("provide", str(theirs))
        listed = await DHTService(node).find_providers(theirs)
        assert [provider.peer for provider in listed] == [js.peer]
        assert {f"{addr}/p2p/{js.peer}" for addr in listed[0].addrs} == set(js.addrs)


@pytest.mark.trio
async def test_it_keeps_no_records_of_blake3_keys(js: JsPeer) -> None:
    """kad-dht 16 takes the key, a multihash, for a whole CID, which only SHA-256's look like.

    So it finds and announces models through our nodes, but counts as no copy. If this fails, it keeps
    them, and spec/04 §3 can say so.
    """
    key = PrivateKey(secrets.token_bytes(32))
    async with open_network(key, [LOCAL]) as network, open_kademlia(network, server=True) as node:
        await network.connect(js.addrs[0])
        assert await node.meet(js.peer)
        assert await DHTService(node).provide(CID.of_digest(RAW, secrets.token_bytes(32))) == 0

"""Two processes over real sockets: the network does what its interface says, whatever the peer does."""

from __future__ import annotations

import json
import logging
import random
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from omnistore.errors import BadConfig, LocalProtocolError, PeerUnreachable, RemoteProtocolError
from omnistore.keys import PrivateKey
from omnistore.net import frames
from omnistore.net.interface import Provider, Stream
from omnistore.net.libp2p import Libp2pNetwork, NetworkOptions, open_network
from omnistore.net.yamux import TURN, Liveness

PEER = Path(__file__).with_name("peer_process.py")
LOCAL = "/ip4/127.0.0.1/tcp/0"
QUICK = NetworkOptions(dial_deadline=2, open_deadline=2, liveness=Liveness(ping_every=0.2, patience=1))


@dataclass(frozen=True)
class Peer:
    process: subprocess.Popen[str]
    provider: Provider
    addr: str

    @property
    def port(self) -> int:
        return int(self.addr.split("/")[4])


@contextmanager
def peer_process(listen: str = LOCAL) -> Iterator[Peer]:
    with subprocess.Popen([sys.executable, str(PEER), listen], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            yield Peer(
                process,
                Provider(ready["peer_id"], (ready["addrs"][0].partition("/p2p/")[0],)),
                ready["addrs"][0],
            )
        finally:
            process.kill()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with peer_process() as started:
        yield started


def opened(
    listen: str = LOCAL, options: NetworkOptions = QUICK
) -> AbstractAsyncContextManager[Libp2pNetwork]:
    return open_network(PrivateKey(secrets.token_bytes(32)), [listen], options)


@pytest.fixture
async def network() -> AsyncIterator[Libp2pNetwork]:
    async with opened() as running:
        yield running


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  # the library has no event for it
        await trio.sleep(0.02)


async def echoes(network: Libp2pNetwork, provider: Provider, size: int = 3) -> bool:
    """Whether a fresh stream to the peer works."""
    stream = await network.open_stream(provider, "/test/echo")
    data = secrets.token_bytes(size)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            answer = await stream.receive_exactly(size)
    await stream.aclose()
    return answer == data


@pytest.mark.trio
async def test_connect_reaches_the_peer_it_names(peer: Peer, network: Libp2pNetwork) -> None:
    assert await network.connect(peer.addr) == peer.provider.peer
    assert list(network.peers()) == [peer.provider.peer]


@pytest.mark.trio
async def test_bytes_go_both_ways_in_any_amount(peer: Peer, network: Libp2pNetwork) -> None:
    for size in (1, 65_507, 65_508, 5_000_000):
        assert await echoes(network, peer.provider, size)


@pytest.mark.trio
async def test_a_peer_can_open_streams_to_whoever_dialled_it() -> None:
    seen = trio.Event()

    async def server(stream: Stream) -> None:
        assert await stream.receive_exactly(2) == b"hi"
        assert await stream.receive_some(1) == b""
        seen.set()

    async with opened() as dialled, opened() as dialler:
        dialler.serve("/test/back", server)
        await dialler.connect(dialled.addrs()[0])
        # Who dials goes on before the other side knows that all is agreed.
        with trio.fail_after(5):
            while dialler.peer_id not in dialled.peers():  # noqa: ASYNC110  # the library tells nobody
                await trio.sleep(0.01)
        stream = await dialled.open_stream(Provider(dialler.peer_id), "/test/back")
        await stream.send_all(b"hi")
        await stream.aclose()
        with trio.fail_after(5):
            await seen.wait()


@pytest.mark.trio
async def test_an_exception_in_a_server_ends_its_stream_alone(peer: Peer, network: Libp2pNetwork) -> None:
    kept = await network.open_stream(peer.provider, "/test/echo")
    for _ in range(3):
        stream = await network.open_stream(peer.provider, "/test/broken")
        with pytest.raises(PeerUnreachable), trio.fail_after(5):
            # The reset may be here before we send anything.
            await stream.send_all(b"!")
            await stream.receive_exactly(1)
    await kept.send_all(b"still")
    assert await kept.receive_exactly(5) == b"still"


@pytest.mark.trio
async def test_a_stream_that_ends_early_is_an_error_and_a_clean_end_is_not(
    peer: Peer, network: Libp2pNetwork
) -> None:
    stream = await network.open_stream(peer.provider, "/test/echo")
    await stream.send_all(b"abc")
    assert await stream.receive_exactly(3) == b"abc"
    await stream.aclose()
    assert await stream.receive_some(1) == b""
    with pytest.raises(PeerUnreachable, match="2 bytes early"):
        await stream.receive_exactly(2)


@pytest.mark.trio
async def test_bytes_go_into_the_readers_memory(peer: Peer, network: Libp2pNetwork) -> None:
    """However they are cut on the way, mixed with other ways of reading, and up to the end."""
    data = random.Random(3).randbytes(3_000_000)
    stream = await network.open_stream(peer.provider, "/test/echo")

    async def send() -> None:
        await stream.send_all(data[:7], data[7:1_500_000], b"", data[1_500_000:])
        await stream.aclose()

    got = bytearray()
    room = memoryview(bytearray(1 << 20))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        with trio.fail_after(20):
            while count := await stream.receive_into(room):
                got += room[:count]
                got += await stream.receive_some(10)
            assert await stream.receive_into(room) == 0
    assert bytes(got) == data


@pytest.mark.trio
async def test_one_receive_may_fill_one_room_after_the_other(peer: Peer, network: Libp2pNetwork) -> None:
    data = random.Random(5).randbytes(4_000_000)
    stream = await network.open_stream(peer.provider, "/test/echo")
    memory = memoryview(bytearray(len(data)))
    sizes = [4, 30, 1 << 20, 4, 30, 100_000, 1]
    at, given = 0, 0

    def room() -> memoryview:
        nonlocal given
        given += 1
        return memory[at : at + sizes[given % len(sizes)]]

    def more() -> memoryview | None:
        nonlocal at, current
        at += len(current)
        # Now and then there is nowhere to put more.
        current = room() if given % 5 else memory[:0]
        return current or None

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, data)
        with trio.fail_after(20):
            total = 0
            while total < len(data):
                current = room()
                begin = at
                total += await stream.receive_into(current, more)
                # What of the last room is filled, nobody was told.
                at = begin + (total - begin)
    assert bytes(memory) == data
    await stream.reset()


@pytest.mark.trio
async def test_a_task_that_sends_much_lets_others_have_their_turns(
    network: Libp2pNetwork, peer: Peer
) -> None:
    size = 32 << 20
    stream = await network.open_stream(peer.provider, "/test/sink")
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        with trio.fail_after(60):
            await stream.send_all(bytes(size))
        nursery.cancel_scope.cancel()
    assert turns >= size // TURN // 2
    await stream.reset()


@pytest.mark.trio
async def test_a_cancelled_reader_gets_no_more_into_its_memory(network: Libp2pNetwork, peer: Peer) -> None:
    stream = await network.open_stream(peer.provider, "/test/echo")
    room = memoryview(bytearray(1 << 20))
    with trio.move_on_after(0.05):
        await stream.receive_into(room)
    await stream.send_all(b"late")
    assert await stream.receive_exactly(4) == b"late"
    assert bytes(room) == bytes(1 << 20)
    await stream.reset()


@pytest.mark.trio
async def test_a_reset_is_heard_by_who_lent_memory(network: Libp2pNetwork) -> None:
    with peer_process() as short_lived:
        stream = await network.open_stream(short_lived.provider, "/test/deaf")
        short_lived.process.kill()
        with pytest.raises(PeerUnreachable), trio.fail_after(10):
            await stream.receive_into(memoryview(bytearray(1 << 20)))


@pytest.mark.trio
async def test_unknown_protocols_are_refused_by_name(peer: Peer, network: Libp2pNetwork) -> None:
    stream = await network.open_stream(peer.provider, "/test/none")
    with pytest.raises(PeerUnreachable, match="does not speak /test/none"):
        await stream.receive_some(1)
    with pytest.raises(PeerUnreachable):
        await stream.send_all(b"x")


@pytest.mark.trio
async def test_garbage_on_the_port_hurts_nobody(peer: Peer, network: Libp2pNetwork) -> None:
    garbage = [b"", b"\0" * 100, b"GET / HTTP/1.1\r\n\r\n", b"\x13/multistream/1.0.0\n" + b"\xff" * 5000]
    garbage += [secrets.token_bytes(4096) for _ in range(10)]
    for data in garbage:
        with socket.create_connection(("127.0.0.1", peer.port)) as raw:
            raw.sendall(data)
    assert await echoes(network, peer.provider)


@pytest.mark.trio
@pytest.mark.parametrize("fault", ["unknown frame", "lost record"])
async def test_who_breaks_the_framing_is_dropped_alone(
    peer: Peer, network: Libp2pNetwork, fault: str
) -> None:
    kept = await network.open_stream(peer.provider, "/test/echo")
    async with opened() as bad:
        stream = await bad.open_stream(peer.provider, "/test/echo")
        connection = bad.host.get_network().get_connections()[0].muxed_conn
        if fault == "unknown frame":
            connection._core._control += frames.pack(9, 0, 0, 0)
        else:
            connection._sealer._nonce += 1
        with pytest.raises(PeerUnreachable, match=r"the peer closes it \(reason 1\)"), trio.fail_after(5):
            await stream.send_all(b"!")
            await stream.receive_exactly(2)
    await kept.send_all(b"still")
    assert await kept.receive_exactly(5) == b"still"


@pytest.mark.trio
async def test_a_cancelled_send_leaves_other_streams_whole(peer: Peer, network: Libp2pNetwork) -> None:
    kept = await network.open_stream(peer.provider, "/test/echo")
    for delay in (0.0, 0.001, 0.003, 0.01, 0.02):
        stream = await network.open_stream(peer.provider, "/test/echo")
        with trio.move_on_after(delay):
            await stream.send_all(bytes(50_000_000))
        await stream.reset()
    await kept.send_all(b"whole")
    with trio.fail_after(5):
        assert await kept.receive_exactly(5) == b"whole"


@pytest.mark.trio
async def test_a_consumer_that_stalls_does_not_lose_its_stream(network: Libp2pNetwork) -> None:
    """Longer than the five seconds after which the library would have torn it down."""
    with peer_process() as other:
        stream = await network.open_stream(other.provider, "/test/source")
        await stream.receive_exactly(1)
        await trio.sleep(6)
        with trio.fail_after(10):
            assert len(await stream.receive_exactly(20_000_000)) == 20_000_000
        await stream.reset()


@pytest.mark.trio
@pytest.mark.parametrize("protocol", ["/test/echo", "/test/source"])
async def test_a_stopped_peer_is_noticed(network: Libp2pNetwork, protocol: str) -> None:
    with peer_process() as other:
        stream = await network.open_stream(other.provider, protocol)
        other.process.send_signal(signal.SIGSTOP)
        with pytest.raises(PeerUnreachable), trio.fail_after(4):
            while True:
                await stream.receive_exactly(1_000_000)
        with trio.fail_after(2):
            await until(lambda: other.provider.peer not in network.peers())


@pytest.mark.trio
async def test_sending_to_a_stopped_peer_ends(network: Libp2pNetwork) -> None:
    with peer_process() as other:
        stream = await network.open_stream(other.provider, "/test/deaf")
        other.process.send_signal(signal.SIGSTOP)
        with pytest.raises(PeerUnreachable), trio.fail_after(4):
            await stream.send_all(bytes(100_000_000))
        with pytest.raises(PeerUnreachable), trio.fail_after(6):
            await network.open_stream(other.provider, "/test/echo")


@pytest.mark.trio
async def test_a_killed_peer_is_an_error_not_an_end(network: Libp2pNetwork) -> None:
    with peer_process() as other:
        stream = await network.open_stream(other.provider, "/test/echo")
        await stream.send_all(b"abc")
        assert await stream.receive_exactly(3) == b"abc"
        other.process.kill()
        with pytest.raises(PeerUnreachable), trio.fail_after(4):
            await stream.receive_some(1)
        with pytest.raises(PeerUnreachable), trio.fail_after(4):
            await stream.send_all(b"more")


@pytest.mark.trio
async def test_a_peer_killed_in_the_middle_of_a_frame_is_an_error_too(network: Libp2pNetwork) -> None:
    """Never an empty receive, which would mean that the peer was done."""
    with peer_process() as other:
        stream = await network.open_stream(other.provider, "/test/source")
        await stream.receive_exactly(5_000_000)
        other.process.kill()
        with pytest.raises(PeerUnreachable), trio.fail_after(10):
            while await stream.receive_some(1 << 16):
                pass
            raise AssertionError("the stream seemed to end")


@pytest.mark.trio
async def test_a_peer_that_comes_back_is_reached_at_once(network: Libp2pNetwork) -> None:
    """The library would refuse it for a minute after one failed dial."""
    with peer_process() as other:
        addr = other.addr
    with pytest.raises(PeerUnreachable), trio.fail_after(3):
        await network.connect(addr)
    key = PrivateKey(secrets.token_bytes(32))
    port = int(addr.split("/")[4])
    async with open_network(key, [f"/ip4/127.0.0.1/tcp/{port}"]) as first:
        addr = first.addrs()[0]
        await network.connect(addr)
    with pytest.raises(PeerUnreachable), trio.fail_after(3):
        await network.disconnect(key.public.peer_id)
        await network.connect(addr)
    async with open_network(key, [f"/ip4/127.0.0.1/tcp/{port}"]):
        await network.connect(addr)


@pytest.mark.trio
async def test_every_address_of_a_peer_is_tried(peer: Peer, network: Libp2pNetwork) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}"
        many = Provider(peer.provider.peer, (dead, "/ip4/127.0.0.2/tcp/1", *peer.provider.addrs))
        assert await echoes(network, many)


@pytest.mark.trio
async def test_a_dial_takes_milliseconds(peer: Peer, network: Libp2pNetwork) -> None:
    """The library would wait a quarter of a second after each."""
    best = 1.0
    for _ in range(3):
        before = trio.current_time()
        await network.connect(peer.addr)
        best = min(best, trio.current_time() - before)
        await network.disconnect(peer.provider.peer)
    assert best < 0.2


@pytest.mark.trio
async def test_whoever_answers_as_another_peer_is_refused(peer: Peer, network: Libp2pNetwork) -> None:
    impostor = PrivateKey(secrets.token_bytes(32)).public.peer_id
    with pytest.raises(PeerUnreachable, match=impostor):
        await network.connect(f"/ip4/127.0.0.1/tcp/{peer.port}/p2p/{impostor}")


@pytest.mark.trio
async def test_a_silent_port_is_given_up_on(network: Libp2pNetwork) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        nobody = PrivateKey(secrets.token_bytes(32)).public.peer_id
        with pytest.raises(PeerUnreachable, match="2 s"), trio.fail_after(4):
            await network.connect(f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}/p2p/{nobody}")


@pytest.mark.trio
async def test_a_port_where_nobody_listens_is_told_in_few_words(network: Libp2pNetwork) -> None:
    nobody = PrivateKey(secrets.token_bytes(32)).public.peer_id
    with pytest.raises(PeerUnreachable) as caught:
        await network.connect(f"/ip4/127.0.0.1/tcp/1/p2p/{nobody}")
    assert caught.value.message == (
        f"can not reach {nobody}: no address answers (/ip4/127.0.0.1/tcp/1: Connection refused)"
    )


@pytest.mark.trio
async def test_a_port_in_use_is_named(peer: Peer) -> None:
    with pytest.raises(BadConfig, match=f"port {peer.port} is in use"):
        async with opened(f"/ip4/127.0.0.1/tcp/{peer.port}"):
            pass
    with pytest.raises(BadConfig, match=f"port {peer.port} is in use"):
        async with opened(f"/ip4/0.0.0.0/tcp/{peer.port}"):
            pass


@pytest.mark.trio
@pytest.mark.parametrize(
    "listen", ["/ip4/203.0.113.7/tcp/0", "/dns4/localhost/tcp/0", "/ip4/1.2.3/tcp/1", "nonsense"]
)
async def test_what_can_not_be_listened_on_is_named(listen: str) -> None:
    with pytest.raises(BadConfig) as caught:
        async with opened(listen):
            pass
    assert listen in str(caught.value)


@pytest.mark.trio
async def test_wildcards_become_addresses_that_can_be_dialled(network: Libp2pNetwork) -> None:
    async with opened("/ip4/0.0.0.0/tcp/0") as wide:
        addrs = wide.addrs()
        assert addrs
        assert all("/0.0.0.0/" not in addr and "/tcp/0/" not in addr for addr in addrs)
        loopback = next(addr for addr in addrs if addr.startswith("/ip4/127.0.0.1/"))
        assert await network.connect(loopback) == wide.peer_id


@pytest.mark.trio
@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (RuntimeError("a bug"), ["WARNING"]),
        (LocalProtocolError("said out of turn"), ["WARNING"]),
        (RemoteProtocolError("nonsense"), []),
        (PeerUnreachable("gone"), []),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_bug_in_a_server_is_told_and_what_its_peer_did_is_not(
    raised: Exception, told: list[str], network: Libp2pNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "omnistore")

    async def server(stream: Stream) -> None:
        await stream.receive_some(1)
        raise raised

    async with opened() as other:
        other.serve("/test/raises", server)
        stream = await network.open_stream(Provider(await network.connect(other.addrs()[0])), "/test/raises")
        await stream.send_all(b"x")
        with pytest.raises(PeerUnreachable), trio.fail_after(5):
            await stream.receive_exactly(1)
    assert [record.levelname for record in caplog.records] == told


@pytest.mark.trio
async def test_announced_addresses_come_first() -> None:
    options = NetworkOptions(announce=("/dns4/seed.example/tcp/4141",))
    async with opened(options=options) as network:
        assert network.addrs()[0] == f"/dns4/seed.example/tcp/4141/p2p/{network.peer_id}"


@pytest.mark.trio
async def test_leaving_frees_the_port_within_a_second() -> None:
    with trio.fail_after(3):
        async with opened() as first, opened() as second:
            port = int(first.addrs()[0].split("/")[4])
            await second.connect(first.addrs()[0])
    async with opened(f"/ip4/127.0.0.1/tcp/{port}"):
        pass


@pytest.mark.trio
async def test_leaving_does_not_wait_for_a_peer_that_stopped() -> None:
    with peer_process() as other:
        async with opened(options=NetworkOptions()) as network, trio.open_nursery() as nursery:
            stream = await network.open_stream(other.provider, "/test/deaf")
            other.process.send_signal(signal.SIGSTOP)
            nursery.start_soon(stream.send_all, bytes(100_000_000))
            await trio.sleep(0.5)
            before = trio.current_time()
            nursery.cancel_scope.cancel()
        assert trio.current_time() - before < 2


@pytest.mark.trio
async def test_an_error_in_the_body_comes_out_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with opened():
            raise ZeroDivisionError


@pytest.mark.trio
async def test_nobody_is_dialled_unasked(network: Libp2pNetwork) -> None:
    """Knowing a peer's address is no reason to connect to it, nor is losing another."""
    async with opened() as known, opened() as passing:
        host = network.host
        host.get_peerstore().add_addrs(known.host.get_id(), known.host.get_transport_addrs(), 100)
        await passing.connect(network.addrs()[0])
        await passing.disconnect(network.peer_id)
        await until(lambda: not network.peers())
        await trio.sleep(0.5)
        assert not network.peers()


@pytest.mark.trio
async def test_the_node_itself_is_not_dialled(network: Libp2pNetwork) -> None:
    with pytest.raises(PeerUnreachable, match="itself"):
        await network.connect(network.addrs()[0])


@pytest.mark.trio
async def test_connections_do_not_use_up_the_node() -> None:
    """The library frees an inbound connection's slot only when the node stops."""
    async with opened() as seed:
        limiter = seed.host.get_network()._inbound_limiter
        for _ in range(3):
            async with opened() as visitor:
                await visitor.connect(seed.addrs()[0])
                assert limiter.borrowed_tokens == 1
            with trio.fail_after(3):
                await until(lambda: not limiter.borrowed_tokens)

"""One connection: throughput and latency, against raw trio TCP and py-libp2p's own stack in the same run.

    python -m tests.bench.bench_net [--size 512MiB] [--json]

Two processes on loopback. One way: 1 MiB writes until the receiver has confirmed everything. Ping: 8 KiB
there and back on an open stream, alone and while the same connection brings a bulk transfer to us (as
while blocks are fetched), or takes one from us. MB/s of 1e6 bytes, microseconds, the better of two rounds.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import trio

MIB = 1 << 20
PING = 8 << 10
PINGS = 400
KINDS = ("tcp", "own", "stock")


async def sink(stream: Any, size: int) -> None:
    """Take in `size` bytes, then say so."""
    while size:
        data = await stream.receive_some(min(size, MIB))
        if not data:
            return
        size -= len(data)
    await stream.send_all(b"!")


async def source(stream: Any) -> None:
    data = bytes(MIB)
    while True:
        await stream.send_all(data)


async def echo(stream: Any) -> None:
    while data := await exactly(stream, PING):
        await stream.send_all(data)


async def exactly(stream: Any, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = await stream.receive_some(size - len(data))
        if not piece:
            return b""
        data += piece
    return data


async def serve_stream(stream: Any) -> None:
    """The first nine bytes say what is wanted."""
    order = await exactly(stream, 9)
    size = int.from_bytes(order[1:], "big")
    if order[:1] == b"k":
        await sink(stream, size)
    elif order[:1] == b"s":
        await source(stream)
    elif order:
        await echo(stream)


async def serve_tcp() -> None:
    async def run(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            await serve_stream(stream)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print(listeners[0].socket.getsockname()[1], flush=True)
    await trio.serve_listeners(run, listeners)


def open_network() -> Any:
    from omnistore.keys import PrivateKey
    from omnistore.net import libp2p

    return libp2p.open_network(PrivateKey(secrets.token_bytes(32)), ["/ip4/127.0.0.1/tcp/0"])


async def serve_libp2p() -> None:
    async with open_network() as network:
        network.serve("/bench", serve_stream)
        print(network.addrs()[0], flush=True)
        await trio.sleep_forever()


@contextmanager
def process(kind: str) -> Iterator[str]:
    child = subprocess.Popen(
        [sys.executable, "-m", __spec__.name, "--serve", kind], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        yield child.stdout.readline().strip()
    finally:
        child.kill()
        child.communicate()


Opener = Callable[[], Awaitable[Any]]


async def ordered(open_stream: Opener, letter: bytes, size: int = 0) -> Any:
    stream = await open_stream()
    await stream.send_all(letter + size.to_bytes(8, "big"))
    return stream


async def one_way(open_stream: Opener, size: int) -> float:
    stream = await ordered(open_stream, b"k", size)
    data = bytes(MIB)
    started = trio.current_time()
    for _ in range(size // MIB):
        await stream.send_all(data)
    assert await exactly(stream, 1) == b"!"
    return size / (trio.current_time() - started) / 1e6


async def pings(open_stream: Opener, count: int = PINGS) -> tuple[float, float]:
    """Median and 99th percentile, in microseconds."""
    stream = await ordered(open_stream, b"e")
    data, took = bytes(PING), []
    for _ in range(count):
        started = trio.current_time()
        await stream.send_all(data)
        await exactly(stream, PING)
        took.append((trio.current_time() - started) * 1e6)
    return statistics.median(took), sorted(took)[int(count * 0.99)]


async def while_bulk(open_stream: Opener, letter: bytes) -> tuple[float, float]:
    """Pings beside a bulk transfer that never ends."""
    bulk = await ordered(open_stream, letter, 1 << 50)

    async def receive() -> None:
        while await bulk.receive_some(MIB):
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive if letter == b"s" else source, *([] if letter == b"s" else [bulk]))
        await trio.sleep(0.3)
        found = await pings(open_stream)
        nursery.cancel_scope.cancel()
    return found


async def measure(open_stream: Opener, size: int, *, shared: bool) -> dict[str, Any]:
    """`shared`: streams of one connection, so that a ping may meet bulk."""
    found: dict[str, Any] = {"one way": await one_way(open_stream, size), "ping": await pings(open_stream)}
    if shared:
        found["ping, bulk towards us"] = await while_bulk(open_stream, b"s")
        found["ping, bulk from us"] = await while_bulk(open_stream, b"k")
    return found


async def bench(kind: str, addr: str, size: int) -> dict[str, Any]:
    if kind == "tcp":
        return await measure(partial(trio.open_tcp_stream, "127.0.0.1", int(addr)), size, shared=False)
    from omnistore.net.interface import Provider

    async with open_network() as network:
        peer = Provider(await network.connect(addr))
        return await measure(lambda: network.open_stream(peer, "/bench"), size, shared=True)


def run(kind: str, size: int) -> dict[str, Any]:
    """In a process of its own, since the stock muxer is patched in for good."""
    with process(kind) as addr:
        command = [sys.executable, "-m", __spec__.name, "--bench", kind, "--addr", addr, "--size", str(size)]
        found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


def better(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    best: dict[str, Any] = {}
    for name in rounds[0]:
        values = [found[name] for found in rounds]
        best[name] = max(values) if name == "one way" else min(values)
    return best


def show(found: dict[str, dict[str, Any]]) -> None:
    tcp = found["tcp"]
    for kind, figures in found.items():
        rate = figures["one way"]
        print(f"{kind:<8}one way {rate:6.0f} MB/s  {rate / tcp['one way']:5.2f} of raw trio TCP")
        for name, value in figures.items():
            if name != "one way":
                print(f"        {name:<24} p50 {value[0]:7.0f} us  p99 {value[1]:7.0f} us")
    print(f"own / stock: {found['own']['one way'] / found['stock']['one way']:.1f}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="512MiB")
    parser.add_argument("--json", action="store_true")
    for hidden in ("--serve", "--bench", "--addr"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = int(options.size.removesuffix("MiB")) * (MIB if options.size.endswith("MiB") else 1)
    if "stock" in (options.serve, options.bench):
        from tests.bench.stock import use_stock_muxer

        use_stock_muxer()
    if options.serve:
        trio.run(serve_tcp if options.serve == "tcp" else serve_libp2p)
    elif options.bench:
        print(json.dumps(trio.run(bench, options.bench, options.addr, size)))
    else:
        found = {kind: better([run(kind, size) for _ in range(2)]) for kind in KINDS}
        if options.json:
            print(json.dumps(found))
        else:
            show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

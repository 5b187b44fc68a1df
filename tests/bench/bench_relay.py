"""Through a relay, against the same two nodes connected directly, in the same run.

    python -m tests.bench.bench_relay [--size 256MiB] [--rounds 2] [--json]

Three processes on loopback: a node that is reached, a relay, and this one. One way: 1 MiB writes until the
receiver has confirmed everything; ping: 8 KiB there and back on an open stream. Direct and relayed take
turns, the better round of each counts. Every byte of a relayed connection is ciphertext to the relay,
which reads and writes it once more: with a core for each process the limit would be half of what a core
can do; here all three share what there is. MB/s of 1e6 bytes, microseconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio

from tests.bench.bench_net import MIB, better, one_way, open_network, pings, serve_stream


async def serve_relay() -> None:
    from omnistore.net.circuits import RelayLimits
    from omnistore.net.relay import Relay

    async with open_network() as network, trio.open_nursery() as nursery:
        nursery.start_soon(Relay(network, RelayLimits(circuit_bytes=1 << 40)).run)
        await trio.sleep(0.1)
        print(json.dumps(list(network.addrs())), flush=True)
        await trio.sleep_forever()


async def serve_reached(relay: str) -> None:
    from omnistore.net.circuit_transport import Circuits

    async with open_network() as network, trio.open_nursery() as nursery:
        network.serve("/bench", serve_stream)
        circuits = Circuits(network)
        circuits.install()
        nursery.start_soon(circuits.keep_reserved, relay)
        while not network.circuits:  # noqa: ASYNC110  # no event for it
            await trio.sleep(0.05)
        print(json.dumps(list(network.addrs())), flush=True)
        await trio.sleep_forever()


async def measure(addr: str, size: int) -> dict[str, Any]:
    from omnistore.net.circuit_transport import Circuits
    from omnistore.net.interface import Provider

    async with open_network() as network:
        Circuits(network).install()
        peer = Provider(await network.connect(addr))
        opener = lambda: network.open_stream(peer, "/bench")  # noqa: E731  # as bench_net takes it
        return {"one way": await one_way(opener, size), "ping": await pings(opener)}


@contextmanager
def process(*args: str) -> Iterator[list[str]]:
    child = subprocess.Popen([sys.executable, "-m", __spec__.name, *args], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield json.loads(child.stdout.readline())
    finally:
        child.kill()
        child.communicate()


def run(size: int, rounds: int) -> dict[str, dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {"direct": [], "relayed": []}
    with process("--serve-relay") as (relay, *_), process("--serve-reached", relay) as addrs:
        for _ in range(rounds):
            for kind, addr in (("direct", addrs[0]), ("relayed", addrs[-1])):
                found[kind].append(trio.run(measure, addr, size))
    return {kind: better(results) for kind, results in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="256MiB")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve-relay", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve-reached", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_relay:
        trio.run(serve_relay)
        return 0
    if options.serve_reached:
        trio.run(serve_reached, options.serve_reached)
        return 0
    found = run(int(options.size.removesuffix("MiB")) * MIB, options.rounds)
    if options.json:
        print(json.dumps(found))
        return 0
    for kind, figures in found.items():
        p50, p99 = figures["ping"]
        rate = figures["one way"]
        print(
            f"{kind:<9}one way {rate:6.0f} MB/s  {rate / found['direct']['one way']:5.2f} of direct"
            f"   ping p50 {p50:6.0f} us  p99 {p99:6.0f} us  {p50 / found['direct']['ping'][0]:5.2f} of direct"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

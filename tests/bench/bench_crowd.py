"""A flash crowd of processes on real sockets: one seeder and some leechers, all under equal caps.

    python -m tests.bench.bench_crowd [--leechers 6] [--size 128MiB] [--cap 10000000]

Each is an `omni seed` on 127.0.0.1 with the same cap on what it sends and on what it fetches, low enough
that links and not the processor are the limit; they know the seeder's address for the DHT, and find one
another through it. First one leecher alone pins the model, then all at once, each with an empty home.
`last` is the last one's time in multiples of the one alone, `copies` what the seeder sent over the
model's size, `twice` the share of bytes that arrived twice. Exit code 1 beyond 2 times, 3 copies or 2 %,
or when a file is not byte-identical.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from omnistore.cid import CID
from omnistore.http.client import running_seed
from omnistore.pinning import Document, PinRequest
from tests.bench.make_gguf import make_gguf, parsed_size
from tests.soak.leaks import look_at, values_of
from tests.soak.processes import CLI, Node, omni

LOCAL: Final = "/ip4/127.0.0.1/tcp/0"
MOST: Final = {"last": 2.0, "copies": 3.0, "twice": 0.02}
SETTLE: Final = 3.0
"""Seconds for a seeder to announce what it has."""


@dataclass
class Bench:
    """One run."""

    root: Path
    file: Path
    cap: int
    cid: str = ""
    nodes: list[Node] = field(default_factory=list)

    async def start(self, name: str, *args: str) -> Node:
        caps = ("--up-limit", str(self.cap), "--down-limit", str(self.cap))
        command = [*CLI, "seed", "--json", "--no-mdns", "--listen", LOCAL, *caps, *args]
        node = Node(name, command, self.root / name, self.root, "node")
        self.nodes.append(node)
        await node.start()
        return node

    async def pin(self, node: Node, done: list[Document]) -> None:
        """Have one pin the model; what it says at the end, with its wall time."""
        seed = await running_seed(node.home)
        assert seed is not None
        started = time.monotonic()
        said: list[Document] = []
        await seed.pin(PinRequest(CID.parse_untrusted(self.cid)), said.append)
        assert said[-1]["event"] == "done"
        same = await trio.to_thread.run_sync(filecmp.cmp, said[-1]["path"], self.file, False)
        done.append({**said[-1], "wall": time.monotonic() - started, "same": same})


async def sent(node: Node) -> tuple[float, float]:
    """Bytes that a node sent so far, and processor seconds."""
    seed = await running_seed(node.home)
    assert seed is not None
    values = values_of(await seed.text("/metrics"))
    return values["omni_transfer_sent_bytes_total"], values["process_cpu_seconds_total"]


async def crowd(bench: Bench, seeder: Node, names: Sequence[str]) -> dict[str, Any]:
    """All of `names` begin at once."""
    leechers = [await bench.start(name, "--bootstrap", seeder.addr) for name in names]
    await trio.sleep(SETTLE)
    before = [await sent(node) for node in (seeder, *leechers)]
    done: list[Document] = []
    started = time.monotonic()
    async with trio.open_nursery() as nursery:
        for node in leechers:
            nursery.start_soon(bench.pin, node, done)
    took = time.monotonic() - started
    after = [await sent(node) for node in (seeder, *leechers)]
    memory = max(look_at(node.pid)[0] for node in leechers)
    for node in leechers:
        await node.stop()
    size = bench.file.stat().st_size
    return {
        "leechers": len(names),
        "seconds": [round(one["seconds"], 2) for one in done],
        "wall": round(took, 2),
        "copies": (after[0][0] - before[0][0]) / size,
        "twice": sum(one["duplicate_bytes"] for one in done) / (size * len(names)),
        "from_peers": 1 - sum(one["peers"].get(seeder.peer_id, 0) for one in done) / (size * len(names)),
        "cores": sum(b[1] - a[1] for a, b in zip(before, after, strict=True)) / took,
        "rss_mb": round(memory),
        "dropped": [one["dropped"] for one in done if one["dropped"]],
        "same": all(one["same"] for one in done),
    }


async def main(options: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    bench = Bench(root, root / "crowd.gguf", options.cap)
    make_gguf(bench.file, parsed_size(options.size), layers=16, seed=1)
    added = await omni(root / "seeder", "add", bench.file, "--json")
    bench.cid = str(added.last["cid"])
    found = []
    try:
        seeder = await bench.start("seeder")
        await trio.sleep(SETTLE)
        for number in range(options.rounds):
            for count in (1, options.leechers):
                names = [f"{number}-{count}-{one}" for one in range(count)]
                found.append(await crowd(bench, seeder, names))
    finally:
        for node in bench.nodes:
            if node.process is not None and node.process.poll() is None:
                await node.kill()
    alone = min(max(one["seconds"]) for one in found if one["leechers"] == 1)
    for one in found:
        one["last"] = max(one["seconds"]) / alone
        one["median"] = sorted(one["seconds"])[len(one["seconds"]) // 2] / alone
    return found


def show(options: argparse.Namespace, found: Sequence[dict[str, Any]]) -> list[str]:
    """Print it; what is wrong."""
    alone = min(max(one["seconds"]) for one in found if one["leechers"] == 1)
    print(f"{options.size} under caps of {options.cap / 1e6:g} MB/s each way: {alone:.1f} s for one alone")
    print(f"{'leechers':>8}{'median':>9}{'last':>9}{'copies':>9}{'twice':>8}{'from peers':>12}"
          f"{'cores':>8}{'RSS, MB':>9}")  # fmt: skip
    wrong = []
    for one in found:
        row = (
            f"{one['leechers']:>8}",
            f"{one['median']:>8.2f}x",
            f"{one['last']:>8.2f}x",
            f"{one['copies']:>8.2f}x",
            f"{one['twice']:>8.2%}",
            f"{one['from_peers']:>12.0%}",
            f"{one['cores']:>8.2f}",
            f"{one['rss_mb']:>9}",
        )
        print("".join(row))
        wrong += [
            f"{name} {one[name]:.3g}, at most {most}" for name, most in MOST.items() if one[name] > most
        ]
        wrong += [] if one["same"] else ["a file is not byte-identical"]
        wrong += [f"dropped {peer}: {why}" for drops in one["dropped"] for peer, why in drops.items()]
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leechers", type=int, default=6)
    parser.add_argument("--size", default="128MiB")
    parser.add_argument("--cap", type=int, default=10_000_000, help="bytes per second, each way")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        results = trio.run(main, asked, Path(directory))
    if asked.json:
        print(json.dumps(results))
        sys.exit(0)
    faults = show(asked, results)
    print("\n".join(f"WRONG: {fault}" for fault in faults) or "all as it must be")
    sys.exit(1 if faults else 0)

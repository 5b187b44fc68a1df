"""Hundreds of small pins in one running seed, its disk cap evicting: whether anything grows with each.

    python -m tests.soak.pins [--pins 400] [--mib 2] [--trace]

A seed holds a dozen small models; another, whose disk cap takes a third of them, pins one after the other
and lets go of it, with questions in between as people ask them. After a first round its objects are
counted by type and its memory is taken, and again at the end: what grew, by pin. Takes a minute or two;
exit code 1 when a type has a quarter of an object more for each pin, or memory that the allocator can not
give back grew by more than 20 KB a pin.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from omnistore.cid import CID
from omnistore.config import Config
from omnistore.http.client import LocalSeed, running_seed
from omnistore.pinning import PinRequest
from omnistore.store.files import FileStore
from tests.bench.make_gguf import make_gguf
from tests.soak.processes import CLI, Node, omni

LOCAL: Final = "/ip4/127.0.0.1/tcp/0"
MODELS: Final = 12
FIT: Final = 3.9
"""Models that the disk cap leaves room for."""
EACH: Final = 0.25
"""Objects of one type for each pin that are a leak."""
MEMORY: Final = 20_000
"""Bytes for each pin that are one."""


@dataclass
class Counted:
    """One look inside."""

    objects: Mapping[str, int]
    traced: Mapping[str, int]
    python_blocks: int
    rss: int
    trimmed: int
    """Resident memory after the allocator gave back what it could."""


@dataclass
class Run:
    """The two seeds."""

    root: Path
    trace: bool
    cids: list[CID] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)

    async def start(self, name: str, *args: str) -> Node:
        home = self.root / name
        command = [*CLI, "seed", "--json", "--no-mdns", "--listen", LOCAL, *args]
        node = Node(name, command, home, self.root, "long-lived")
        self.nodes.append(node)
        await node.start()
        return node

    async def count(self, node: Node, number: int) -> Counted:
        """Look inside once all is quiet and nothing is held; the `number`th look.

        What a seed knows of the models that it holds is no leak, and how many those are is chance.
        """
        freed = await omni(node.home, "gc", "--json")
        assert freed.code == 0, freed.err
        # The seed hears of it within a second, and ends the announcements that are under way.
        await trio.sleep(5)
        node.signal(signal.SIGUSR2)
        path = self.root / "objects"
        with trio.fail_after(60):
            while not path.exists() or len(path.read_text().split("\n")) <= number:  # noqa: ASYNC110
                await trio.sleep(0.2)
        return Counted(**json.loads(path.read_text().split("\n")[number - 1]))


async def pin_one(run: Run, home: Path, seed: LocalSeed, peer: str, cid: CID, ask: bool) -> None:
    """Pin, look, let go."""
    await seed.pin(PinRequest(cid, peers=(peer,)), lambda event: None)
    if ask:
        for target in ("/v1/status", "/v1/peers", "/metrics"):
            await seed.text(target)
    await trio.to_thread.run_sync(partial(_let_go, home, cid))


def _let_go(home: Path, cid: CID) -> None:
    store = FileStore(Config(home))
    try:
        store.unpin(cid)
    finally:
        store.close()


async def main(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    run = Run(root, options.trace)
    os.environ["SOAK_OBJECTS"] = str(root / "objects")
    if options.trace:
        os.environ["PYTHONTRACEMALLOC"] = "1"
    source = root / "source"
    for number in range(MODELS):
        make_gguf(root / f"{number}.gguf", options.mib << 20, layers=2, seed=number)
        added = await omni(source, "add", root / f"{number}.gguf", "--json")
        run.cids.append(CID.parse_untrusted(str(added.last["cid"])))
    try:
        giver = await run.start("source")
        keeper_home = root / "keeper"
        keeper_home.mkdir(mode=0o700)
        (keeper_home / "config.toml").write_text(f"disk_cap = {int(FIT * (options.mib << 20))}\n")
        keeper = await run.start("keeper", "--bootstrap", giver.addr)
        seed = await running_seed(keeper_home)
        assert seed is not None
        # As long again beforehand: caches fill up, such as SQLite's of statements.
        first = max(2 * MODELS, options.pins)
        looks = []
        rng = random.Random(1)
        for number in range(first + options.pins):
            if number == first:
                looks.append(await run.count(keeper, 1))
            await pin_one(run, keeper_home, seed, giver.addr, rng.choice(run.cids), number % 5 == 0)
        looks.append(await run.count(keeper, 2))
        status = await seed.get("/v1/status")
    finally:
        for node in run.nodes:
            await node.kill()
    return grown(*looks, options.pins, status)


def grown(before: Counted, after: Counted, pins: int, status: Mapping[str, Any]) -> dict[str, Any]:
    """What there is more of, for each pin."""
    more = Counter({name: count - before.objects.get(name, 0) for name, count in after.objects.items()})
    traced = Counter({line: size - before.traced.get(line, 0) for line, size in after.traced.items()})
    return {
        "pins": pins,
        "pins_of_the_seed": status["pins"],
        "models": status["models"],
        "objects": {name: round(count / pins, 3) for name, count in more.most_common(20) if count > 0},
        "traced": {line: round(size / pins) for line, size in traced.most_common(20) if size > 0},
        "python_blocks": (after.python_blocks - before.python_blocks) / pins,
        "rss_mb": [before.rss / 1e6, after.rss / 1e6],
        "trimmed_mb": [before.trimmed / 1e6, after.trimmed / 1e6],
        "bytes_a_pin": (after.trimmed - before.trimmed) / pins,
    }


def show(found: Mapping[str, Any]) -> list[str]:
    """Print it; what is wrong."""
    print(f"{found['pins']} pins; {found['pins_of_the_seed']}, {found['models']} models in the end")
    for name, value in found["objects"].items():
        print(f"  {value:8.3f} a pin  {name}")
    for name, value in found["traced"].items():
        print(f"  {value:8d} B a pin  {name}")
    print(f"resident {found['rss_mb'][0]:.1f} -> {found['rss_mb'][1]:.1f} MB, of it not to be given back "
          f"{found['trimmed_mb'][0]:.1f} -> {found['trimmed_mb'][1]:.1f} MB: "
          f"{found['bytes_a_pin']:.0f} B a pin; {found['python_blocks']:.1f} allocations a pin")  # fmt: skip
    wrong = [f"{name} grows with each pin" for name, value in found["objects"].items() if value >= EACH]
    if found["bytes_a_pin"] > MEMORY:
        wrong.append("memory grows with each pin")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pins", type=int, default=400)
    parser.add_argument("--mib", type=int, default=2, help="size of a model")
    parser.add_argument("--trace", action="store_true", help="with tracemalloc: where it was allocated; slow")
    with tempfile.TemporaryDirectory() as directory:
        faults = show(trio.run(main, parser.parse_args(), Path(directory)))
    print("\n".join(f"WRONG: {fault}" for fault in faults) or "nothing grows")
    sys.exit(1 if faults else 0)

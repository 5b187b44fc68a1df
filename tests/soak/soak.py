"""A swarm that is lived in: seeds for long, fetches again and again, deaths, a liar and a pest.

    python -m tests.soak.soak [--minutes 30] [--json] [--keep DIR] [--seed N]

Processes of `omni` on 127.0.0.1: a bootstrap node; long-lived seeds, two of them capped; a seed whose own
pins come and go under a disk cap and a download cap; two seeds that are killed, stopped for a while and
started again on their home; a peer that lies; a peer that floods, opens streams by the hundred, never
reads, and visits under hundreds of names; a crowd that asks one seed for several times what it may have in
memory and never reads. Meanwhile commands with fresh homes pin whole models and some layers of them, some
killed in between and resumed; several at once fetch from a capped seed alone, one of them under a cap of
its own. What must hold is in `judge`: nothing ends that should not, no error in any log, every pin byte-
identical and verified, caps reached and kept, memory within bounds, offenders named, and nothing of the
long-lived seeds only grows. Takes less than one core; exit code 1 and the faults when something does not
hold. Then the logs are kept, and what each command said that failed, with where its tasks were if it was
stuck.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from tests.bench.make_gguf import make_gguf
from tests.soak import judge
from tests.soak.leaks import Watched, sample
from tests.soak.processes import CLI, Node, Result, omni

LOCAL: Final = "/ip4/127.0.0.1/tcp/0"
FAULTY: Final = Path(__file__).resolve().parent.parent / "system" / "faulty_seed.py"
DEAF: Final = Path(__file__).resolve().parent / "deaf.py"
STRANGER: Final = Path(__file__).resolve().parent / "stranger.py"
SAMPLE_EVERY: Final = 5.0
LEECHERS: Final = 2
"""Commands that fetch at once."""
REST: Final = (1.0, 5.0)
"""Seconds between two commands of one of them: the machine has other work."""
MODELS: Final = {"red": ("24MiB", 0), "green": ("32MiB", 1), "blue": ("16MiB", 2)}
LAYERS: Final = ("0-2", "3", "4-5,head", "0,embed")
CAPS: Final = {"capped-3": 3_000_000, "capped-6": 6_000_000}
"""Upload caps in bytes per second."""
KEEPER_DOWN: Final = 3_000_000
"""Download cap of the seed that pins, in bytes per second."""
SQUEEZE: Final = 3
"""Commands that fetch at once from a capped seed alone."""
SQUEEZE_DOWN: Final = 1_000_000
"""Download cap of one of them, in bytes per second."""
KEEPER_CAP: Final = 45_000_000
"""Bytes of the seed whose pins are evicted: two models fit, three do not."""


@dataclass
class Soak:
    """One run."""

    root: Path
    seconds: float
    rng: random.Random
    started: float = field(default_factory=time.monotonic)
    files: dict[str, Path] = field(default_factory=dict)
    cids: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    watched: dict[str, Watched] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    liar_named: int = 0
    bytes_pinned: int = 0
    over: bool = False
    ended_by: int = 0
    """The signal that ended it early."""

    @property
    def at(self) -> float:
        return time.monotonic() - self.started

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def failed(self, what: str, done: Result) -> None:
        """A fault of one command; what it said is kept."""
        kept = self.logs / f"failed-{len(self.faults)}.txt"
        done.keep(kept)
        self.fault(f"{what} (see {kept.name}): {done.err[-400:]} {done.out[-200:]}")

    def fault(self, text: str) -> None:
        print(f"{self.at:6.0f} s  WRONG: {text}", file=sys.stderr, flush=True)
        self.faults.append(f"at {self.at:.0f} s: {text}")


# --- what it is made of -----------------------------------------------------------------------


def make_models(soak: Soak) -> None:
    """Files to publish; every home that holds one adds it under the same identity."""
    for name, (text, number) in MODELS.items():
        size = int(text.removesuffix("MiB")) << 20
        soak.files[name] = soak.root / f"{name}.gguf"
        make_gguf(soak.files[name], size, layers=6, seed=number)


async def publish(soak: Soak, home: Path, models: list[str]) -> None:
    """Have `home` hold these in place, signed by the one publisher; it keeps an identity of its own."""
    key = soak.root / "publisher.key"
    home.mkdir(mode=0o700)  # noqa: ASYNC240  # nothing else runs yet
    if key.exists():
        shutil.copy2(key, home / "identity.key")
    for name in models:
        added = await omni(home, "add", soak.files[name], "--name", name, "--json")
        if added.code:
            raise SystemExit(f"omni add failed: {added.err}")
        soak.cids[name] = str(added.last["cid"])
    if not key.exists():
        shutil.copy2(home / "identity.key", key)
    (home / "identity.key").unlink()


def seed_node(soak: Soak, name: str, role: str, *args: str, listen: str = LOCAL) -> Node:
    home = soak.root / name
    command = [*CLI, "seed", "--json", "-v", "--log-format", "json", "--no-mdns", "--listen", listen, *args]
    node = soak.nodes[name] = Node(name, command, home, soak.logs, role)
    return node


async def start_seeds(soak: Soak) -> None:
    boot = seed_node(soak, "boot", "bootstrap")
    await boot.start()
    join = ("--bootstrap", boot.addr)
    plans = {
        "plain": (["red", "green", "blue"], ("--http", "127.0.0.1:0")),
        "capped-3": (["red", "blue"], ("--up-limit", str(CAPS["capped-3"]))),
        "capped-6": (["green", "blue"], ("--up-limit", str(CAPS["capped-6"]))),
    }
    for name, (models, args) in plans.items():
        await publish(soak, soak.root / name, models)
        await seed_node(soak, name, "long-lived", *join, *args).start()
    keeper = seed_node(soak, "keeper", "long-lived", *join, "--down-limit", str(KEEPER_DOWN))
    keeper.home.mkdir(mode=0o700)
    (keeper.home / "config.toml").write_text(f"disk_cap = {KEEPER_CAP}\n")
    await keeper.start()
    for number, models in enumerate((["red", "green"], ["blue", "green"])):
        name = f"mortal-{number}"
        await publish(soak, soak.root / name, models)
        await seed_node(soak, name, "mortal", *join).start()
    await start_offenders(soak)


async def start_offenders(soak: Soak) -> None:
    liar = soak.nodes["liar"] = Node(
        "liar",
        [sys.executable, str(FAULTY), str(soak.root / "plain"), "lies", "0"],
        soak.root / "plain",
        soak.logs,
        "liar",
    )
    await liar.start()
    target = soak.nodes["plain"]
    for name, script in (("pest", STRANGER), ("deaf", DEAF)):
        command = [sys.executable, str(script), target.addr, str(soak.root / "plain"), soak.cids["red"]]
        node = soak.nodes[name] = Node(name, command, soak.root, soak.logs, "pest")
        await node.start()


# --- what happens -----------------------------------------------------------------------------


async def leech(soak: Soak, number: int) -> None:
    """Pin with a fresh home, look at what came, forget it; again and again."""
    rounds = 0
    while not soak.over:
        home = soak.root / f"leech-{number}-{rounds}"
        rounds += 1
        await leech_once(soak, home)
        shutil.rmtree(home, ignore_errors=True)
        await trio.sleep(soak.rng.uniform(*REST))


def pin_of(soak: Soak, model: str, *args: str) -> list[str]:
    """A command that says what it does, in case it fails."""
    return ["pin", soak.cids[model], "--json", "-v", "--no-mdns", *args]


async def leech_once(soak: Soak, home: Path) -> None:
    rng, boot = soak.rng, soak.nodes["boot"].addr
    model = rng.choice(list(MODELS))
    args = pin_of(soak, model, "--bootstrap", boot)
    lied_to = rng.random() < 0.3
    if lied_to:
        args += ["--peer", soak.nodes["liar"].addr]
    kind = rng.choice(("whole", "whole", "layers", "layers then whole", "killed"))
    soak.counts[f"pins: {kind}"] += 1
    if kind == "killed":
        # Some die while they look for peers, some in the middle of a file.
        await omni(home, *args, "--down-limit", "8MB/s", kill_after=rng.uniform(0.5, 5.0))
    if kind.startswith("layers"):
        done = await omni(home, *args, "--layers", rng.choice(LAYERS))
        await check_pin(soak, home, model, done, lied_to, whole=False)
    if kind != "layers":
        done = await omni(home, *args)
        await check_pin(soak, home, model, done, lied_to, whole=True)


async def check_pin(soak: Soak, home: Path, model: str, done: Result, lied_to: bool, *, whole: bool) -> None:
    """What must be true of a pin that ended."""
    if done.code:
        soak.failed(f"a pin of {model} ended with {done.code}", done)
        return
    if "Traceback" in done.err:
        soak.failed(f"a pin of {model} printed a traceback", done)
    liar = soak.nodes["liar"].peer_id
    soak.bytes_pinned += int(done.last["bytes_fetched"])
    if done.last["peers"].get(liar):
        soak.fault(f"bytes of the liar counted as verified: {done.last['peers']}")
    if lied_to and liar in done.last["dropped"]:
        soak.liar_named += 1
    for peer in done.last["dropped"].keys() - {liar}:
        # Dead and stopped peers stall; only the liar may be accused of more.
        if "stalled" not in done.last["dropped"][peer] and "too slow" not in done.last["dropped"][peer]:
            soak.failed(f"an honest peer was dropped: {done.last['dropped'][peer]}", done)
    if whole and not await trio.to_thread.run_sync(same, done.last["path"], soak.files[model]):
        soak.failed(f"a pin of {model} is not byte-identical", done)
    verified = await omni(home, "verify", "--json")
    if verified.code or verified.last["faults"] or verified.last["whole"] is not whole:
        soak.failed(f"omni verify after a pin of {model}: {verified.code}", verified)
    soak.counts["pins verified"] += 1


def same(path: str | None, original: Path) -> bool:
    return path is not None and filecmp.cmp(path, original, shallow=False)


async def keep(soak: Soak) -> None:
    """Pin in the running seed `keeper`, let go of it, and let its disk cap and `gc` make room."""
    home = soak.nodes["keeper"].home
    while not soak.over:
        model = soak.rng.choice(list(MODELS))
        done = await omni(home, "pin", soak.cids[model], "--json")
        soak.counts["pins in a seed"] += 1
        if done.code or not await trio.to_thread.run_sync(same, done.last["path"], soak.files[model]):
            soak.failed(f"a pin in the seed: {done.code}", done)
        verified = await omni(home, "verify", "--json", model)
        if verified.code or verified.last["faults"]:
            soak.failed(f"omni verify in the seed's home: {verified.code}", verified)
        let_go = await omni(home, "unpin", soak.cids[model])
        if let_go.code:
            soak.failed(f"omni unpin: {let_go.code}", let_go)
        if soak.rng.random() < 0.3:
            swept = await omni(home, "gc", "--json")
            if swept.code:
                soak.failed(f"omni gc: {swept.code}", swept)
        for command in ("status", "peers"):
            asked = await omni(home, command, "--json")
            if asked.code:
                soak.failed(f"omni {command}: {asked.code}", asked)
        await trio.sleep(soak.rng.uniform(4, 12))


async def squeeze(soak: Soak) -> None:
    """Several at once have nobody to ask but one seed that is capped; one of them is capped itself."""
    rounds = 0
    while not soak.over:
        name, model = soak.rng.choice((("capped-3", "blue"), ("capped-6", "green")))
        async with trio.open_nursery() as nursery:
            for number in range(SQUEEZE):
                home = soak.root / f"squeezed-{rounds}-{number}"
                nursery.start_soon(squeezed, soak, home, name, model, SQUEEZE_DOWN if number == 0 else None)
        rounds += 1
        await trio.sleep(soak.rng.uniform(10, 30))


async def squeezed(soak: Soak, home: Path, seed: str, model: str, cap: int | None) -> None:
    """One of them."""
    args = pin_of(soak, model, "--peer", soak.nodes[seed].addr)
    done = await omni(home, *args, *(("--down-limit", str(cap)) if cap else ()))
    soak.counts["pins: from a capped seed alone"] += 1
    await check_pin(soak, home, model, done, False, whole=True)
    if cap and not done.code:
        # What may pass at once after a pause is a quarter of a second's worth; one block may be on top.
        most = cap * (float(done.last["seconds"]) + 0.25) + (2 << 20)
        if done.last["bytes_fetched"] > most:
            soak.failed(f"a pin under a cap fetched {done.last['bytes_fetched']} bytes of {most:.0f}", done)
    shutil.rmtree(home, ignore_errors=True)


async def churn(soak: Soak) -> None:
    """Kill, stop and start again the seeds that are mortal."""
    while not soak.over:
        await trio.sleep(soak.rng.uniform(6, 20))
        if soak.over:
            return
        node = soak.nodes[soak.rng.choice(["mortal-0", "mortal-1"])]
        if soak.rng.random() < 0.5:
            soak.counts["killed"] += 1
            await node.kill()
            await trio.sleep(soak.rng.uniform(0, 8))
            await node.start()
        else:
            soak.counts["stopped"] += 1
            node.signal(signal.SIGSTOP)
            # Sometimes longer than a connection lives without an answer.
            await trio.sleep(soak.rng.uniform(1, 30))
            node.signal(signal.SIGCONT)


async def watch(soak: Soak) -> None:
    """Look at the long-lived seeds, and whether anybody is gone."""
    while True:
        for node in soak.nodes.values():
            code = None if node.process is None else node.process.poll()
            if code is not None and not node.stopping:
                soak.fault(f"{node.name} ended by itself with {code}")
                node.stopping = True
            if node.role in ("bootstrap", "long-lived") and not node.stopping:
                looked, wrong = await sample(node.home, node.pid, soak.at)
                if wrong:
                    soak.fault(f"{node.name}: {wrong}")
                soak.watched.setdefault(node.name, Watched(node.name)).samples.append(looked)
        await trio.sleep(SAMPLE_EVERY)


async def live(soak: Soak) -> None:
    """Everything for the given time, then quiet, so that what is left over can be counted."""
    async with trio.open_nursery() as watching:
        watching.start_soon(watch, soak)
        async with trio.open_nursery() as nursery:
            for number in range(LEECHERS):
                nursery.start_soon(leech, soak, number)
            nursery.start_soon(keep, soak)
            nursery.start_soon(squeeze, soak)
            nursery.start_soon(churn, soak)
            nursery.start_soon(tell_time, soak)
            await trio.sleep(soak.seconds)
            soak.over = True
        for name in ("pest", "deaf", "liar"):
            await soak.nodes[name].stop()
        await trio.sleep(judge.SETTLING)
        watching.cancel_scope.cancel()


async def tell_time(soak: Soak) -> None:
    while not soak.over:
        await trio.sleep(30)
        print(f"{soak.at:6.0f} s  {dict(soak.counts)}", file=sys.stderr, flush=True)


async def run(soak: Soak) -> dict[str, Any]:
    soak.logs.mkdir()
    await trio.to_thread.run_sync(make_models, soak)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_on_signal, soak, nursery.cancel_scope)
            await start_seeds(soak)
            soak.started = time.monotonic()
            await live(soak)
            await judge.check_end(soak)
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            for node in soak.nodes.values():
                if node.process is not None and node.process.poll() is None:
                    node.process.kill()
                    await node.process.wait()
    if soak.ended_by:
        return {}
    return judge.verdict(soak)


async def end_on_signal(soak: Soak, everything: trio.CancelScope) -> None:
    """Ended from outside, take every process along."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            soak.fault(f"ended by signal {number}")
            soak.ended_by = number
            everything.cancel()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="work here and leave everything, logs above all")
    parser.add_argument("--seed", type=int, help="of the random choices; printed when not given")
    options = parser.parse_args()
    number = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {number}", file=sys.stderr)
    with ExitStack() as stack:
        root = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(exist_ok=True, parents=True)
        soak = Soak(root, options.minutes * 60, random.Random(number))
        try:
            found = trio.run(run, soak)
        finally:
            if soak.faults and not options.keep and soak.logs.exists():
                kept = tempfile.mkdtemp(prefix="omni-soak-")
                shutil.copytree(soak.logs, kept, dirs_exist_ok=True)
                print(f"the logs are in {kept}", file=sys.stderr)
    if soak.ended_by:
        return 128 + soak.ended_by
    say: Callable[[str], None] = print
    if options.json:
        say(json.dumps(found))
    else:
        judge.show(found, say)
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())

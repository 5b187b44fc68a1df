"""`omni pin` over links with delay and loss, against one plain TCP stream over the same link.

    python -m tests.bench.bench_wan [--size 100MiB] [--rounds 2] [--congestion NAME] [--json]

The link is `tests.bench.link`'s: 200 Mbit/s both ways between two network namespaces made here, so it needs
root; without, it says so and does nothing. Three links: the rate alone, with 50 ms there and back, and with
1 % of all packets lost besides; on the last also from two seeders, that is, two connections. In each round
the plain stream (trio, one connection, the same bytes) goes first, then the pins, in turns; the better round
counts, for both. The stream is timed from the ask to the last byte there, a pin by its own `seconds`, which
end with everything on the disk. Every pinned file is compared byte for byte. MB/s of 1e6 bytes of file.
On a machine that is too slow for it, fewer rounds are run; what hangs is ended after five minutes.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trio

from tests.bench.bench_transfer import CLI, MIB, PATIENCE, Bench, add, peer_args, process
from tests.bench.link import Link, PathShape
from tests.bench.make_gguf import main as make_gguf

RATE = 25e6
"""Bytes per second: 200 Mbit/s."""
LINKS = {
    "200 Mbit/s": PathShape(RATE),
    "50 ms": PathShape(RATE, delay=0.025),
    "50 ms, 1 % loss": PathShape(RATE, delay=0.025, loss=0.01),
}
TWO_SEEDERS = "50 ms, 1 % loss"
PORT = 4200
LATE_SHARE = 0.01
"""Share of late packets above which the figures say something about this machine, not the link."""
ENOUGH = 150.0
"""Seconds after which no link gets another round."""
MOST = 290
"""Seconds after which the whole is given up; all that it started ends with it."""


# --- the plain stream -----------------------------------------------------------------------


async def send_plain(host: str, size: int) -> None:
    """Whoever connects and sends a byte gets `size` bytes."""

    async def give(stream: trio.SocketStream) -> None:
        data = bytes(MIB)
        if await stream.receive_some(1):
            for start in range(0, size, MIB):
                await stream.send_all(data[: size - start])

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(PORT, host=host)
        print(json.dumps({"addrs": [host]}), flush=True)
        await trio.serve_listeners(give, listeners, handler_nursery=nursery)


async def take_plain(host: str) -> dict[str, float]:
    """Take everything: MB/s from the ask to the last byte, and the seconds that connecting took."""
    started = trio.current_time()
    stream = await trio.open_tcp_stream(host, PORT)
    asked, count = trio.current_time(), 0
    await stream.send_all(b"?")
    while data := await stream.receive_some(MIB):
        count += len(data)
    seconds = trio.current_time() - asked
    return {"rtt": asked - started, "rate": count / seconds / 1e6}


def plain(link: Link) -> dict[str, float]:
    command = [*link.inside(1), sys.executable, "-m", __spec__.name, "--take", link.address(0)]
    found: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


# --- the bench ------------------------------------------------------------------------------


@contextmanager
def seeding(bench: Bench, link: Link, home: str, port: int) -> Iterator[str]:
    listen = f"/ip4/{link.address(0)}/tcp/{port}"
    command = [*link.inside(0), *CLI, "seed", "--json", "--no-mdns", "--listen", listen]
    with process(command, bench.environ(home)) as addr:
        yield addr


def pin(bench: Bench, cid: str, addrs: list[str], link: Link) -> dict[str, Any]:
    """Pin in a fresh home; what it reported, `asked`, the seconds until it asked for the first block of a
    tensor, and `bulk`, MB/s from then to the last block verified.
    """
    peers = peer_args(addrs)
    child = subprocess.Popen(
        [*link.inside(1), *CLI, "pin", cid, "--json", "--quiet", "--no-mdns", *peers],
        env=bench.environ(bench.fresh("pin")),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    try:
        # The first progress is told when the first such block is asked for, the last when all are there.
        told = [(time.perf_counter(), json.loads(line)) for line in child.stdout]
        child.wait(PATIENCE)
    finally:
        child.kill()
        child.communicate()
    if child.returncode:
        raise SystemExit(f"omni pin failed with {child.returncode}")
    (ended, done), (first, _), (last, _) = told[-1], told[0], told[-2]
    done["rate"] = done["bytes_fetched"] / done["seconds"] / 1e6
    done["asked"] = done["seconds"] - (ended - first)
    done["bulk"] = done["bytes_fetched"] / (last - first) / 1e6
    done["identical"] = filecmp.cmp(done["path"], bench.file, shallow=False)
    return dict(done)


def over(
    bench: Bench, cid: str, name: str, congestion: str | None, rounds: int, until: float
) -> dict[str, Any]:
    """All there is to measure over one link, the best of each. Only a first round begins after `until`."""
    cases: dict[str, list[dict[str, Any]]] = {"tcp": [], "omni": []}
    with ExitStack() as stack:
        link = stack.enter_context(Link(LINKS[name], congestion))
        sender = [*link.inside(0), sys.executable, "-m", __spec__.name]
        stack.enter_context(
            process([*sender, "--send", link.address(0), "--bytes", str(bench.size)], bench.environ("a"))
        )
        seeds = [stack.enter_context(seeding(bench, link, "a", 4141))]
        if name == TWO_SEEDERS:
            seeds.append(stack.enter_context(seeding(bench, link, "b", 4142)))
            cases["omni, two seeders"] = []
        for number in range(rounds):
            if number and time.perf_counter() > until:
                break
            for case, found in cases.items():
                if case == "tcp":
                    found.append(plain(link))
                    continue
                addrs = seeds if "two" in case else seeds[:1]
                found.append(pin(bench, cid, addrs, link))
    best = {case: max(found, key=lambda one: float(one["rate"])) for case, found in cases.items()}
    return {**best, "all": cases, "link": [asdict(one) for one in link.carried]}


def check(found: dict[str, Any]) -> list[str]:
    faults = []
    for name, one in found.items():
        pins = [done for case, all_ in one["all"].items() if case != "tcp" for done in all_]
        if not all(done["identical"] for done in pins):
            faults.append(f"{name}: a pinned file differs")
        if any(done["dropped"] for done in pins):
            faults.append(f"{name}: an honest peer was dropped")
    return faults


def show(found: dict[str, Any]) -> None:
    for name, one in found.items():
        tcp = one["tcp"]
        sent = one["link"][0]
        late, packets = (sum(way[key] for way in one["link"]) for key in ("late", "packets"))
        if late > LATE_SHARE * packets:
            print(f"{late} of {packets} packets were late, the machine being busy: these figures are too low")
        print(
            f"{name}: {tcp['rtt'] * 1e3:.0f} ms to connect; {sent['packets']} packets towards us,"
            f" {sent['lost']} lost, {sent['overflowed']} too many, {sent['late']} late"
        )
        for case, rounds in one["all"].items():
            best = one[case]
            line = f"  {case:<20}{best['rate']:6.1f} MB/s  {best['rate'] / tcp['rate']:5.2f} of TCP"
            if case != "tcp":
                line += (
                    f"  first ask after {best['asked']:.2f} s, then {best['bulk'] / tcp['rate']:5.2f} of TCP"
                )
            print(line, " rounds:", *(f"{done['rate']:.1f}" for done in rounds))


def measure(size: str, rounds: int, congestion: str | None) -> dict[str, Any]:
    until = time.perf_counter() + ENOUGH
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        file = root / "bench.gguf"
        with redirect_stdout(sys.stderr):
            make_gguf([str(file), "--size", size])
        bench = Bench(root, file)
        cid = add(bench)
        return {name: over(bench, cid, name, congestion, rounds, until) for name in LINKS}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="100MiB")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--congestion", help="TCP's, for omni and the plain stream alike; else the kernel's own"
    )
    parser.add_argument("--json", action="store_true")
    for hidden in ("--send", "--take", "--bytes"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.send:
        trio.run(send_plain, options.send, int(options.bytes))
        return 0
    if options.take:
        print(json.dumps(trio.run(take_plain, options.take)))
        return 0
    try:
        with Link(LINKS["200 Mbit/s"], options.congestion) as link:
            congestion = link.congestion(0)
    except (RuntimeError, OSError) as error:
        print(f"skipped: no link can be made here (root, iproute2 and TUN needed): {error}")
        return 0
    # Ended from outside, it takes its namespaces and processes along all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"given up after {MOST} s: something hangs"))
    signal.alarm(MOST)
    started = time.perf_counter()
    found = measure(options.size, options.rounds, options.congestion)
    faults = check(found)
    if options.json:
        print(json.dumps({**found, "congestion": congestion, "faults": faults}))
    else:
        print(f"{options.size}, TCP congestion control {congestion}, {options.rounds} rounds")
        show(found)
        print(f"{time.perf_counter() - started:.0f} s")
        print("\n".join(f"WRONG: {fault}" for fault in faults) or "all as it must be")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

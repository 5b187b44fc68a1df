"""omni beside what people fetch models with today, in one run on one machine.

    python -m tests.bench.bench_peers [--size 1GiB] [--rounds 2] [--json]

One GGUF goes over loopback to disk and is verified; each contender gets the settings that suit it, and the
best of its rounds counts. Limits are raw trio TCP and one-thread BLAKE3, measured before and after (the
better counts). MB/s of 1e6 bytes: a fetch counts from the first byte to the last one verified (curl's and
aria2c's from their start: milliseconds), an add from the start of the program, in a home that is there,
to its end; `wall` always includes starting the programs. Every file is compared byte for byte. What is not
installed is skipped by name: libtorrent and iroh come with `make peers`, the rest with the system's packages.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench import bench_transfer as transfer
from tests.bench.bench_transfer import CAP, Bench
from tests.bench.make_gguf import main as make_gguf
from tests.bench.peers import swarms, web
from tests.bench.peers.rows import MissingError, Row, best

FETCH, ADD, CAPPED = "fetching", "adding", f"two seeders of {CAP // 1_000_000} MB/s each"
OURS = "libp2p over TCP, Noise; every block verified before it is written, fsync at the end"


@dataclass
class Race:
    """One run: what to measure, and the rows found so far by group and name."""

    bench: Bench
    rounds: int
    rows: dict[str, dict[str, dict[str, Any]]] = field(
        default_factory=lambda: {FETCH: {}, CAPPED: {}, ADD: {}}
    )

    @property
    def file(self) -> Path:
        return self.bench.file

    def measure(self, group: str, name: str, one: Callable[[], Row]) -> None:
        try:
            self.rows[group][name] = best(self.rounds, one).found(self.bench.size)
        except MissingError as missing:
            self.skip(group, name, missing)

    def skip(self, group: str, name: str, missing: MissingError) -> None:
        self.rows[group][name] = {"skipped": str(missing)}


def pinned(bench: Bench, cid: str, addrs: list[str]) -> Row:
    done = transfer.pin(bench, cid, addrs, home=bench.fresh("pin"))
    return Row(done["seconds"], done["wall"], done["rss"], OURS, done["identical"])


def added(bench: Bench, *args: str) -> Row:
    """In a home that exists and holds nothing."""
    bench.omni(bench.fresh("added"), "id")
    started = time.perf_counter()
    _, rss = bench.measured("added", "add", bench.file, "--json", *args)
    wall = time.perf_counter() - started
    return Row(wall, wall, rss, "referenced where it lies" if not args else "copied into the store")


def omni(race: Race) -> None:
    bench = race.bench
    race.measure(ADD, "omni add", partial(added, bench))
    race.measure(ADD, "omni add --copy", partial(added, bench, "--copy"))
    bench.fresh("added")
    cid = transfer.add(bench)
    with ExitStack() as stack:
        both = [stack.enter_context(transfer.seed(bench, home)) for home in ("a", "b")]
        race.measure(FETCH, "omni pin, 1 seeder", partial(pinned, bench, cid, both[:1]))
        race.measure(FETCH, "omni pin, 2 seeders", partial(pinned, bench, cid, both))
    with ExitStack() as stack:
        capped = ("--up-limit", str(CAP))
        both = [stack.enter_context(transfer.seed(bench, home, *capped)) for home in ("a", "b")]
        race.measure(CAPPED, "omni pin", partial(pinned, bench, cid, both))
    bench.fresh("pin")


def http(race: Race) -> None:
    """nginx, and those who fetch from it."""
    out = race.bench.root / "fetched"
    contenders = {
        "curl | tee | sha256sum": partial(web.curl, script=web.PIPED),
        "curl, then sha256sum": partial(web.curl, script=web.IN_TURN),
        f"aria2c, {web.CONNECTIONS} connections": web.aria2,
    }
    try:
        with web.nginx(race.bench.root / "nginx", race.file) as url:
            for name, one in contenders.items():
                race.measure(FETCH, name, partial(one, url, out, race.file))
    except MissingError as missing:
        for name in contenders:
            race.skip(FETCH, name, missing)


def torrents(race: Race) -> None:
    one, two, name = "libtorrent, 1 seeder", "libtorrent, 2 seeders", "libtorrent"
    try:
        swarms.need("libtorrent")
    except MissingError as missing:
        for group, what in ((ADD, name), (FETCH, one), (FETCH, two), (CAPPED, name)):
            race.skip(group, what, missing)
        return
    file, torrent, root = race.file, race.bench.root / "it.torrent", race.bench.root / "torrent"
    race.measure(ADD, name, partial(swarms.torrent_create, file, torrent))
    get = partial(swarms.torrent_get, file, torrent, root)
    with ExitStack() as stack:
        both = [stack.enter_context(swarms.torrent_seed(file, torrent)) for _ in range(2)]
        race.measure(FETCH, one, partial(get, both[:1]))
        race.measure(FETCH, two, partial(get, both))
    with ExitStack() as stack:
        both = [stack.enter_context(swarms.torrent_seed(file, torrent, CAP)) for _ in range(2)]
        race.measure(CAPPED, name, partial(get, both))
    shutil.rmtree(root)


def iroh(race: Race) -> None:
    name, root = "iroh", race.bench.root / "iroh"
    try:
        swarms.need("iroh")
        swarms.need_namespaces()
    except MissingError as missing:
        race.skip(ADD, name, missing)
        race.skip(FETCH, name, missing)
        return
    race.measure(ADD, name, partial(swarms.iroh_add, race.file, root))
    with swarms.iroh_seed(race.file, race.bench.root / "iroh-seed") as addr:
        race.measure(FETCH, name, partial(swarms.iroh_get, race.file, root, addr))
    shutil.rmtree(root)


def run(race: Race) -> dict[str, Any]:
    blake, tcp = transfer.hashing_rate(race.file), transfer.tcp_rate()
    for contender in (omni, http, torrents, iroh):
        contender(race)
    blake, tcp = max(blake, transfer.hashing_rate(race.file)), max(tcp, transfer.tcp_rate())
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    limits = {"blake3": blake, "tcp": tcp, "rss_floor": floor}
    return {"size": race.bench.size, "rounds": race.rounds, **limits, "rows": race.rows}


def show(found: dict[str, Any], say: Callable[[str], None]) -> None:
    tcp = found["tcp"]
    say(f"{found['size'] / 1e6:.0f} MB, best of {found['rounds']}, ratios to raw trio TCP")
    say(f"{'raw trio TCP':<25}{tcp:6.0f} MB/s")
    say(f"{'one-thread BLAKE3':<25}{found['blake3']:6.0f} MB/s  {found['blake3'] / tcp:5.2f}")
    for group, rows in found["rows"].items():
        say(f"\n{group}")
        for name, row in sorted(rows.items(), key=lambda item: -item[1].get("rate", 0)):
            if "skipped" in row:
                say(f"{name:<25}skipped: {row['skipped']}")
                continue
            figures = f"{row['rate']:6.0f} MB/s  {row['rate'] / tcp:5.2f}  wall {row['wall']:5.1f} s"
            # A child's figure begins with what it was forked from: ours.
            most = "≤" if row["rss"] <= 1.02 * found["rss_floor"] else " "
            say(f"{name:<25}{figures} {most}{row['rss']:4.0f} MB RSS  {row['settings']}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1GiB")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least one is needed")
    transfer.compile_as_installed()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "files").mkdir()
        file = root / "files" / "bench.gguf"
        with redirect_stdout(sys.stderr):
            make_gguf([str(file), "--size", options.size])
        found = run(Race(Bench(root, file), options.rounds))
    wrong = [
        f"{name}, {group}: other bytes"
        for group, rows in found["rows"].items()
        for name, row in rows.items()
        if not row.get("identical", True)
    ]
    if options.json:
        print(json.dumps({**found, "faults": wrong}))
    else:
        show(found, print)
        print("\n".join(f"WRONG: {fault}" for fault in wrong) or "\nevery file is byte-identical")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

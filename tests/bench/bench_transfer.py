"""`omni add` and `omni pin` at full size, between processes, against what the machine can do.

    python -m tests.bench.bench_transfer [--size 1GiB] [--json] [--keep DIR]

Makes a GGUF, adds it in two homes, and pins it: from one seeder, from two, with one of two lying,
killed at 40 % and resumed, and with `--layers 0-3` only; from two that are capped at 50 MB/s each; and once
more from one with both sides on py-libp2p's own muxer. Every pinned file is compared byte for byte. Ratios
are to one-thread BLAKE3 and to raw trio TCP over loopback, measured before and after in the same
run (the better counts). Figures are MB/s of 1e6 bytes; a pin's rate counts from the first byte asked to
the last written (its own `seconds`), `wall` includes starting Python and the network.
"""

from __future__ import annotations

import argparse
import compileall
import filecmp
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio
from blake3 import blake3

from tests.bench.make_gguf import main as make_gguf

MIB = 1 << 20
TCP_BYTES = 512 * MIB
PATIENCE = 180
"""Seconds that one command may take."""
FAULTY = Path(__file__).resolve().parent.parent / "system" / "faulty_seed.py"
CLI = (sys.executable, "-m", "omnistore.cli.main")
STOCK = (sys.executable, "-m", "tests.bench.stock")
CAP = 50_000_000
"""Bytes per second of a capped seeder."""
MOST_RSS = 150
"""MB that a fetch may take, whatever the model's size."""


@dataclass
class Bench:
    """One run: where things are, and what was found."""

    root: Path
    file: Path
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.file.stat().st_size

    def omni(self, home: str, *args: object, cli: Sequence[str] = CLI) -> str:
        return self.measured(home, *args, cli=cli)[0]

    def measured(self, home: str, *args: object, cli: Sequence[str] = CLI) -> tuple[str, float]:
        """What it printed, and the most memory it took, in MB."""
        return measured([*cli, *map(str, args)], self.environ(home))

    def environ(self, home: str) -> dict[str, str]:
        return {**os.environ, "OMNI_HOME": str(self.root / home)}

    def fresh(self, home: str) -> str:
        shutil.rmtree(self.root / home, ignore_errors=True)
        return home


def compile_as_installed() -> None:
    """What a package manager does on installing: else each start may compile what it imports."""
    for name in ("omnistore", "omninfer"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        compileall.compile_dir(Path(spec.origin).parent, quiet=2)


def measured(command: Sequence[str], environ: dict[str, str] | None = None) -> tuple[str, float]:
    """What a command printed, and the most memory that it, or one of its children, took, in MB."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True
        )
        # Not `wait`: this one tells what was used.
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} failed with {child.returncode}: {err.read()}")
        return out.read(), used.ru_maxrss * 1024 / 1e6


@contextmanager
def process(command: Sequence[str], environ: dict[str, str] | None = None) -> Iterator[str]:
    """A seed for the length of the block: its first address."""
    child = subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert child.stdout is not None
        # Whatever it says before it is ready is not for us.
        ready = next((event for line in child.stdout if "addrs" in (event := json.loads(line))), None)
        if ready is None:
            raise SystemExit(f"{' '.join(command)} ended before it was ready")
        yield str(ready["addrs"][0])
    finally:
        child.kill()
        child.communicate()


def seed(bench: Bench, home: str, *args: str, cli: Sequence[str] = CLI) -> Any:
    listen = "/ip4/127.0.0.1/tcp/0"
    return process([*cli, "seed", "--json", "--listen", listen, *args], bench.environ(home))


def liar(bench: Bench, home: str) -> Any:
    return process([sys.executable, str(FAULTY), str(bench.root / home), "lies", "50"], bench.environ(home))


def peer_args(addrs: list[str]) -> list[str]:
    return [word for addr in addrs for word in ("--peer", addr)]


def pin(
    bench: Bench, cid: str, addrs: list[str], *args: str, home: str = "pin", cli: Sequence[str] = CLI
) -> dict[str, Any]:
    """Pin, and what it reported in the end; `wall` is the whole command's time."""
    started = time.perf_counter()
    out, rss = bench.measured(home, "pin", cid, "--json", *peer_args(addrs), *args, cli=cli)
    done: dict[str, Any] = json.loads(out.splitlines()[-1])
    done["wall"], done["rss"] = time.perf_counter() - started, rss
    done["rate"] = done["bytes_fetched"] / max(done["seconds"], 1e-3) / 1e6
    if not args:
        done["identical"] = filecmp.cmp(done["path"], bench.file, shallow=False)
    return done


# --- limits ---------------------------------------------------------------------------------


def hashing_rate(path: Path) -> float:
    started = time.perf_counter()
    total, buffer = blake3(), memoryview(bytearray(MIB))
    with path.open("rb", buffering=0) as source:
        while count := source.readinto(buffer):
            total.update(buffer[:count])
    total.digest()
    return path.stat().st_size / (time.perf_counter() - started) / 1e6


SENDER = f"""
import trio, sys
async def main():
    stream = await trio.open_tcp_stream("127.0.0.1", int(sys.argv[1]))
    data = bytes({MIB})
    for _ in range({TCP_BYTES // MIB}):
        await stream.send_all(data)
    await stream.aclose()
trio.run(main)
"""


def tcp_rate() -> float:
    """Raw trio TCP from another process, 1 MiB writes."""

    async def main() -> float:
        found: list[float] = []

        async def take(stream: trio.SocketStream) -> None:
            started, count = time.perf_counter(), 0
            while data := await stream.receive_some(MIB):
                count += len(data)
            found.append(count / (time.perf_counter() - started) / 1e6)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            serve = partial(trio.serve_tcp, take, 0, host="127.0.0.1")
            listeners = await nursery.start(serve)
            port = listeners[0].socket.getsockname()[1]
            nursery.start_soon(trio.run_process, [sys.executable, "-c", SENDER, str(port)])
        return found[0]

    return trio.run(main)


# --- the bench ------------------------------------------------------------------------------


def add(bench: Bench) -> str:
    """Add in place in two homes of one publisher, so that both have the same signed manifest."""
    started = time.perf_counter()
    added = json.loads(bench.omni("a", "add", bench.file, "--json"))
    wall = time.perf_counter() - started
    (bench.root / "b").mkdir(mode=0o700)
    shutil.copy2(bench.root / "a" / "identity.key", bench.root / "b" / "identity.key")
    bench.omni("b", "add", bench.file, "--json")
    (bench.root / "b" / "identity.key").unlink()
    bench.found["add"] = {"wall": wall, "rate": bench.size / wall / 1e6}
    return str(added["cid"])


def part_bytes(bench: Bench, cid: str, last: int) -> int:
    """Bytes of the distinct blocks of layers 0 to `last`, headers and shared tensors."""
    from omnistore.cid import CID
    from omnistore.config import Config
    from omnistore.selection import parse_parts
    from omnistore.store.files import FileStore

    store = FileStore(Config(bench.root / "a"))
    model = store.model(CID.parse_untrusted(cid))
    store.close()
    wanted = parse_parts(f"0-{last}", model.manifest)
    return sum({link: size for key in wanted for link, size in model.parts[key].links()}.values())


def killed_at(bench: Bench, cid: str, addrs: list[str], share: float) -> dict[str, Any]:
    """Kill a pin once `share` of the bytes arrived, then resume it."""
    child = subprocess.Popen(
        [*CLI, "pin", cid, "--json", *peer_args(addrs)],
        env=bench.environ(bench.fresh("pin")),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        event = json.loads(line)
        if event["event"] != "progress" or event["bytes_fetched"] >= share * bench.size:
            break
    child.kill()
    child.communicate()
    held = bytes_held(bench, cid)
    done = pin(bench, cid, addrs)
    done |= {"held_when_killed": held, "fetched_again": held + done["bytes_fetched"] - distinct(bench, cid)}
    return done


def bytes_held(bench: Bench, cid: str) -> int:
    from omnistore.cid import CID
    from omnistore.config import Config
    from omnistore.store.files import FileStore

    store = FileStore(Config(bench.root / "pin"))
    parts = store.model(CID.parse_untrusted(cid)).parts.values()
    sizes = {link: size for part in parts for link, size in part.links()}
    held = store.held(sizes)
    store.close()
    return sum(sizes[link] for link in held)


def distinct(bench: Bench, cid: str) -> int:
    from omnistore.cid import CID
    from omnistore.config import Config
    from omnistore.store.files import FileStore

    store = FileStore(Config(bench.root / "a"))
    parts = store.model(CID.parse_untrusted(cid)).parts.values()
    store.close()
    return sum({link: size for part in parts for link, size in part.links()}.values())


def run(bench: Bench) -> None:
    found = bench.found
    found["blake3"], found["tcp"] = hashing_rate(bench.file), tcp_rate()
    cid = add(bench)
    with ExitStack() as stack:
        first, second = (stack.enter_context(seed(bench, home)) for home in ("a", "b"))
        found["one seeder"] = pin(bench, cid, [first], home=bench.fresh("pin"))
        found["two seeders"] = pin(bench, cid, [first, second], home=bench.fresh("pin"))
        layers = found["layers 0-3"] = pin(bench, cid, [first], "--layers", "0-3", home=bench.fresh("pin"))
        layers["parts"] = part_bytes(bench, cid, 3)
        found["killed at 40 %"] = killed_at(bench, cid, [first], 0.4)
        lying = stack.enter_context(liar(bench, "b"))
        found["one of two lies"] = pin(bench, cid, [lying, first], home=bench.fresh("pin"))
        found["one of two lies"]["liar"] = lying.rpartition("/")[2]
    with ExitStack() as stack:
        capped = [stack.enter_context(seed(bench, home, "--up-limit", str(CAP))) for home in ("a", "b")]
        found["two of 50 MB/s"] = pin(bench, cid, capped, home=bench.fresh("pin"))
    with seed(bench, "a", cli=STOCK) as stock:
        found["stock muxer"] = pin(bench, cid, [stock], home=bench.fresh("pin"), cli=STOCK)
    found["blake3"] = max(found["blake3"], hashing_rate(bench.file))
    found["tcp"] = max(found["tcp"], tcp_rate())


def check(found: dict[str, Any]) -> list[str]:
    """What must be true whatever the speed; the faults found."""
    layers, killed, lies = found["layers 0-3"], found["killed at 40 %"], found["one of two lies"]
    claims = {
        "every whole pin is byte-identical": all(
            pinned.get("identical", True) for pinned in found.values() if isinstance(pinned, dict)
        ),
        "--layers fetched exactly its parts": layers["bytes_fetched"] == layers["parts"],
        "nothing finished was fetched again": killed["fetched_again"] == 0 < killed["held_when_killed"],
        "the liar was dropped and named": list(lies["dropped"]) == [lies["liar"]],
        f"no fetch took {MOST_RSS} MB of memory": all(
            pinned.get("rss", 0) <= MOST_RSS for pinned in found.values() if isinstance(pinned, dict)
        ),
        "both seeders sent": len(found["two seeders"]["peers"]) == 2,
    }
    return [claim for claim, true in claims.items() if not true]


def show(found: dict[str, Any], say: Callable[[str], None]) -> None:
    blake, tcp = found["blake3"], found["tcp"]
    say(f"{'one-thread BLAKE3':<20}{blake:7.0f} MB/s")
    say(f"{'raw trio TCP':<20}{tcp:7.0f} MB/s")
    for name, done in found.items():
        if isinstance(done, dict):
            ratios = f"{done['rate'] / tcp:5.2f} of TCP  {done['rate'] / blake:5.2f} of BLAKE3"
            more = f"  dropped {len(done['dropped'])}" if done.get("dropped") else ""
            wall = f"wall {done['wall']:5.1f} s" + (f"  {done['rss']:4.0f} MB RSS" if "rss" in done else "")
            say(f"{name:<20}{done['rate']:7.0f} MB/s  {ratios}  {wall}{more}")
    layers, killed = found["layers 0-3"], found["killed at 40 %"]
    say(f"one seeder / stock muxer: {found['one seeder']['rate'] / found['stock muxer']['rate']:.1f}")
    say(f"layers 0-3: {layers['bytes_fetched']} bytes fetched, {layers['parts']} in the parts")
    say(f"killed: {killed['held_when_killed']} bytes were held, {killed['fetched_again']} fetched again")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1GiB")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="work here and leave everything")
    options = parser.parse_args()
    compile_as_installed()
    with ExitStack() as stack:
        root = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(exist_ok=True)
        file = root / "bench.gguf"
        with redirect_stdout(sys.stderr):
            make_gguf([str(file), "--size", options.size])
        bench = Bench(root, file)
        run(bench)
    faults = check(bench.found)
    if options.json:
        print(json.dumps({**bench.found, "size": options.size, "faults": faults}))
    else:
        show(bench.found, print)
        print("\n".join(f"WRONG: {fault}" for fault in faults) or "all as it must be")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

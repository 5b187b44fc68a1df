"""Peers that mean harm, over real sockets: beside them an honest pin ends whole, and its seed does not grow.

Each fault and each flood is a process; so are the seed and the pin. In virtual time the same faults are in
tests/unit/transfer/test_fetching.py, by the second.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from omnistore.net.addresses import has_ipv6
from omnistore.testing.faulty import BROKEN, ENDED, FAULTS
from tests.bench.make_gguf import make_gguf
from tests.conftest import Run
from tests.system.conftest import StartSeed
from tests.system.seeds import SeedProcess

HERE = Path(__file__).resolve().parent
CONNECTIONS = 32
SERVING = (64 << 20) + (96 << 20)
"""Bytes that a beset seed may take beyond what it took: its memory for blocks, and its connections'."""
OPEN = CONNECTIONS + 64 + 40
"""Descriptors: connections, those in the handshake, and what a seed has open anyway."""
INDEX = 8
"""Descriptors of connections to the index that a seed keeps once several threads read."""
Start = Callable[..., list[dict[str, object]]]


@dataclass
class Published:
    file: Path
    home: Path
    cid: str
    seed: SeedProcess
    rss: int
    """Before anybody came."""
    descriptors: int

    @property
    def pid(self) -> int:
        return self.seed.process.pid


def look(pid: int) -> tuple[int, int]:
    """Resident bytes and open descriptors, by the kernel."""
    status = Path(f"/proc/{pid}/status").read_text()
    kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    return kib << 10, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


@pytest.fixture
def published(omni: Run, start_seed: StartSeed, tmp_path: Path, request: pytest.FixtureRequest) -> Published:
    """One seed with a model of 24 MiB."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("looks at descriptors and memory in /proc")
    file, home = tmp_path / "model.gguf", tmp_path / "seed"
    make_gguf(file, 24 << 20, layers=4, seed=0)
    added = omni("add", file, "--json", home=home)
    (home / "config.toml").write_text(f"connections = {CONNECTIONS}\n")
    cid = str(json.loads(added.stdout.splitlines()[-1])["cid"])
    # Whoever is honest comes from another address than they who are not, as on any network.
    listen = ["--listen", "/ip6/::1/tcp/0"] if has_ipv6() else []
    seed = start_seed(home, "--no-mdns", *listen, *request.param)
    seed.event("ready")
    return Published(file, home, cid, seed, *look(seed.process.pid))


@pytest.fixture
def start() -> Iterator[Start]:
    """Start hostile peers and wait for that many lines of theirs; gone afterwards."""
    started: list[subprocess.Popen[str]] = []

    def run(script: str, *args: object, lines: int = 1) -> list[dict[str, object]]:
        command = [sys.executable, str(HERE / script), *map(str, args)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return [json.loads(process.stdout.readline()) for _ in range(lines)]

    def stop() -> None:
        while started:
            process = started.pop()
            process.kill()
            process.communicate()

    run.stop = stop  # type: ignore[attr-defined]
    yield run
    stop()


def pinned(omni: Run, published: Published, home: Path, *peers: str) -> dict[str, dict[str, str]]:
    """An honest pin's report, once its file was compared."""
    addrs = [arg for peer in peers for arg in ("--peer", peer)]
    done = omni("pin", published.cid, "--json", "--no-mdns", *addrs, home=home)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert Path(report["path"]).read_bytes() == published.file.read_bytes()
    return report


@pytest.mark.parametrize("published", [["--up-limit", "8MB/s"]], indirect=True)
@pytest.mark.parametrize("faults", [sorted(BROKEN), sorted(set(FAULTS) - BROKEN)], ids=["liars", "laggards"])
def test_a_fetch_from_an_honest_peer_and_from_every_kind_of_bad_one(
    omni: Run, published: Published, start: Start, tmp_path: Path, faults: list[str]
) -> None:
    # A peer that was never measured is waited for longer.
    after = 0 if faults == sorted(BROKEN) else 2
    told = start("faulty_seed.py", published.home, ",".join(faults), after, lines=len(faults))
    addrs = {str(one["peer_id"]): (str(one["fault"]), str(one["addrs"][0])) for one in told}  # type: ignore[index]
    report = pinned(
        omni, published, tmp_path / "mine", published.seed.addr, *(addr for _, addr in addrs.values())
    )
    named = {addrs[peer][0] for peer in report["dropped"]}
    if faults == sorted(BROKEN):
        assert named == BROKEN
    else:
        assert named <= {"stalls", "halts", "trickles"}
    # What `twice` sends is right, the first time.
    useful = {addrs[peer][0] for peer, count in report["peers"].items() if count and peer in addrs}
    assert useful <= {"twice", "halts", "stalls", "trickles", "dies", "claims"}


@pytest.mark.parametrize("published", [[]], indirect=True)
@pytest.mark.parametrize("kind", ["sockets", "connections", "streams", "requests", "frames", "bad"])
def test_who_comes_to_fetch_is_served_beside_a_siege(
    omni: Run, published: Published, start: Start, tmp_path: Path, kind: str
) -> None:
    (beset,) = start("siege.py", kind, published.seed.addr, published.home, published.cid)
    assert beset["event"] == "beset"
    pinned(omni, published, tmp_path / "mine", str(published.seed.seen[0]["addrs"][-1]))
    rss, descriptors = look(published.pid)
    assert rss < published.rss + SERVING
    assert descriptors < OPEN
    start.stop()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 15
    while (left := look(published.pid)[1]) > published.descriptors + INDEX and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left <= published.descriptors + INDEX
    assert published.seed.process.poll() is None
    if kind == "bad":
        blamed = [event for event in published.seed.told() if event["event"] == "served" and event["reason"]]
        assert len({event["peer"] for event in blamed} & set(beset["peers"])) >= len(ENDED)  # type: ignore[call-overload]

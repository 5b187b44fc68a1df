"""A seed that runs on a home, and the commands that use it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from omnistore.http.agreement import socket_path
from omnistore.http.client import ask_seed, running_seed
from omnistore.testing.tiny_gguf import tiny_model

if TYPE_CHECKING:
    from tests.system.conftest import SeedProcess, StartSeed

Run = Callable[..., subprocess.CompletedProcess[str]]
ABSENT = "bafyr4ib2yddttmwzm2xrzf4arh2mvmtpzb5gvzvqnywcgyimlwetbcwa5m"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_model(layers=3).build())
    return path


@pytest.fixture
def source(start_seed: StartSeed, omni: Run, gguf: Path, tmp_path: Path) -> tuple[str, SeedProcess]:
    """A model's CID, and the seed of another machine that has it."""
    cid = omni("add", gguf, home=tmp_path / "other").stdout.split()[-1]
    return cid, start_seed(tmp_path / "other")


def test_status_and_peers_of_a_running_seed(start_seed: StartSeed, omni: Run, home: Path, gguf: Path) -> None:
    omni("add", gguf)
    other = start_seed(home.parent / "other")
    seed = start_seed(home, "--bootstrap", other.addr)
    seed.event("joined")
    status = json.loads(omni("status", "--json").stdout)
    assert status["peer_id"] == seed.peer_id
    assert status["pid"] == seed.process.pid
    assert status["addrs"][0] == seed.addr
    assert (status["models"], status["peers_connected"]) == (1, 1)
    assert status["bytes_held"] == gguf.stat().st_size
    told = omni("status").stdout
    assert seed.peer_id in told and f"process {seed.process.pid}" in told
    assert [row["peer"] for row in json.loads(omni("peers", "--json").stdout)] == [other.peer_id]
    assert other.peer_id in omni("peers").stdout
    mode = socket_path(home).stat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o600
    models = trio.run(ask_seed, home, "/v1/models")
    assert [(model["name"], model["whole"]) for model in models] == [("tiny", True)]


def test_without_a_seed_status_says_so(omni: Run, home: Path) -> None:
    done = omni("status")
    assert done.returncode == 9
    assert str(home) in done.stderr and "omni seed" in done.stderr
    assert omni("peers").returncode == 9


def test_a_second_seed_on_a_home_is_refused_and_a_killed_one_leaves_nothing_in_the_way(
    start_seed: StartSeed, omni: Run, home: Path
) -> None:
    first = start_seed(home)
    first.event("ready")
    second = omni("seed", "--listen", "/ip4/127.0.0.1/tcp/0")
    assert second.returncode == 7
    assert str(first.process.pid) in second.stderr
    first.stop(signal.SIGKILL)
    assert socket_path(home).exists()
    assert omni("status").returncode == 9
    again = start_seed(home)
    again.event("ready")
    assert json.loads(omni("status", "--json").stdout)["pid"] == again.process.pid


def test_pin_through_a_running_seed_says_what_pin_alone_says(
    start_seed: StartSeed, omni: Run, home: Path, source: tuple[str, SeedProcess], tmp_path: Path, gguf: Path
) -> None:
    cid, other = source
    alone = omni("pin", cid, "--peer", other.addr, "--json", home=tmp_path / "alone")
    seed = start_seed(home)
    seed.event("ready")
    out = tmp_path / "out.gguf"
    through = omni("pin", cid, "--peer", other.addr, "--json", "--output", out)
    assert through.returncode == alone.returncode == 0, through.stderr

    def last(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert event["event"] == "done"
        return event

    same = ("model", "bytes_fetched", "blocks_fetched", "node_bytes")
    assert {key: last(through)[key] for key in same} == {key: last(alone)[key] for key in same}
    assert list(last(through)["peers"]) == [other.peer_id]
    progress = json.loads(through.stdout.splitlines()[-2])
    assert progress["event"] == "progress"
    assert progress["by_peer"] == last(through)["peers"]
    assert [(one["done"], one["total"]) for one in progress["files"]] == [(gguf.stat().st_size,) * 2]
    assert out.read_bytes() == gguf.read_bytes()
    # The seeder saw the identity of the daemon, and the daemon announces what it got.
    other.event("served", peer=seed.peer_id)
    status = json.loads(omni("status", "--json").stdout)
    assert status["pins"] == {"done": 1, "failed": 0, "cancelled": 0}
    assert status["bytes_received"] > gguf.stat().st_size


def test_an_error_of_a_pin_in_the_seed_is_the_error_of_the_command(
    start_seed: StartSeed, omni: Run, home: Path, source: tuple[str, SeedProcess]
) -> None:
    start_seed(home).event("ready")
    done = omni("pin", source[0], "--peer", source[1].addr, "--layers", "77", "--json")
    assert done.returncode == 2
    assert "77" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["error"] == "InputError"


def test_a_pin_ends_when_whoever_asked_goes_away(start_seed: StartSeed, home: Path, tmp_path: Path) -> None:
    start_seed(home).event("ready")
    other = start_seed(tmp_path / "other")
    asking = subprocess.Popen(
        [sys.executable, "-m", "omnistore.cli.main", "pin", ABSENT, "--bootstrap", other.addr],
        env={**os.environ, "OMNI_HOME": str(home)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def wait_for(key: str, inner: str | None, value: int) -> None:
        deadline = time.monotonic() + 20
        while True:
            status = trio.run(ask_seed, home, "/v1/status")
            found = status[key] if inner is None else status[key][inner]
            if found == value:
                return
            assert time.monotonic() < deadline, status
            time.sleep(0.05)

    try:
        wait_for("pins_running", None, 1)
    finally:
        asking.kill()
        asking.wait()
    wait_for("pins", "cancelled", 1)


def test_nobody_answers_for_a_home_without_a_seed(home: Path) -> None:
    assert trio.run(running_seed, home) is None
    long = home / ("x" * 200)
    assert trio.run(running_seed, long) is None


def test_metrics_are_prometheus_text(start_seed: StartSeed, home: Path) -> None:
    where = start_seed(home, "--http", "127.0.0.1:0").event("ready")["http"][0]

    async def scrape() -> str:
        seed = await running_seed(home)
        assert seed is not None
        return await seed.text("/metrics")

    text = trio.run(scrape)
    with urllib.request.urlopen(f"{where}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert [line for line in answer.read().decode().splitlines() if line.startswith("#")] == [
            line for line in text.splitlines() if line.startswith("#")
        ]
    # By Prometheus's own reader: names, types, labels and values.
    read = {family.name: family for family in text_string_to_metric_families(text)}
    assert read["omni_pins"].type == "counter" and read["omni_peers"].type == "gauge"
    assert {sample.labels["outcome"]: sample.value for sample in read["omni_pins"].samples} == {
        "done": 0, "failed": 0, "cancelled": 0,
    }  # fmt: skip
    assert all(family.documentation and family.type != "unknown" for family in read.values())
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families)) > 12
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            assert name.partition("{")[0] in families
            assert float(value) >= 0
    assert 'omni_pins_total{outcome="done"} 0' in text


def test_some_layers_through_the_seed(
    start_seed: StartSeed, omni: Run, home: Path, source: tuple[str, SeedProcess]
) -> None:
    start_seed(home).event("ready")
    done = omni("pin", source[0], "--peer", source[1].addr, "--layers", "1")
    assert done.returncode == 0, done.stderr
    assert json.loads(omni("ls", "--json").stdout)[0]["whole"] is False


def test_a_seed_stays_under_the_disk_cap(start_seed: StartSeed, omni: Run, home: Path, gguf: Path) -> None:
    omni("add", gguf, "--copy", "--name", "taken-in")
    omni("unpin", "taken-in")
    (home / "config.toml").write_text('disk_cap = "0"\n')
    seed = start_seed(home)
    assert seed.event("evicted")["models"] == ["taken-in"]
    assert gguf.exists()
    assert json.loads(omni("ls", "--json").stdout) == []


def test_a_bootstrap_node_that_is_gone_matters_only_when_there_is_nobody_else(
    start_seed: StartSeed, omni: Run, home: Path, source: tuple[str, SeedProcess]
) -> None:
    start_seed(home).event("ready")
    cid, other = source
    gone = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
    assert omni("pin", cid, "--bootstrap", gone).returncode == 9
    assert omni("pin", cid, "--bootstrap", gone, "--bootstrap", other.addr).returncode == 0

"""`omni doctor`: what it finds, and what it does not pretend to know."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from omnistore.config import Config, load_key
from omnistore.doctor import RELEASED, check_clock, check_disk
from tests.system.conftest import StartSeed


def doctor(home: Path, *args: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    if not (home / "config.toml").exists():
        # It listens meanwhile: not at the port where others may.
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text('listen = ["/ip4/127.0.0.1/tcp/0"]\n')
    done = subprocess.run(
        [sys.executable, "-m", "omnistore.cli.main", "doctor", "--json", "--no-mdns", *args],
        env={**os.environ, "OMNI_HOME": str(home)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(done.stdout):
        found.setdefault(finding["check"], []).append(finding)
    return done.returncode, found


def test_a_healthy_node_and_its_seed(start_seed: StartSeed, tmp_path: Path) -> None:
    seed = start_seed(tmp_path / "seed")
    addr = seed.addr
    code, found = doctor(tmp_path / "home", "--bootstrap", addr)
    assert code == 0, found
    assert [one["state"] for one in found["bootstrap"]] == ["ok"]
    assert found["dht"][0]["text"].startswith("1 nodes answered")
    # The seed sees us at loopback, which is ours; what this machine says of itself is no answer.
    assert found["nat"][0]["state"] == "unknown"
    assert found["nat"][0]["text"].startswith("unknown: 0 of 3 answers")
    assert "127.0.0.1" in found["nat"][0]["text"]
    assert any(name.startswith("engine") for name in found)
    code, found = doctor(tmp_path / "seed")
    assert (found["identity"][0]["text"], found["port"][0]["state"]) == (seed.peer_id, "ok")
    assert found["dht"][0]["text"] == "the seed of this home is connected to nobody"


def test_a_seed_that_runs_is_asked_and_gets_no_double(start_seed: StartSeed, tmp_path: Path) -> None:
    other = start_seed(tmp_path / "other")
    seed = start_seed(tmp_path / "seed", "--bootstrap", other.addr)
    seed.event("joined", addr=other.addr)
    gone = f"/ip4/127.0.0.1/tcp/1/p2p/{load_key(tmp_path / 'gone').public.peer_id}"
    code, found = doctor(tmp_path / "seed", "--bootstrap", other.addr, "--bootstrap", gone)
    assert code == 0, found
    assert [one["state"] for one in found["bootstrap"]] == ["ok", "warning"]
    assert found["dht"][0]["text"].startswith("the seed of this home is connected to 1 peer;")
    assert found["nat"][0]["state"] == "unknown"


def test_what_is_wrong_is_named_with_a_remedy(tmp_path: Path) -> None:
    home = tmp_path / "home"
    load_key(home)
    (home / "identity.key").chmod(0o644)
    code, found = doctor(home)
    assert code == 2
    assert "chmod 600" in found["identity"][0]["remedy"]
    assert found["dht"][0]["state"] == "warning"
    (home / "identity.key").chmod(0o600)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        (home / "config.toml").write_text(f'listen = ["/ip4/127.0.0.1/tcp/{port}"]\n')
        code, found = doctor(home)
    assert code == 2
    assert (found["port"][0]["state"], "in use" in found["port"][0]["text"]) == ("problem", True)


def test_a_bootstrap_node_that_is_gone(tmp_path: Path) -> None:
    peer = load_key(tmp_path / "other").public.peer_id
    code, found = doctor(tmp_path / "home", "--bootstrap", f"/ip4/127.0.0.1/tcp/1/p2p/{peer}")
    assert code == 9
    assert found["bootstrap"][0]["state"] == "problem"
    assert found["nat"][0]["state"] == "unknown"


@pytest.mark.parametrize(("now", "state"), [(RELEASED - 1, "problem"), (RELEASED + 1, "warning")])
def test_a_clock_that_went_back(now: float, state: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert [finding.state for finding in check_clock(Config(tmp_path), now)] == [state]


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    (finding,) = check_disk(Config(tmp_path, disk_reserve=1 << 62))
    assert (finding.state, finding.exit_code) == ("problem", 6)

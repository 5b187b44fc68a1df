"""Two machines on one network need no flags. Multicast is sent only inside namespaces made here."""

from __future__ import annotations

import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from omnistore.testing.tiny_gguf import tiny_model

DEMO = Path(__file__).parents[2] / "manifests" / "demo" / "omni-demo-F16.gguf"
OMNI = [sys.executable, "-m", "omnistore.cli.main"]


class Lan:
    """Namespaces on one bridge; each is a machine with an address of its own."""

    def __init__(self, machines: int) -> None:
        self.name = f"omni{secrets.token_hex(3)}"
        self.machines: list[str] = []
        self.started: list[subprocess.Popen[str]] = []
        ip("netns", "add", self.name)
        ip("-n", self.name, "link", "add", "name", "bridge0", "type", "bridge")
        ip("-n", self.name, "link", "set", "bridge0", "up")
        for number in range(machines):
            machine = f"{self.name}-{number}"
            ip("netns", "add", machine)
            self.machines.append(machine)
            ip("-n", machine, "link", "set", "lo", "up")
            ip(
                "-n", machine, "link", "add", "name", "eth0", "type", "veth",
                "peer", "name", f"port{number}", "netns", self.name,
            )  # fmt: skip
            ip("-n", self.name, "link", "set", f"port{number}", "master", "bridge0", "up")
            ip("-n", machine, "addr", "add", f"10.99.0.{number + 1}/24", "dev", "eth0")
            ip("-n", machine, "link", "set", "eth0", "up")

    def command(self, machine: int, *args: object) -> list[str]:
        return ["ip", "netns", "exec", self.machines[machine], *OMNI, *map(str, args)]

    def run(self, machine: int, home: Path, *args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(machine, *args),
            env={**os.environ, "OMNI_HOME": str(home)},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def seed(self, machine: int, home: Path, *args: object) -> Callable[[str], dict[str, object]]:
        """Start `omni seed`; what waits for one of its events."""
        process = subprocess.Popen(
            self.command(machine, "seed", "--json", *args),
            env={**os.environ, "OMNI_HOME": str(home)},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.started.append(process)
        lines: queue.Queue[str] = queue.Queue()
        assert process.stdout is not None
        threading.Thread(
            target=lambda: [lines.put(line) for line in process.stdout or ()], daemon=True
        ).start()

        def wait(event: str) -> dict[str, object]:
            deadline = time.monotonic() + 30
            while True:
                found: dict[str, object] = json.loads(lines.get(timeout=deadline - time.monotonic()))
                if found["event"] == event:
                    return found

        wait("ready")
        return wait

    def stop_seeds(self) -> None:
        for process in self.started:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(10) for process in self.started] == [0] * len(self.started)
        self.started.clear()

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for name in (*self.machines, self.name):
            subprocess.run(["ip", "netns", "del", name], check=False)


def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    for line in process.stdout or ():
        lines.put(line)


def ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())


@pytest.fixture
def lan() -> Iterator[Lan]:
    probe = f"omni{secrets.token_hex(3)}"
    try:
        ip("netns", "add", probe)
        ip("-n", probe, "link", "add", "name", "bridge0", "type", "bridge")
    except (RuntimeError, OSError) as error:
        pytest.skip(f"network namespaces can not be made here (root and iproute2 needed): {error}")
    finally:
        subprocess.run(["ip", "netns", "del", probe], check=False, capture_output=True)
    made = Lan(3)
    yield made
    made.close()


def added(lan: Lan, home: Path, tmp_path: Path) -> tuple[str, bytes]:
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(tiny_model(layers=2).build())
    return lan.run(0, home, "add", gguf).stdout.split()[-1], gguf.read_bytes()


def test_machines_on_one_network_find_each_other_without_flags(lan: Lan, tmp_path: Path) -> None:
    cid, data = added(lan, tmp_path / "a", tmp_path)
    lan.seed(0, tmp_path / "a")
    fetched = lan.run(1, tmp_path / "b", "pin", cid)
    assert fetched.returncode == 0, fetched.stderr
    assert Path(fetched.stdout.strip()).read_bytes() == data
    # Whoever has it seeds it: a third machine gets it from the second, the first being gone.
    wait = lan.seed(1, tmp_path / "b")
    assert str(wait("joined")["addr"]).startswith("/ip4/10.99.0.1/tcp/4141/p2p/")
    lan.started.pop(0).kill()
    fetched = lan.run(2, tmp_path / "c", "pin", cid, "--json")
    assert fetched.returncode == 0, fetched.stderr
    assert json.loads(fetched.stdout.splitlines()[-1])["peers"]


def test_a_model_of_the_local_network_runs_without_flags(lan: Lan, tmp_path: Path) -> None:
    cid = lan.run(0, tmp_path / "a", "add", DEMO).stdout.split()[-1]
    lan.seed(0, tmp_path / "a")
    told = lan.run(1, tmp_path / "b", "run", cid, "--prompt", "Once upon", "--max-tokens", 4, "--json")
    assert told.returncode == 0, told.stderr
    assert len(json.loads(told.stdout.splitlines()[-1])["tokens"]) == 4
    alone = lan.run(2, tmp_path / "c", "run", cid, "--prompt", "x", "--no-mdns")
    assert (alone.returncode, "nobody to ask" in alone.stderr) == (2, True)


def test_who_is_silent_is_not_found_and_peers_met_before_are(lan: Lan, tmp_path: Path) -> None:
    cid, _ = added(lan, tmp_path / "a", tmp_path)
    lan.seed(0, tmp_path / "a", "--no-mdns")
    alone = lan.run(1, tmp_path / "b", "pin", cid)
    assert alone.returncode == 9
    assert "local network" in alone.stderr
    lan.stop_seeds()
    # Met once on the network, it is found again when it no longer announces itself.
    lan.seed(0, tmp_path / "a")
    lan.seed(1, tmp_path / "b")("joined")
    lan.stop_seeds()
    lan.seed(0, tmp_path / "a", "--no-mdns")
    fetched = lan.run(1, tmp_path / "b", "pin", cid, "--no-mdns")
    assert fetched.returncode == 0, fetched.stderr


def test_only_loopback_is_no_network(lan: Lan, tmp_path: Path) -> None:
    cid, _ = added(lan, tmp_path / "a", tmp_path)
    lan.seed(0, tmp_path / "a", "--listen", "/ip4/127.0.0.1/tcp/0")
    assert lan.run(1, tmp_path / "b", "pin", cid).returncode == 9

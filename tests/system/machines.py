"""Machines on an internet of their own: network namespaces made here, with routers that do NAT.

Addresses are public ones (11.0.0.0/8), since documentation ranges do not count as public; nothing leaves
the namespaces, which have no way out. Needs root, iproute2 and, for routers, nftables.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from omnistore.config import load_key
from tests.system.seeds import SeedProcess

OMNI = [sys.executable, "-m", "omnistore.cli.main"]
PORT = 4141

NAT = """
table ip nat {
  chain out { type nat hook postrouting priority 100; oifname "wan0" masquerade; }
  chain in { type nat hook prerouting priority -100; }
}
table ip filter {
  chain forward { type filter hook forward priority 0; policy drop;
    ct state established,related accept; iifname "lan0" accept; ct status dnat accept; }
  chain input { type filter hook input priority 0; policy drop;
    ct state established,related accept; iifname "lan0" accept; iifname "lo" accept; }
}
"""
"""A home router: what comes from inside goes out under its address, what is not asked for is dropped."""
FIREWALL = """
table ip filter {
  chain input { type filter hook input priority 0; policy drop;
    ct state established,related accept; iifname "lo" accept; icmp type echo-request accept; }
}
"""
"""On the machine itself: answers come in, and nothing else."""


def run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@dataclass
class Machine:
    """One namespace."""

    internet: Internet
    name: str
    host: str
    """Its IP address."""

    def command(self, *args: object) -> list[str]:
        return ["ip", "netns", "exec", self.name, *map(str, args)]

    def omni(self, home: Path, *args: object, timeout: float = 90) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*OMNI, *args),
            env={**os.environ, "OMNI_HOME": str(home)},
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def seed(self, home: Path, *args: object) -> SeedProcess:
        """Start a seed; whoever needs it waits for its events."""
        process = subprocess.Popen(
            self.command(*OMNI, "seed", "--json", "--no-mdns", *args),
            env={**os.environ, "OMNI_HOME": str(home)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.internet.started.append(process)
        return SeedProcess(process, home, patience=40)

    def addr(self, home: Path) -> str:
        """Where a seed of that home is reached on this machine."""
        return f"/ip4/{self.host}/tcp/{PORT}/p2p/{load_key(home).public.peer_id}"

    def nft(self, rules: str) -> None:
        run(*self.command("nft", "-f", "-"), stdin=rules)


class Internet:
    """A switch that everything public is at."""

    def __init__(self) -> None:
        self.name = f"omni{secrets.token_hex(3)}"
        self.names = [self.name]
        self.started: list[subprocess.Popen[str]] = []
        self._ports = 0
        run("ip", "netns", "add", self.name)
        run("ip", "-n", self.name, "link", "add", "name", "bridge0", "type", "bridge")
        run("ip", "-n", self.name, "link", "set", "bridge0", "up")

    def _make(self, what: str) -> str:
        name = f"{self.name}-{what}"
        run("ip", "netns", "add", name)
        self.names.append(name)
        run("ip", "-n", name, "link", "set", "lo", "up")
        return name

    def _plug(self, name: str, link: str, host: str) -> None:
        """Connect a namespace to the switch, under 11.0.0.0/8."""
        self._ports += 1
        port = f"port{self._ports}"
        run("ip", "-n", name, "link", "add", "name", link, "type", "veth", "peer", "name", port,
            "netns", self.name)  # fmt: skip
        run("ip", "-n", self.name, "link", "set", port, "master", "bridge0", "up")
        run("ip", "-n", name, "addr", "add", f"{host}/8", "dev", link)
        run("ip", "-n", name, "link", "set", link, "up")

    def crowd(self, numbers: Sequence[int], tmp_path: Path) -> list[str]:
        """Public seeds that know one another; `--bootstrap` options that lead to them."""
        machines = [self.machine(number) for number in numbers]
        homes = [tmp_path / machine.name for machine in machines]
        known = [machine.addr(home) for machine, home in zip(machines, homes, strict=True)]
        options = [arg for addr in known for arg in ("--bootstrap", addr)]
        for seed in [m.seed(home, *options) for m, home in zip(machines, homes, strict=True)]:
            seed.event("ready")
        return options

    def machine(self, number: int, *, firewall: bool = False) -> Machine:
        """A machine with a public address, 11.<number>.0.1."""
        name = self._make(f"m{number}")
        self._plug(name, "eth0", f"11.{number}.0.1")
        machine = Machine(self, name, f"11.{number}.0.1")
        if firewall:
            machine.nft(FIREWALL)
        return machine

    def home(self, number: int) -> tuple[Machine, Machine]:
        """A machine at 192.168.<number>.2 behind a router at 11.<number>.0.1."""
        router = Machine(self, self._make(f"r{number}"), f"11.{number}.0.1")
        self._plug(router.name, "wan0", router.host)
        inside = Machine(self, self._make(f"h{number}"), f"192.168.{number}.2")
        run("ip", "-n", router.name, "link", "add", "name", "lan0", "type", "veth", "peer", "name", "eth0",
            "netns", inside.name)  # fmt: skip
        run("ip", "-n", router.name, "addr", "add", f"192.168.{number}.1/24", "dev", "lan0")
        run("ip", "-n", router.name, "link", "set", "lan0", "up")
        run("ip", "-n", inside.name, "addr", "add", f"{inside.host}/24", "dev", "eth0")
        run("ip", "-n", inside.name, "link", "set", "eth0", "up")
        run("ip", "-n", inside.name, "route", "add", "default", "via", f"192.168.{number}.1")
        run(*router.command("sysctl", "-qw", "net.ipv4.ip_forward=1"))
        router.nft(NAT)
        return inside, router

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextmanager
def internet() -> Iterator[Internet]:
    """An internet for one test; skips it where there can be none."""
    if shutil.which("nft") is None:
        pytest.skip("routers need nftables (`nft`), which is not installed")
    made: Internet | None = None
    try:
        made = Internet()
        made.home(255)
    except (RuntimeError, OSError) as error:
        if made is not None:
            made.close()
        pytest.skip(f"no network namespaces with NAT here (root, iproute2, nftables needed): {error}")
    try:
        yield made
    finally:
        made.close()

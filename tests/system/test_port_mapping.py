"""A seed behind a router that forwards on request: Debian's miniupnpd, and routers that answer anything."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from omnistore.http.client import running_seed
from omnistore.net.igd import MEMORY
from omnistore.net.port_mapping import LEASE, Failed, Map, Mapped, Unmap, answer_untrusted, question
from omnistore.testing.tiny_gguf import tiny_model
from tests.system.machines import PORT, Machine, internet, run

ROUTER = Path(__file__).with_name("fake_router.py")
# What Debian's own script makes, without which miniupnpd has nowhere to put its rules.
CHAINS = """
table inet filter {
  chain miniupnpd { }
  chain prerouting_miniupnpd { }
  chain postrouting_miniupnpd { }
  chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
  chain postrouting { type nat hook postrouting priority 100; jump postrouting_miniupnpd; }
}
"""
CONFIGURATION = """
ext_ifname=wan0
listening_ip=lan0
http_port=5000
ipv6_disable=yes
secure_mode=yes
uuid=fc4ec57e-b051-11db-88f8-0060085db3f6
lease_file={leases}
allow 1024-65535 192.168.0.0/16 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""


@contextmanager
def program(machine: Machine, *command: object) -> Iterator[subprocess.Popen[str]]:
    """Something that runs on a machine meanwhile."""
    process = subprocess.Popen(
        machine.command(*command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def miniupnpd(router: Machine, tmp_path: Path) -> Iterator[Path]:
    """The router answers UPnP; its file of leases."""
    if shutil.which("miniupnpd") is None:
        pytest.skip("the router to be asked is miniupnpd, which is not installed (`apt install miniupnpd`)")
    router.nft(CHAINS)
    leases, configuration = tmp_path / "leases", tmp_path / "miniupnpd.conf"
    configuration.write_text(CONFIGURATION.format(leases=leases))
    command = ("miniupnpd", "-d", "-f", configuration, "-P", tmp_path / "miniupnpd.pid")
    with program(router, *command) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Reloading rules from lease file" in line or "listening on" in line:
                break
        yield leases


def forwarded(router: Machine) -> str:
    return run(*router.command("nft", "list", "chain", "inet", "filter", "prerouting_miniupnpd"))


WEIGHED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code != 0)
"""
"""Runs a program from a process that is small: what a program took counts what it was forked from."""


def ask(machine: Machine, asked: Map | Unmap, seconds: float = 15) -> tuple[bytes, int, int]:
    """What the program says, how it ends, and the most memory it took, in KiB."""
    code = f"import sys; from omnistore.net import igd; igd.answer(sys.argv[1], {seconds:g})"
    command = machine.command(sys.executable, "-P", "-c", code, question(asked))
    done = subprocess.run([sys.executable, "-c", WEIGHED, *command], capture_output=True)
    return done.stdout, done.returncode, int(done.stderr.split()[-1])


def status(machine: Machine, home: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(machine.omni(home, "status", "--json").stdout)["reachability"]
    return found


async def metrics(home: Path) -> str:
    seed = await running_seed(home)
    assert seed is not None
    return await seed.text("/metrics")


def test_a_seed_has_its_router_forward_the_port(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(tiny_model(2, width=128).build())
    with internet() as net:
        inside, router = net.home(5)
        with miniupnpd(router, tmp_path) as leases:
            every = net.crowd((1, 2, 3), tmp_path)
            home, outside = tmp_path / "hidden", f"/ip4/{router.host}/tcp/{PORT}"
            cid = json.loads(inside.omni(home, "add", file, "--json").stdout)["cid"]
            (home / "config.toml").write_text('port_mapping = "upnp"\n')
            seed = inside.seed(home, *every)
            assert seed.event("port_mapping", addr=outside)["why"] is None
            assert seed.event("moved")["addrs"][0].startswith(outside)
            assert f"dnat ip to {inside.host}:{PORT}" in forwarded(router)
            until = int(leases.read_text().split(":")[4])
            assert LEASE - 60 < until - time.time() <= LEASE
            # It was a claim so far; now three others have been through.
            assert seed.event("reachability", state="public")["addrs"] == [outside]
            told = status(inside, home)
            assert told["mapping"] == {
                "addr": outside, "why": None, "remedy": None,
                "text": f"the router forwards {outside} to this node",
            }  # fmt: skip
            assert "omni_port_mapped 1" in trio.run(metrics, home)
            # Somebody outside who knows nothing but that address.
            elsewhere = net.machine(9)
            done = elsewhere.omni(
                tmp_path / "other", "pin", cid, "--json", "--peer", f"{outside}/p2p/{seed.peer_id}"
            )
            assert done.returncode == 0, done.stderr
            report = json.loads(done.stdout.splitlines()[-1])
            assert Path(report["path"]).read_bytes() == file.read_bytes()
            assert seed.stop() == 0
            assert "dnat" not in forwarded(router)
            assert not leases.read_text()
            # Without a seed, the doctor has it forwarded for as long as it looks.
            found = json.loads(inside.omni(home, "doctor", "--json", "--no-mdns", *every).stdout)
            assert {(one["check"], one["state"]) for one in found} >= {("port mapping", "ok"), ("nat", "ok")}
            assert "dnat" not in forwarded(router)


def test_a_port_that_another_has_is_left_to_it(tmp_path: Path) -> None:
    with internet() as net:
        inside, router = net.home(5)
        with miniupnpd(router, tmp_path):
            every = net.crowd((1, 2, 3), tmp_path)
            other = Map(PORT, {inside.host: 9999})
            assert isinstance(answer_untrusted(ask(inside, other)[0], other), Mapped)
            seed = inside.seed(tmp_path / "hidden", "--port-mapping", "upnp", *every)
            addr = seed.event("port_mapping")["addr"]
            assert addr.startswith(f"/ip4/{router.host}/tcp/")
            assert not addr.endswith(f"/{PORT}")
            assert seed.event("reachability", state="public")["addrs"] == [addr]
            assert seed.stop() == 0
            left = forwarded(router)
            assert left.count("dnat") == left.count(f"dnat ip to {inside.host}:9999") == 1


def test_who_is_private_is_told_of_the_setting_and_what_the_router_said(tmp_path: Path) -> None:
    with internet() as net:
        every = net.crowd((1, 2, 3), tmp_path)
        plain, _ = net.home(5)
        asking, router = net.home(6)
        with program(router, sys.executable, ROUTER, "192.168.6.1", "carrier"):
            quiet = plain.seed(tmp_path / "plain", *every)
            seed = asking.seed(tmp_path / "asking", "--port-mapping", "upnp", *every)
            assert quiet.event("reachability")["state"] == "private"
            told = status(plain, quiet.home)
            assert told["mapping"] is None
            assert "port_mapping" in told["remedy"]
            assert seed.event("port_mapping") == {"event": "port_mapping", "addr": None, "why": "double NAT"}
            seed.event("reachability", state="private")
            told = status(asking, seed.home)
            assert "100.64.0.9" in told["mapping"]["text"]
            assert "both routers" in told["mapping"]["remedy"]
            assert "port_mapping" not in told["remedy"]
            assert "omni_port_mapped 0" in trio.run(metrics, seed.home)
            found = asking.omni(seed.home, "doctor", "--json", "--no-mdns", *every)
            (line,) = [one for one in json.loads(found.stdout) if one["check"] == "port mapping"]
            assert (line["state"], line["remedy"]) == ("warning", told["mapping"]["remedy"])
            # Nothing was opened, so nothing is to be closed.
            started = time.monotonic()
            assert seed.stop() == 0
            assert time.monotonic() - started < 9


BEHAVIOURS = {
    "good": "",
    "negative": "",
    "endless-lease": "",
    "absent": "no gateway",
    "double-nat": "double NAT",
    "carrier": "double NAT",
    "loopback": "double NAT",
    "down": "no gateway",
    "poetry": "no answer",
    "binary": "no gateway",
    "long": "no gateway no answer",
    "refuses": "refused",
    "for-ever": "refused",
    "conflict": "taken",
    "taken": "taken",
    "short": "refused",
    "garbage": "no gateway no answer",
    "endless": "no gateway ended",
    "endless-header": "no gateway ended",
    "drips": "no gateway ended",
}


def test_whatever_answers_on_the_lan(tmp_path: Path) -> None:
    """Each router with one fault: the reason is right, and nobody keeps us, or takes our memory."""
    with internet() as net:
        homes = {behaviour: net.home(20 + i) for i, behaviour in enumerate(BEHAVIOURS)}

        def what(behaviour: str) -> tuple[str, list[str]]:
            inside, router = homes[behaviour]
            asked = Map(PORT, {inside.host: PORT})
            lan = f"{inside.host.rpartition('.')[0]}.1"
            if behaviour == "absent":
                command: tuple[object, ...] = ("sleep", "60")
            else:
                command = (sys.executable, ROUTER, lan, behaviour)
            with program(router, *command) as process:
                assert process.stdout is not None
                assert behaviour == "absent" or process.stdout.readline() == "ready\n"
                data, code, memory = ask(inside, asked, seconds=4 if "ended" in BEHAVIOURS[behaviour] else 15)
                assert memory << 10 <= MEMORY
                if code:
                    return "ended", []
                answer = answer_untrusted(data, asked)
                if behaviour == "good":
                    assert answer == Mapped("11.5.0.1", PORT, inside.host, LEASE)
                    assert ask(inside, Unmap((PORT, 9), asked.listening))[1] == 0
                process.kill()
                done = process.stdout.read().splitlines()
                return answer.why if isinstance(answer, Failed) else "", done

        with ThreadPoolExecutor(8) as pool:
            found = dict(zip(BEHAVIOURS, pool.map(what, BEHAVIOURS), strict=True))
        wrong = {
            behaviour: (why, BEHAVIOURS[behaviour])
            for behaviour, (why, _) in found.items()
            if why not in BEHAVIOURS[behaviour]
        }
        assert not wrong
        assert found["good"][1] == [f"added {PORT} {LEASE}", f"deleted {PORT}"]
        # No port is opened where it leads nowhere, or to another.
        for behaviour in ("double-nat", "carrier", "loopback", "down", "poetry", "taken"):
            assert not found[behaviour][1]

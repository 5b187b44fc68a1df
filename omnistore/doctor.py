"""What is wrong with this machine, home and network, and what to do about it (`omni doctor`).

Every check looks at one thing and says what it found, or that it can not know: nothing is guessed,
and nobody is dialled but through whom a node would join anyway; a seed that runs on the home is asked
instead, since a second node would go by its name. Other packages add checks by the entry point group
`omni.checks`. Repairs nothing.
"""

from __future__ import annotations

import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import entry_points
from typing import Any, Final, Literal, TypeAlias

import trio

from omnistore.config import KEY_NAME, Config, load_key, make_home
from omnistore.errors import BadConfig, NetworkError, OmniError, RemoteProtocolError, StoreFull
from omnistore.http.client import LocalSeed, running_seed
from omnistore.joining import Joined
from omnistore.net.acquaintances import recall
from omnistore.net.addresses import (
    check_listenable,
    default_listen,
    interface_addresses,
    parse_untrusted,
)
from omnistore.net.reachability import described
from omnistore.node import ROUTER_PATIENCE, Node, NodeEvent, NodeOptions, open_node

CHECKS: Final = "omni.checks"
"""Entry point group: functions without arguments that return findings."""
ROOMY: Final = 5 << 30
"""Bytes of free disk below which fetching a model is likely to fail: the smallest useful ones have 1 GB."""
RELEASED: Final = datetime(2025, 10, 1, tzinfo=UTC).timestamp()
"""This program did not exist before: a clock that shows an earlier time is wrong."""
NET_DEADLINE: Final = 45.0
"""Seconds for everything that needs other nodes."""
NAT_PATIENCE: Final = 20.0
"""Seconds for several nodes to try whether they can connect here."""

State: TypeAlias = Literal["ok", "warning", "problem", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the diagnosis."""

    check: str
    state: State
    text: str
    remedy: str | None = None
    exit_code: int = 0
    """For a problem: what a command that runs into it exits with."""


def problem(check: str, error: OmniError) -> Finding:
    """An error as a finding."""
    return Finding(check, "problem", error.message, error.remedy, error.exit_code)


async def diagnose(config: Config, tell: Callable[[Finding], None]) -> None:
    """Run every check, and tell each finding as it comes."""
    for check in (check_home, check_disk, check_clock):
        for finding in check(config):
            tell(finding)
    port = await check_port(config)
    tell(port)
    for finding in other_checks():
        tell(finding)
    if config.home.is_dir():
        for finding in await check_network(config, listen=port.state == "ok"):
            tell(finding)


def check_home(config: Config) -> Iterable[Finding]:
    """Whether the home can be written, and the identity read by its owner alone."""
    try:
        make_home(config.home)
        probe = config.home / f".doctor.{secrets.token_hex(4)}"
        probe.write_bytes(b"")
        probe.unlink()
    except OmniError as error:
        yield problem("home", error)
        return
    except OSError as error:
        failure = BadConfig(
            f"{config.home} can not be written: {error.strerror}",
            remedy="Set OMNI_HOME to a directory you may write.",
        )
        yield problem("home", failure)
        return
    yield Finding("home", "ok", f"{config.home} can be written")
    mode = stat.S_IMODE(config.home.stat().st_mode)
    if mode & 0o022:
        yield Finding(
            "home",
            "warning",
            f"others may write into {config.home} (mode {mode:04o})",
            f"Run `chmod go-w {config.home}`.",
        )
    if not (config.home / KEY_NAME).exists():
        yield Finding("identity", "ok", "none yet; it is made when it is first needed")
        return
    try:
        yield Finding("identity", "ok", load_key(config.home).public.peer_id)
    except OmniError as error:
        yield problem("identity", error)


def check_disk(config: Config) -> Iterable[Finding]:
    """Whether there is room for models."""
    home = next(path for path in (config.home, *config.home.parents) if path.exists())
    free = shutil.disk_usage(home).free
    text = f"{free / 1e9:.1f} GB free at {home}"
    if free <= config.disk_reserve:
        full = StoreFull(
            f"{text}, and {config.disk_reserve / 1e9:.1f} GB of it are to stay free (disk_reserve)",
            remedy="Free some space, run `omni gc`, or move OMNI_HOME to another disk.",
        )
        yield problem("disk", full)
    elif free < ROOMY:
        yield Finding("disk", "warning", text, "Free some space before you fetch a large model.")
    else:
        yield Finding("disk", "ok", text)


def check_clock(config: Config, now: float | None = None) -> Iterable[Finding]:
    """Whether the clock can be right: against this program's age, and the newest file of the home."""
    now = time.time() if now is None else now
    shown = f"{datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M} UTC"
    remedy = "Set the clock: names and the records of peers are kept by date."
    newest = max((path.stat().st_mtime for path in config.home.glob("*")), default=0.0)
    if now < RELEASED:
        yield problem("clock", BadConfig(f"{shown} is before this program was written", remedy=remedy))
    elif newest > now + 3600:
        then = f"{datetime.fromtimestamp(newest, UTC):%Y-%m-%d %H:%M}"
        yield Finding("clock", "warning", f"{shown}, but a file of the home is from {then}", remedy)
    else:
        yield Finding("clock", "ok", f"{shown}; compared with the files of the home, not with other machines")


async def check_port(config: Config) -> Finding:
    """Whether a seed could listen, or does."""
    listen = config.listen or default_listen()
    shown = ", ".join(listen)
    if await running_seed(config.home) is not None:
        return Finding("port", "ok", "the seed of this home is running")
    try:
        check_listenable(parse_untrusted(addr) for addr in listen)
    except OmniError as error:
        return problem("port", error)
    return Finding("port", "ok", f"{shown} is free; no seed of this home is running")


def other_checks() -> Iterable[Finding]:
    """What other packages check."""
    for entry in entry_points(group=CHECKS):
        try:
            yield from entry.load()()
        except (OmniError, ImportError) as error:
            yield Finding(entry.name, "warning", f"this check can not run here: {error}")


async def check_network(config: Config, *, listen: bool = False) -> Sequence[Finding]:
    """Whether a node of this home gets into the DHT, and what it sees there.

    With `listen` it listens meanwhile where a seed would, so that others can try whether they reach it.
    """
    seed = await running_seed(config.home)
    if seed is not None:
        return await _ask_seed(seed, config)
    if not (config.bootstrap or config.mdns or recall(config.home, time.time())):
        return [
            Finding(
                "dht", "warning", "there is nobody to join through",
                "Give --bootstrap, set bootstrap in config.toml, or leave out --no-mdns.",
            ),
        ]  # fmt: skip
    tries: list[Joined] = []

    def note(event: NodeEvent) -> None:
        if isinstance(event, Joined):
            tries.append(event)

    options = NodeOptions(
        listen=(config.listen or default_listen()) if listen else (),
        bootstrap=config.bootstrap,
        announce=config.announce,
        map_port=config.port_mapping == "upnp",
        lan=config.mdns,
        recall=True,
        alone_ok=True,
        on_event=note,
    )
    findings: list[Finding] = []
    try:
        with trio.fail_after(NET_DEADLINE):
            async with open_node(config, options) as node:
                if config.mdns and config.bootstrap:
                    # A bootstrap node answers sooner than multicast.
                    await trio.sleep(2)
                findings += await _look_around(config, node, tries)
    except trio.TooSlowError:
        findings.append(Finding("dht", "warning", f"no end within {NET_DEADLINE:g} s", "Try again later."))
    except OmniError as error:
        findings.append(problem("network", error))
    return findings


async def _ask_seed(seed: LocalSeed, config: Config) -> list[Finding]:
    """What the seed of this home, which runs, knows of the network."""
    try:
        status = await seed.get("/v1/status")
        connected = {row["peer"] for row in await seed.get("/v1/peers") if row["connected"]}
    except OmniError as error:
        return [problem("network", error)]
    findings = []
    for addr in config.bootstrap:
        if addr.rpartition("/p2p/")[2] in connected:
            findings.append(Finding("bootstrap", "ok", f"the seed of this home is connected to {addr}"))
        else:
            text = f"the seed of this home is not connected to {addr}"
            findings.append(
                Finding("bootstrap", "warning", text, "Check that it runs, and that the seed was told of it.")
            )
    return [
        *findings,
        _seed_in_dht(len(connected), status["announcements"]),
        _seed_nat(status["reachability"]),
        *_seed_mapping(status["reachability"]),
    ]


def _seed_in_dht(peers: int, announcements: Mapping[str, int]) -> Finding:
    if not peers:
        return Finding(
            "dht", "warning", "the seed of this home is connected to nobody",
            "Run `omni seed` on another machine of this network, or name one in bootstrap.",
        )  # fmt: skip
    text = f"the seed of this home is connected to {peers} peer{'s' * (peers > 1)}"
    if announcements["unconfirmed"] and not announcements["stored"]:
        return Finding(
            "dht", "warning", f"{text}, but none keeps what it announces",
            "Check that they run `omni seed` of this version.",
        )  # fmt: skip
    return Finding("dht", "ok", f"{text}; {announcements['stored']} of its announcements were kept")


def _seed_nat(found: Mapping[str, Any]) -> Finding:
    if found["state"] == "unknown":
        return Finding("nat", "unknown", found["text"])
    return Finding("nat", "warning" if found["state"] == "private" else "ok", found["text"], found["remedy"])


def _seed_mapping(found: Mapping[str, Any]) -> list[Finding]:
    told = found.get("mapping")  # a seed that was started before an update does not say
    return [] if told is None else [_mapping(told["addr"], told["text"], told["remedy"])]


async def _look_around(config: Config, node: Node, tries: Sequence[Joined]) -> list[Finding]:
    findings = []
    reached = {event.addr for event in tries if event.error is None}
    for addr in config.bootstrap:
        error = next((event.error for event in reversed(tries) if event.addr == addr and event.error), None)
        if addr in reached:
            findings.append(Finding("bootstrap", "ok", f"{addr} answers"))
        elif error is not None:
            findings.append(problem("bootstrap", error))
        else:
            findings.append(Finding("bootstrap", "warning", f"{addr} has not answered yet", "Try again."))
    others = reached - set(config.bootstrap)
    if others:
        findings.append(Finding("peers", "ok", f"{len(others)} of the local network, or met before, answer"))
    if not reached:
        findings.append(
            Finding(
                "dht", "warning", "no other node answers",
                "Run `omni seed` on another machine of this network, or name one with --bootstrap.",
            )
        )  # fmt: skip
        return [
            *findings,
            Finding("nat", "unknown", "nobody is there to see this machine"),
        ]
    mapping = await _node_mapping(node)
    nat = await _nat(node)
    return [
        *findings,
        await _look_up(node),
        nat,
        *mapping,
        *([await _punching(node)] if nat.state == "warning" else []),
    ]


async def _look_up(node: Node) -> Finding:
    """How many nodes answer about a random key: the way that every search takes."""
    started = trio.current_time()
    answered = len(await node.routing.closest(secrets.token_bytes(34)))
    took = trio.current_time() - started
    if not answered:
        return Finding(
            "dht", "warning", "nodes are connected, but none answers questions",
            "Check that they run `omni seed` of this version.",
        )  # fmt: skip
    return Finding("dht", "ok", f"{answered} nodes answered a look-up of a random key, in {took:.1f} s")


async def _node_mapping(node: Node) -> list[Finding]:
    """What the router tells this node about forwarding a port, if it is asked."""
    if node.mapper is None:
        return []
    with trio.move_on_after(ROUTER_PATIENCE):
        await node.mapper.answered.wait()
    return [_mapping(node.mapper.address, *node.mapper.described())]


def _mapping(addr: str | None, text: str, remedy: str | None) -> Finding:
    return Finding("port mapping", "ok" if addr is not None else "warning", text, remedy)


async def _nat(node: Node) -> Finding:
    """Whether others can connect here, as they tell this node now."""
    if node.autonat is not None:
        with trio.move_on_after(NAT_PATIENCE):
            await node.autonat.ask_around()
        found = node.autonat.reachability
        state, (text, remedy) = found.state, described(found, mapping=node.mapper is not None)
    else:
        state, text, remedy = "unknown", "this node could not listen, so that nobody tried to connect", None
    if state != "unknown":
        return Finding("nat", "warning" if state == "private" else "ok", text, remedy)
    return await _seen(node, text)


async def _punching(node: Node) -> Finding:
    """Whether what comes through a relay can become direct, given the router there is."""
    from omnistore.net.outside import one_port_for_all

    can = await one_port_for_all(node.network)
    if can is None:
        return Finding(
            "hole punching", "unknown",
            "it takes two public peers to see whether the router shows one port of this machine to all",
        )  # fmt: skip
    if can:
        return Finding(
            "hole punching", "ok",
            "the router shows one port of this machine to all: connections through relays can become direct",
        )  # fmt: skip
    return Finding(
        "hole punching", "warning",
        "the router shows every connection under another port: no hole can be punched, and what comes"
        " through a relay stays there",
        "Forward a TCP port to this machine, or switch the router's NAT to keep ports, where it can.",
    )  # fmt: skip


async def _seen(node: Node, text: str) -> Finding:
    """Too few said whether they can connect: from where peers see us, against what our interfaces have."""
    from omnistore.net.observed import observed_host

    seen: set[str] = set()
    for peer in list(node.network.peers())[:8]:
        try:
            with trio.fail_after(5):
                host = await observed_host(node.network, peer)
        except (NetworkError, RemoteProtocolError, trio.TooSlowError):
            continue
        if host is not None:
            seen.add(host)
    foreign = sorted(seen - set(interface_addresses()))
    if not seen:
        return Finding("nat", "unknown", f"{text}; no peer says from where it sees this machine")
    if foreign:
        return Finding(
            "nat", "warning",
            f"{text}; peers see this machine at {', '.join(foreign)}, which is none of its own addresses: it"
            " is behind NAT",
            "To seed to the outside, forward the TCP port that `omni seed` listens on (4141) to this machine,"
            " or be reached through a relay with --relay-via. Fetching needs nothing.",
        )  # fmt: skip
    return Finding(
        "nat", "unknown",
        f"{text}; peers see this machine at its own address {', '.join(sorted(seen))}: no NAT between them"
        " and it",
    )  # fmt: skip

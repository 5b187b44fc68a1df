"""What must hold at the end of a soak, and the table that says so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from tests.soak.leaks import Trend, trends
from tests.soak.processes import Node, omni

if TYPE_CHECKING:
    from tests.soak.soak import Soak

SETTLING: Final = 25.0
"""Seconds of quiet before the last look: longer than a dead connection is waited for."""
WARM_UP: Final = 0.25
"""Share of the time after which a leak would show: caches are full by then."""
BURST: Final = 1.3
"""What a cap lets through over ten seconds or more, as a share: a burst after a pause, and messages."""
PRESSED: Final = 0.8
"""Share of a cap that must have been reached, or the cap was not tried."""
SERVING: Final = 64 * 1.05 + 96
"""Megabytes that a beset seed may take: 64 MiB of blocks, and what its connections have under way."""
COMMAND_MEMORY: Final = 260.0
"""Megabytes for one command: blocks on their way, and the program."""
LEFT_OVER: Final = 12
"""Tasks that a seed may have more than when nobody had come yet, but for those of its connections."""
_FAULTY_LEVELS: Final = ("error", "critical")


async def check_end(soak: Soak) -> None:
    """The seeds after the storm: empty-handed, sound, and ending in good order."""
    for node in seeds(soak):
        if node.role != "mortal" and node.name in soak.watched:
            check_settled(soak, node)
    for node in seeds(soak):
        code = await node.stop()
        last = node.events()[-1:]
        if code or not last or last[0].get("event") != "stopped":
            soak.fault(f"{node.name} stopped with {code}, its last word {last}")
    for node in seeds(soak):
        verified = await omni(node.home, "verify", "--json")
        if verified.code:
            soak.fault(f"omni verify of {node.name}: {verified.code} {verified.out[-300:]}")
    check_logs(soak)
    check_offenders(soak)
    check_caps(soak)
    check_memory(soak)


def seeds(soak: Soak) -> list[Node]:
    return [node for node in soak.nodes.values() if node.role in ("bootstrap", "long-lived", "mortal")]


def check_settled(soak: Soak, node: Node) -> None:
    """Nothing is left of those who left: tasks and descriptors as with few connections."""
    samples = soak.watched[node.name].samples
    first, last = samples[0], samples[-1]
    if last.tasks > first.tasks + 3 * 6 + LEFT_OVER:
        soak.fault(
            f"{node.name} has {last.tasks:.0f} tasks when all is quiet; it began with {first.tasks:.0f}"
        )
    if last.fds > first.fds + 12:
        soak.fault(
            f"{node.name} has {last.fds:.0f} descriptors when all is quiet; it began with {first.fds:.0f}"
        )


def check_logs(soak: Soak) -> None:
    """No error, no traceback, in any log."""
    for node in soak.nodes.values():
        for line in bad_lines(node.log.read_text(errors="replace").splitlines()):
            soak.fault(f"{node.log.name}: {line[:400]}")


def bad_lines(lines: Iterable[str]) -> list[str]:
    found = []
    for line in lines:
        try:
            document = json.loads(line)
            bad = document.get("level") in _FAULTY_LEVELS or "exception" in document
        except (ValueError, AttributeError):
            # Whatever is not the log: warnings of the interpreter, tracebacks.
            bad = bool(re.search(r"Traceback|Error|Warning|never retrieved", line))
        if bad:
            found.append(line)
    return found[:5]


def check_offenders(soak: Soak) -> None:
    """The liar was found out by those it lied to, and the pest by the seed it troubled."""
    if soak.counts["pins verified"] >= 12 and not soak.liar_named:
        soak.fault("nobody found out the liar")
    pest = soak.nodes["pest"]
    reasons = {
        event["reason"]
        for event in soak.nodes["plain"].events()
        if event.get("event") == "served" and event.get("peer") == pest.peer_id
    }
    soak.counts["streams of the pest ended for a reason"] = len(reasons - {None})
    if len(reasons - {None}) < 3:
        soak.fault(f"the pest was not found out: {reasons}")


def check_caps(soak: Soak) -> None:
    """Over any two looks ten seconds or more apart: none beyond its cap, and each pressed against it."""
    from tests.soak.soak import CAPS, KEEPER_DOWN

    for name, quantity, cap in (
        *((name, "sent", cap) for name, cap in CAPS.items()),
        ("keeper", "received", KEEPER_DOWN),
    ):
        samples = soak.watched[name].samples
        fastest = max(
            (
                (getattr(b, quantity) - getattr(a, quantity)) / (b.at - a.at)
                for a, b in zip(samples, samples[2:], strict=False)
            ),
            default=0.0,
        )
        soak.counts[f"{name}: most kB/s {quantity}"] = int(fastest / 1000)
        if fastest > BURST * cap:
            soak.fault(f"{name} {quantity} {fastest / 1e6:.1f} MB/s, and its cap is {cap / 1e6:.0f}")
        if fastest < PRESSED * cap:
            soak.fault(f"{name} {quantity} {fastest / 1e6:.1f} MB/s at most: its cap was never tried")


def check_memory(soak: Soak) -> None:
    """The seed that the deaf beset stays within what it may have in memory for others; so does every pin."""
    samples = soak.watched["plain"].samples
    most = max(one.rss_mb for one in samples)
    soak.counts["plain: most MB beside its first"] = int(most - samples[0].rss_mb)
    if most - samples[0].rss_mb > SERVING:
        soak.fault(f"plain took {most - samples[0].rss_mb:.0f} MB more than at its start")
    usage = soak.root / "usage"
    pins = [int(line) / 1e6 for line in usage.read_text().split()] if usage.exists() else [0.0]
    soak.counts["most MB of a command"] = int(max(pins))
    if max(pins) > COMMAND_MEMORY:
        soak.fault(f"a command took {max(pins):.0f} MB")


def verdict(soak: Soak) -> dict[str, Any]:
    """Everything found, with what only grew among the faults."""
    found = [one for watched in soak.watched.values() for one in trends(watched, WARM_UP * soak.seconds)]
    for one in found:
        if one.leaks:
            soak.fault(
                f"{one.name}: {one.quantity} grew by {one.growth:.1f} in {one.hours * 60:.0f} min"
                f" from {one.level:.0f}; {one.allowed:.0f} is noise"
            )
    return {
        "minutes": round(soak.at / 60, 1),
        "counts": dict(sorted(soak.counts.items())),
        "bytes_pinned": soak.bytes_pinned,
        "liar_named": soak.liar_named,
        "trends": [_row(one) for one in found],
        "cpu": {name: _cpu(watched.samples) for name, watched in soak.watched.items()},
        "faults": soak.faults,
    }


def _row(one: Trend) -> dict[str, Any]:
    return {
        "node": one.name,
        "what": one.quantity,
        "level": round(one.level, 1),
        "growth": round(one.growth, 2),
        "an_hour": round(one.growth / one.hours, 1) if one.hours else 0,
        "allowed": round(one.allowed, 1),
    }


def _cpu(samples: list[Any]) -> float:
    """Cores used, on average."""
    if len(samples) < 2:
        return 0.0
    return round((samples[-1].cpu - samples[0].cpu) / (samples[-1].at - samples[0].at), 3)


def show(found: dict[str, Any], say: Callable[[str], None]) -> None:
    say(f"{found['minutes']} minutes, {found['bytes_pinned'] / 1e9:.2f} GB pinned and verified")
    for name, count in found["counts"].items():
        say(f"  {name:<44}{count:>8}")
    say(f"  {'pins that named the liar':<44}{found['liar_named']:>8}")
    say(f"{'seed':<12}{'what':<8}{'level':>9}{'growth':>9}{'an hour':>9}{'noise up to':>13}{'cores':>8}")
    for row in found["trends"]:
        cores = f"{found['cpu'][row['node']]:8.3f}" if row["what"] == "rss_mb" else ""
        say(
            f"{row['node']:<12}{row['what']:<8}{row['level']:>9.1f}{row['growth']:>9.1f}"
            f"{row['an_hour']:>9.1f}{row['allowed']:>13.1f}{cores}"
        )
    say("\n".join(f"WRONG: {fault}" for fault in found["faults"]) or "all as it must be")

"""`omni status`: what the seed of this home is doing."""

from __future__ import annotations

from typing import Any

import click
import trio

from omnistore.cli.home import config
from omnistore.cli.output import Output, size, with_output
from omnistore.http.client import ask_seed

_HOW = {"reversal": "by dialling the other end", "punch": "through both routers", "failed": "stayed there"}


@click.command()
@with_output
def status(output: Output) -> None:
    """Show what the seed that runs on this home does: peers, traffic, pins. Exit code 9 when none runs."""
    document = trio.run(ask_seed, config().home, "/v1/status")
    output.result(document)
    for name, text in _lines(document):
        output.line(f"{name:<10} {text}")


def _lines(told: dict[str, Any]) -> list[tuple[str, str]]:
    rates = " ".join(
        f"{name} at most {size(told[key])}/s,"
        for name, key in (("up", "up_limit"), ("down", "down_limit"))
        if told[key]
    )
    lines = [
        ("peer", told["peer_id"]),
        *(("listening", addr) for addr in told["addrs"]),
        ("running", f"for {_duration(told['uptime_seconds'])} as process {told['pid']}"),
        ("peers", f"{told['peers_connected']} connected, {told['streams']} transfers open"),
        ("sent", f"{size(told['bytes_sent'])}, received {size(told['bytes_received'])}"),
        ("holds", f"{told['models']} model{'s' * (told['models'] != 1)}, {size(told['bytes_held'])}"),
        (
            "announced",
            f"{told['announcements']['stored']} times, {told['announcements']['unconfirmed']} in vain",
        ),
        (
            "pins",
            f"{told['pins_running']} running, {told['pins']['done']} done, {told['pins']['failed']} failed",
        ),
    ]
    if reach := told.get("reachability"):
        lines.append(("reachable", reach["text"]))
        if reach["remedy"]:
            lines.append(("", reach["remedy"]))
        if mapping := reach.get("mapping"):
            lines.append(("mapping", mapping["text"]))
            if mapping["remedy"]:
                lines.append(("", mapping["remedy"]))
        if made := {how: count for how, count in reach["made_direct"].items() if count}:
            told_how = ", ".join(f"{count} {_HOW[how]}" for how, count in made.items())
            lines.append(("direct", f"of the connections through relays {told_how}"))
    if relay := told.get("relay"):
        lines.append(
            (
                "relays",
                f"{relay['circuits']} connections, {size(relay['bytes'])} so far; reserved by"
                f" {relay['reservations']} peers; {relay['refused']} refused",
            )
        )
    if rates:
        lines.append(("limits", rates.rstrip(",")))
    if told["disk_cap"] is not None:
        lines.append(("disk cap", size(told["disk_cap"])))
    if told["blocks_failed"]:
        lines.append(("trouble", f"{told['blocks_failed']} blocks could not be read: see `omni verify`"))
    return lines


def _duration(seconds: float) -> str:
    minutes, hours, days = int(seconds) // 60, int(seconds) // 3600, int(seconds) // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"

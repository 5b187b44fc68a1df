"""`omni seed`: run a node that serves what this home holds, until interrupted."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from omnistore.cli.home import config
from omnistore.cli.options import with_caps, with_http, with_mdns
from omnistore.cli.output import Output, size, with_output
from omnistore.config import make_home
from omnistore.errors import BadConfig

if TYPE_CHECKING:
    from omnistore.config import Config
    from omnistore.http.daemon import Daemon
    from omnistore.net.circuits import RelayLimits
    from omnistore.node import NodeEvent
    from omnistore.store.sweep import Swept


@dataclass(frozen=True, slots=True)
class _Seed:
    """What was asked for."""

    settings: Config
    compute: float | None
    """Gigabytes lent; 0 for what is free; None for no compute."""
    allow: Sequence[str]


@click.command()
@click.option(
    "--listen", multiple=True, metavar="MADDR", help="Where to listen; default TCP port 4141 everywhere."
)
@click.option("--bootstrap", multiple=True, metavar="MADDR", help="A node to join the network through.")
@click.option("--announce", multiple=True, metavar="MADDR", help="An address that others reach this node at.")
@click.option(
    "--port-mapping", type=click.Choice(["off", "upnp"]),
    help="Have the router forward the port, for as long as the seed runs.",
)  # fmt: skip
@click.option("--relay", is_flag=True, help="Relay for nodes that nobody can dial, within bounds.")
@click.option("--relay-via", multiple=True, metavar="MADDR", help="A relay to be reached through; auto; off.")
@click.option(
    "--compute", is_flag=False, flag_value=0.0, type=click.FloatRange(min=0), metavar="[=GB]",
    help="Lend compute too, and as much memory (default: what is free).",
)  # fmt: skip
@click.option(
    "--allow", multiple=True, metavar="PEER|any", help="Who may use the compute; nobody by default."
)
@with_caps
@with_mdns
@with_http
@with_output
def seed(
    output: Output,
    listen: tuple[str, ...],
    bootstrap: tuple[str, ...],
    announce: tuple[str, ...],
    port_mapping: str | None,
    relay: bool,
    relay_via: tuple[str, ...],
    compute: float | None,
    allow: tuple[str, ...],
    caps: Mapping[str, Any],
) -> None:
    """Serve what this home holds, and what is added to it meanwhile, until interrupted.

    With --json, one event per line; the first is {"event": "ready", "peer_id": …, "addrs": […]}.
    SIGINT and SIGTERM stop it in good order, with exit code 0.
    """
    if allow and compute is None:
        raise BadConfig(
            "--allow is about --compute, which was not given", remedy="Add --compute, or drop it."
        )
    _check_compute(compute, allow)
    settings = config(
        listen=listen,
        bootstrap=bootstrap,
        announce=announce,
        port_mapping=port_mapping,
        relay=relay or None,
        relay_via=relay_via,
        **caps,
    )
    # The network takes half a second to import: not for `omni seed --help`.
    import trio

    trio.run(_run, output, _Seed(settings, compute, allow))


def _check_compute(compute: float | None, allow: Sequence[str]) -> None:
    """Before anything starts: a seed that says it is ready lends what it was told to."""
    from omnistore.net.addresses import is_peer_id

    if compute is not None and not math.isfinite(compute):
        raise BadConfig(f"--compute={compute} is not a number of gigabytes", remedy="Say --compute=8.")
    for peer in allow:
        if peer != "any" and not is_peer_id(peer):
            raise BadConfig(
                f"--allow {peer[:80]!r} is not a peer ID",
                remedy="`omni id` on that machine prints it; or say any.",
            )


async def _run(output: Output, asked: _Seed) -> None:
    import trio

    from omnistore.http.daemon import Daemon, Statistics
    from omnistore.http.local import LOCK
    from omnistore.net.addresses import default_listen
    from omnistore.node import NodeOptions, open_node
    from omnistore.store.disk import FileLock

    statistics = Statistics()

    def told(event: NodeEvent) -> None:
        statistics.count(event)
        _report(output, event)

    options = NodeOptions(
        server=True,
        listen=asked.settings.listen or default_listen(),
        bootstrap=asked.settings.bootstrap,
        announce=asked.settings.announce,
        lan=asked.settings.mdns,
        recall=True,
        map_port=asked.settings.port_mapping == "upnp",
        relay=_relay_limits(asked.settings) if asked.settings.relay else None,
        relay_via=() if isinstance(asked.settings.relay_via, str) else asked.settings.relay_via,
        relay_auto=asked.settings.relay_via == "auto",
        on_event=told,
    )
    make_home(asked.settings.home)
    with (
        FileLock(asked.settings.home / LOCK, f"{asked.settings.home} as a seed"),
        trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
    ):
        async with open_node(asked.settings, options) as node:
            daemon = Daemon(node, asked.settings, statistics)
            await _answer_locally(output, daemon)
            node.nursery.start_soon(daemon.keep_under_cap, partial(_tell_evicted, output))
            if asked.compute is not None:
                node.start_service(
                    "compute",
                    {
                        "memory_gb": asked.compute or None,
                        "allow": list(asked.allow),
                        "kept": asked.settings.kv_kept,
                    },
                )
            addrs = list(node.network.addrs())
            web = await _answer_http(daemon)
            output.event("ready", peer_id=node.peer_id, addrs=addrs, http=web)
            output.line(f"peer {node.peer_id}")
            for addr in addrs:
                output.line(f"listening on {addr}")
            for url in web:
                output.line(f"gateway at {url}")
            async for received in signals:
                # A second one, while stopping, ends the process at once.
                signal.signal(received, signal.SIG_DFL)
                break
    output.event("stopped")


def _relay_limits(settings: Config) -> RelayLimits:
    from omnistore.net.circuits import RelayLimits

    return RelayLimits(
        reservations=settings.relay_reservations,
        circuits=settings.relay_circuits,
        circuit_bytes=settings.relay_bytes,
        circuit_seconds=settings.relay_time,
    )


async def _answer_http(daemon: Daemon) -> list[str]:
    """Open the gateway, with `/metrics` beside it, where the configuration wants it; its URLs."""
    node, address = daemon.node, daemon.settings.http
    if address is None:
        return []
    from omnistore.http.gateway import gateway
    from omnistore.http.local import public_app
    from omnistore.http.server import HTTPLimits, addresses, open_tcp, parse_address, serve_http

    listeners = await open_tcp(*parse_address(address))
    app = public_app(daemon, gateway(node.store, node.upload))
    node.nursery.start_soon(
        serve_http, app, listeners, HTTPLimits(connections=daemon.settings.http_connections)
    )
    return [f"http://{where}" for where in addresses(listeners)]


async def _answer_locally(output: Output, daemon: Daemon) -> None:
    """Answer this machine's user on the home's socket, for as long as the node runs."""
    from omnistore.http.agreement import MAX_PATH, socket_path
    from omnistore.http.local import local_app
    from omnistore.http.server import open_unix, serve_http

    path = socket_path(daemon.settings.home)
    if len(os.fsencode(path)) > MAX_PATH:
        output.note(f"{path} is too long a name for a socket: `omni status` will not find this seed")
        return
    listener = await open_unix(path)
    await daemon.node.nursery.start(serve_http, local_app(daemon), [listener])


def _tell_evicted(output: Output, swept: Swept) -> None:
    output.event("evicted", models=list(swept.models), bytes=swept.bytes)
    what = ", ".join(swept.models) or f"{len(swept.files)} files that engines had packed"
    output.note(f"freed {size(swept.bytes)} to stay under the disk cap: {what}")


def _report(output: Output, event: NodeEvent) -> None:
    """One event, for a program or for a person."""
    from omnistore.joining import Joined
    from omnistore.naming import Published
    from omnistore.net.addresses import CIRCUIT
    from omnistore.net.reachability import described
    from omnistore.node import Announced, Direct, Moved, PortMapped, Reached
    from omnistore.transfer.server import Served, Unavailable

    match event:
        case Announced(cid, 0):
            output.event("not_provided", cid=cid)
        case Announced(cid, copies):
            output.event("provided", cid=cid, copies=copies)
        case Published(record, copies):
            output.event(
                "published", published=record.name, cid=record.value, sequence=record.sequence, copies=copies
            )
        case Joined(addr, None):
            output.event("joined", addr=addr)
            output.note(f"joined the network through {addr}")
        case Joined(addr, error):
            output.event("not_joined", addr=addr, error=str(error))
            output.note(f"can not reach {addr}; trying on: {error}")
        case Moved(addrs):
            output.event("moved", addrs=addrs)
            relayed = [addr for addr in addrs if CIRCUIT in addr]
            for addr in relayed:
                output.note(f"reachable through a relay at {addr}")
        case PortMapped(addr, why, text):
            output.event("port_mapping", addr=addr, why=why)
            output.note(text)
        case Direct(peer, how):
            output.event("direct", peer=peer, how=how)
            output.note(f"connected directly to {peer}, no longer through a relay")
        case Reached(found):
            output.event(
                "reachability", state=found.state, yes=found.yes, no=found.no, addrs=list(found.addrs)
            )
            output.note(described(found)[0])
        case Served(peer, blocks, count, reason):
            output.event("served", peer=peer, blocks=blocks, bytes=count, reason=reason)
            if blocks:
                output.note(f"sent {size(count)} in {blocks} blocks to {peer}")
        case Unavailable(cid, error):
            output.event("block_failed", cid=cid, error=error.message, remedy=error.remedy)
            output.note(f"can not serve {cid}: {error.diagnosis()}")

"""`omni pin`: fetch a model, or some of its layers, from peers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Final

import click
import trio

from omnistore.cid import CID
from omnistore.cli.home import config, home_store
from omnistore.cli.output import Output, Progress, size, with_output
from omnistore.config import Config
from omnistore.errors import BlockMissing, InputError
from omnistore.manifest import Manifest, PartKey
from omnistore.net.addresses import parse_dialable_untrusted
from omnistore.node import NodeOptions, open_node
from omnistore.selection import parse_parts
from omnistore.store.interface import Store
from omnistore.transfer.client import (
    FetchOptions,
    FetchProgress,
    FetchReport,
    Offline,
    every_part,
    fetch_model,
)
from omnistore.transfer.session import SessionLimits
from omnistore.transfer.window import FlowLimits

_EVENT_EVERY: Final = 0.2
"""Seconds between two progress events of `--json`."""


@click.command()
@click.argument("cid")
@click.option("--layers", help="Only these: 0-15, single numbers, embed, head, or all, separated by commas.")
@click.option("--peer", "peers", multiple=True, metavar="MADDR", help="Ask this peer; can be repeated.")
@click.option("--bootstrap", multiple=True, metavar="MADDR", help="Find peers through this node's DHT.")
@click.option("--output", "to", type=click.Path(path_type=Path), help="Also put the file here.")
@with_output
def pin(
    output: Output,
    cid: str,
    layers: str | None,
    peers: tuple[str, ...],
    bootstrap: tuple[str, ...],
    to: Path | None,
) -> None:
    """Fetch the model CID, verify every block, keep it. Interrupted, it resumes where it was."""
    wanted = CID.parse_untrusted(cid)
    select = every_part if layers is None else partial(parse_parts, layers)
    for addr in peers:
        parse_dialable_untrusted(addr)
    settings = config(bootstrap=bootstrap)
    limits = SessionLimits(flow=FlowLimits(ceiling=settings.window))
    options = FetchOptions(select, peers, to.absolute() if to else None, limits)
    with home_store() as store:
        report = trio.run(_from_here, store, wanted, options) if _is_here(store, wanted, select) else None
    if report is None and not (peers or settings.bootstrap):
        raise InputError(
            f"{cid} is not here, and there is nobody to ask for it",
            remedy="Give a seed's address with --peer, or any node's with --bootstrap.",
        )
    if report is None:
        with output.progress("looking for the model", 0) as bar:
            report = trio.run(_from_peers, settings, wanted, options, partial(_show, output, bar, _Shown()))
    _tell(output, report)


def _is_here(store: Store, cid: CID, select: Callable[[Manifest], Collection[PartKey]]) -> bool:
    try:
        status = store.status(cid)
    except BlockMissing:
        return False
    return set(select(status.model.manifest)) <= status.complete


async def _from_here(store: Store, cid: CID, options: FetchOptions) -> FetchReport:
    return await fetch_model(Offline(), None, store, cid, options)


async def _from_peers(
    settings: Config, cid: CID, options: FetchOptions, progress: Callable[[FetchProgress], None]
) -> FetchReport:
    # While it fetches, the node serves what it already holds.
    joining = NodeOptions(bootstrap=settings.bootstrap, alone_ok=bool(options.peers))
    async with open_node(settings, joining) as node:
        routing = node.routing if settings.bootstrap else None
        return await fetch_model(node.network, routing, node.store, cid, options, progress)


class _Shown:
    """What progress was last shown."""

    done = 0
    at = 0.0


def _show(output: Output, bar: Progress, shown: _Shown, now: FetchProgress) -> None:
    bar.resize(now.total)
    bar.describe(f"{now.model} from {_peers(now.peers)}")
    bar.advance(now.done - shown.done)
    shown.done = now.done
    if time.monotonic() - shown.at >= _EVENT_EVERY:
        shown.at = time.monotonic()
        output.event(
            "progress", done=now.done, total=now.total, peers=now.peers, bytes_fetched=now.bytes_fetched
        )


def _peers(count: int) -> str:
    return "1 peer" if count == 1 else f"{count} peers"


def _tell(output: Output, report: FetchReport) -> None:
    for peer, reason in report.dropped.items():
        output.note(f"dropped {peer}: {reason}")
    rate = report.bytes_fetched / report.seconds if report.seconds else 0.0
    output.note(
        f"{report.model.manifest.name}: {size(report.bytes_fetched)} from {_peers(len(report.peers))} in"
        f" {report.seconds:.1f} s ({size(rate)}/s), {report.blocks_local} blocks were here"
    )
    output.event(
        "done",
        path=report.paths[0] if report.paths else None,
        paths=list(report.paths),
        bytes_fetched=report.bytes_fetched,
        blocks_fetched=report.blocks_fetched,
        blocks_local=report.blocks_local,
        node_bytes=report.node_bytes,
        duplicate_bytes=report.duplicate_bytes,
        peers=dict(report.peers),
        dropped=dict(report.dropped),
        seconds=round(report.seconds, 3),
    )
    for path in report.paths:
        output.line(str(path))

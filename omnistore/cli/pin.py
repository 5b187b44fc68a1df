"""`omni pin`: fetch a model, or some of its layers, from peers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import trio

from omnistore.cid import CID
from omnistore.cli import names
from omnistore.cli.client import check_reachable, open_client, routing_of
from omnistore.cli.fetching import View, fetch_view, peers_text
from omnistore.cli.home import config, home_store
from omnistore.cli.options import with_caps, with_hints, with_mdns
from omnistore.cli.output import Output, size, with_output
from omnistore.cli.web import Sources, with_sources
from omnistore.config import Config
from omnistore.dht.names import publisher_untrusted
from omnistore.http.client import running_seed
from omnistore.pinning import Document, PinRequest, Site, is_here, offline, run_pin
from omnistore.trust import TrustStore


@click.command()
@click.argument("cid")
@click.option("--layers", help="Only these: 0-15, single numbers, embed, head, or all, separated by commas.")
@with_sources
@click.option("--bootstrap", multiple=True, metavar="MADDR", help="Find peers through this node's DHT.")
@click.option("--output", "to", type=click.Path(path_type=Path), help="Also put the file here.")
@click.option("--signer", metavar="NAME|PEERID", help="Refuse a model that this publisher did not sign.")
@with_caps
@with_mdns
@with_hints
@with_output
def pin(
    output: Output,
    cid: str,
    layers: str | None,
    sources: Sources,
    bootstrap: tuple[str, ...],
    to: Path | None,
    signer: str | None,
    caps: Mapping[str, Any],
) -> None:
    """Fetch the model CID, verify every block, keep it. Interrupted, it resumes where it was.

    PUBLISHER/NAME in place of a CID is what that publisher, a peer ID or a name of `omni trust`, says it is.

    With a seed running on this home it fetches in the seed, with the seed's connections and settings.

    Without --peer and --bootstrap it asks the nodes of the local network, and those met before.
    """
    settings = config(bootstrap=bootstrap, **caps)
    trust = TrustStore(settings.home)
    wanted_signer = trust.resolve(signer).peer_id if signer is not None else None
    if names.is_published_name(cid):
        wanted = trio.run(names.find_named, output, settings, cid, sources.peers)
    else:
        wanted = CID.parse_untrusted(cid)
    request = PinRequest(
        wanted,
        layers,
        sources.peers,
        bootstrap,
        to.absolute() if to else None,
        sources.mirrors,
        sources.gateways,
        wanted_signer,
        settings.mirrors,
    )
    watched = Watched(output, trust)
    with home_store() as store:
        here = is_here(store, request)
        if here:
            trio.run(run_pin, offline(store), request, watched)
    if not here:
        with fetch_view(output) as view:
            watched.view = view
            trio.run(_fetch, settings, request, watched)
    watched.conclude()


async def _fetch(settings: Config, request: PinRequest, watched: Watched) -> None:
    """In the seed of this home if one runs, with its connections and identity; else in a node of our own."""
    seed = await running_seed(settings.home)
    if seed is not None:
        await seed.pin(request, watched)
        return
    named = bool(request.peers or request.mirrors or request.gateways)
    check_reachable(settings, f"{request.cid} is not here", named=named)
    # While it fetches, the node serves what it already holds.
    async with open_client(settings, named=named) as node:
        routing = routing_of(node, named=named)
        await run_pin(Site(node.network, routing, node.store, node.limits, node.download), request, watched)


@dataclass(slots=True)
class Watched:
    """Shows the events of a pin, wherever it runs."""

    output: Output
    trust: TrustStore
    view: View | None = None
    done: Document = field(default_factory=dict)

    def __call__(self, event: Document) -> None:
        """One event."""
        if event["event"] == "done":
            self.done = event
            return
        if self.view is None:
            # All of it is here: nothing to watch.
            return
        self.view.show(event)
        self.output.event(event["event"], **{key: value for key, value in event.items() if key != "event"})

    def conclude(self) -> None:
        """What came of it."""
        done = self.done
        for peer, reason in done["dropped"].items():
            self.output.note(f"dropped {peer}: {reason}")
        self._tell_mirrors(done["mirrors"])
        publisher = done["publisher"]
        whose = self.trust.describe(publisher_untrusted(publisher) if publisher else None)
        self.output.note(f"signed by {whose}")
        rate = done["bytes_fetched"] / done["seconds"] if done["seconds"] else 0.0
        self.output.note(
            f"{done['model']}: {size(done['bytes_fetched'])} from {peers_text(len(done['peers']))} in"
            f" {done['seconds']:.1f} s ({size(rate)}/s), {done['blocks_local']} blocks were here"
        )
        self.output.event("done", **{key: value for key, value in done.items() if key != "event"})
        for path in done["paths"]:
            self.output.line(path)

    def _tell_mirrors(self, hints: list[Document]) -> None:
        """Who else has the files, by the word of peers, and was not asked."""
        idle = [
            hint["url"] + ("" if hint["public"] else " (not public)")
            for hint in hints
            if not hint["followed"]
        ]
        if idle:
            more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
            self.output.note(
                f"mirrors named by peers, not asked: {', '.join(idle[:3])}{more};"
                " --from URL adds one, --mirrors those on the public network"
            )

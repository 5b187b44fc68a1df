"""`omni providers`: who claims to hold a model, and what they really hold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from omnistore.cid import CID
from omnistore.cli.client import open_client
from omnistore.cli.fetching import peers_text
from omnistore.cli.home import config
from omnistore.cli.output import Output, size, with_output
from omnistore.errors import NoProviders, RemoteProtocolError
from omnistore.net.addresses import parse_dialable_untrusted
from omnistore.transfer.hints import is_public

if TYPE_CHECKING:
    from omnistore.net.interface import Provider
    from omnistore.node import Node
    from omnistore.transfer.probe import Description, Found


_log = logging.getLogger(__name__)


@click.command()
@click.argument("cid")
@click.option("--peer", "peers", multiple=True, metavar="MADDR", help="Ask this peer too; can be repeated.")
@click.option("--bootstrap", multiple=True, metavar="MADDR", help="Find peers through this node's DHT.")
@with_output
def providers(output: Output, cid: str, peers: tuple[str, ...], bootstrap: tuple[str, ...]) -> None:
    """List who claims to hold the model CID, or parts of it, and ask each what it really holds."""
    import trio

    wanted = CID.parse_untrusted(cid)
    for addr in peers:
        parse_dialable_untrusted(addr)
    settings = config(bootstrap=bootstrap)

    async def run() -> tuple[Description, list[Found], dict[str, int], dict[str, list[str]]]:
        async with open_client(settings, alone_ok=bool(peers)) as node:
            description, found, claims = await _look(node, wanted, peers)
            return description, found, claims, await _mirrors(node, wanted, found)

    description, found, claims, mirrors = trio.run(run)
    total = sum(ref.size for ref in description.manifest.parts)
    output.result(
        {
            "cid": wanted,
            "name": description.manifest.name,
            "size": total,
            "parts": len(description.parts),
            "providers": [_document(one, claims) for one in found],
            "mirrors": [
                {"url": url, "peers": named_by, "public": is_public(url)} for url, named_by in mirrors.items()
            ],
        }
    )
    output.line(f"{description.manifest.name}, {size(total)} in {len(description.parts)} parts")
    for one in found:
        holds = (
            f"not reachable: {one.error}" if one.error else f"{size(one.bytes_held)}, {one.parts} parts whole"
        )
        output.line(f"{one.provider.peer}  claims {claims.get(one.provider.peer, 0):>4}  {holds}")
    for url, named_by in mirrors.items():
        output.line(f"mirror {url}  named by {peers_text(len(named_by))}")


async def _look(
    node: Node, cid: CID, peers: tuple[str, ...]
) -> tuple[Description, list[Found], dict[str, int]]:
    """Find everybody, ask everybody."""
    import trio

    from omnistore.dht.records import merge
    from omnistore.transfer.client import provider_at
    from omnistore.transfer.probe import Probe

    named = [provider_at(addr) for addr in peers]
    claims: dict[str, int] = {}
    known: list[Provider] = list(named)
    limiter = trio.CapacityLimiter(16)

    async def find(key: CID) -> None:
        async with limiter:
            for provider in await node.routing.find_providers(key):
                claims[provider.peer] = claims.get(provider.peer, 0) + 1
                known.append(provider)

    await find(cid)
    probe = Probe(node.network, node.store)
    if not known:
        raise NoProviders(f"nobody says that it holds {cid}", remedy="Name a node that does with --peer.")
    description = await probe.describe(cid, merge(known, without=node.peer_id, limit=64))
    async with trio.open_nursery() as nursery:
        for key in {description.manifest_cid, *description.parts} - {cid}:
            nursery.start_soon(find, key)
    found: list[Found] = []

    async def ask(provider: Provider) -> None:
        async with limiter:
            found.append(await probe.ask(provider, description))

    async with trio.open_nursery() as nursery:
        for provider in merge(known, without=node.peer_id, limit=256):
            nursery.start_soon(ask, provider)
    found.sort(key=lambda one: (-one.bytes_held, one.provider.peer))
    return description, found, claims


async def _mirrors(node: Node, cid: CID, found: Sequence[Found]) -> dict[str, list[str]]:
    """Web servers that those who answered name, and who named each."""
    import trio

    from omnistore.transfer.hinting import ask_hints

    named: dict[str, list[str]] = {}
    limiter = trio.CapacityLimiter(16)

    async def ask(provider: Provider) -> None:
        async with limiter:
            try:
                urls = await ask_hints(node.network, provider, cid)
            except RemoteProtocolError as error:
                _log.warning("what %s says of mirrors is of no use: %s", provider.peer, error)
                return
        for url in urls:
            named.setdefault(url, []).append(provider.peer)

    async with trio.open_nursery() as nursery:
        for one in found:
            if one.error is None:
                nursery.start_soon(ask, one.provider)
    return {url: sorted(named[url]) for url in sorted(named)}


def _document(found: Found, claims: dict[str, int]) -> dict[str, object]:
    return {
        "peer": found.provider.peer,
        "addrs": list(found.provider.addrs),
        "claims": claims.get(found.provider.peer, 0),
        "reachable": found.error is None,
        "error": found.error,
        "parts": found.parts,
        "bytes_held": found.bytes_held,
    }

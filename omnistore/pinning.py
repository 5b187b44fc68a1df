"""One pin as a value and as a stream of events, wherever it runs.

`omni pin` and a running seed fetch through the same `run_pin`, so both do, and say, the same; the
events are plain documents, ready for JSON Lines. Renders nothing, and finds no node to run on: that
is the command line's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import trio

from omnistore.cid import CID
from omnistore.errors import BlockMissing, InputError
from omnistore.net.addresses import parse_dialable_untrusted
from omnistore.net.interface import ContentRouting, Network
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
from omnistore.transfer.ranges import check_url
from omnistore.transfer.rate import TokenBucket
from omnistore.transfer.window import LIMITS, SessionLimits

Document: TypeAlias = dict[str, Any]
"""What JSON can say."""

EVENT_EVERY: Final = 0.2
"""Seconds between two progress events."""
_MAX_PEERS: Final = 64
"""Peers that a request may name."""


_FIELDS: Final = frozenset(
    {"cid", "layers", "peers", "bootstrap", "output", "mirrors", "gateways", "signer", "hints"}
)


@dataclass(frozen=True, slots=True)
class PinRequest:
    """What somebody asked to have fetched and kept."""

    cid: CID
    layers: str | None = None
    """As `omnistore.selection` reads it; None for the whole model."""
    peers: tuple[str, ...] = ()
    """Multiaddrs ending in `/p2p/…` to ask."""
    bootstrap: tuple[str, ...] = ()
    """Nodes to join the network through, beyond those of the configuration."""
    output: Path | None = None
    """Where the file is wanted too; absolute."""
    mirrors: tuple[str, ...] = ()
    """URLs of web servers that have the model's files."""
    gateways: tuple[str, ...] = ()
    """URLs of IPFS trustless gateways."""
    signer: str | None = None
    """Peer ID of the one publisher whose signature is accepted; None for whoever."""
    hints: bool = False
    """Whether mirrors are asked that peers name."""

    def options(self, limits: SessionLimits) -> FetchOptions:
        """The same for `fetch_model`."""
        select = every_part if self.layers is None else partial(parse_parts, self.layers)
        return FetchOptions(
            select,
            self.peers,
            self.output,
            limits,
            mirrors=self.mirrors,
            gateways=self.gateways,
            signer=self.signer,
            hints=self.hints,
        )

    def document(self) -> Document:
        """The same for another process."""
        return {
            "cid": str(self.cid),
            "layers": self.layers,
            "peers": list(self.peers),
            "bootstrap": list(self.bootstrap),
            "output": None if self.output is None else str(self.output),
            "mirrors": list(self.mirrors),
            "gateways": list(self.gateways),
            "signer": self.signer,
            "hints": self.hints,
        }


def request_untrusted(document: object) -> PinRequest:
    """The request in a document. Raises `InputError` (also as `MalformedCID` and `BadConfig`)."""
    if not isinstance(document, dict):
        raise InputError("a request to pin is an object with a cid")
    fields: Mapping[str, object] = document
    unknown = fields.keys() - _FIELDS
    if unknown:
        raise InputError(f"a request to pin has no {sorted(map(str, unknown))[0][:80]!r}")
    output = _text(fields, "output")
    if output is not None and not Path(output).is_absolute():
        raise InputError(f"output: {output[:80]!r} is not an absolute path")
    return PinRequest(
        CID.parse_untrusted(_text(fields, "cid") or ""),
        _text(fields, "layers"),
        _addresses(fields, "peers", parse_dialable_untrusted),
        _addresses(fields, "bootstrap", parse_dialable_untrusted),
        None if output is None else Path(output),
        _addresses(fields, "mirrors", check_url),
        _addresses(fields, "gateways", check_url),
        _text(fields, "signer"),
        _flag(fields, "hints"),
    )


def _text(fields: Mapping[str, object], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name}: {str(value)[:80]} is not a text")
    return value


def _flag(fields: Mapping[str, object], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"{name}: {str(value)[:80]} is not true or false")
    return value


def _addresses(fields: Mapping[str, object], name: str, check: Callable[[str], object]) -> tuple[str, ...]:
    value = fields.get(name) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{name}: {str(value)[:80]} is not a list of texts")
    if len(value) > _MAX_PEERS:
        raise InputError(f"{name}: more than {_MAX_PEERS} addresses")
    for addr in value:
        check(addr)
    return tuple(value)


@dataclass(frozen=True, slots=True)
class Site:
    """Where a pin runs."""

    network: Network
    routing: ContentRouting | None
    store: Store
    limits: SessionLimits
    """As the configuration has them."""
    download: TokenBucket | None = None
    """The node's cap on what it fetches."""
    hints: bool = False
    """Whether mirrors are asked that peers name, though a request does not say so."""


def is_here(store: Store, request: PinRequest) -> bool:
    """Whether all that is asked for is held already, so that no network is needed."""
    try:
        status = store.status(request.cid)
    except BlockMissing:
        return False
    return set(request.options(LIMITS).select(status.model.manifest)) <= status.complete


def offline(store: Store) -> Site:
    """The place for what `is_here`."""
    return Site(Offline(), None, store, LIMITS)


async def run_pin(site: Site, request: PinRequest, tell: Callable[[Document], None]) -> None:
    """Fetch and keep; `tell` gets `progress` events now and then and `done` at the end.

    Raises what `fetch_model` raises.
    """
    told_at = -EVENT_EVERY

    def progressed(now: FetchProgress) -> None:
        nonlocal told_at
        if trio.current_time() - told_at >= EVENT_EVERY or now.done == now.total:
            told_at = trio.current_time()
            tell(_progress(now))

    options = request.options(site.limits)
    options = replace(options, download=site.download, hints=request.hints or site.hints)
    report = await fetch_model(site.network, site.routing, site.store, request.cid, options, progressed)
    tell(_done(report))


def _progress(now: FetchProgress) -> Document:
    return {
        "event": "progress",
        "model": now.model,
        "done": now.done,
        "total": now.total,
        "peers": now.peers,
        "bytes_fetched": now.bytes_fetched,
        "by_peer": dict(now.by_peer),
        "files": [{"name": one.name, "done": one.done, "total": one.total} for one in now.files],
    }


def _done(report: FetchReport) -> Document:
    paths = [str(path) for path in report.paths]
    return {
        "event": "done",
        "model": report.model.manifest.name,
        "publisher": report.model.publisher.peer_id if report.model.publisher else None,
        "path": paths[0] if paths else None,
        "paths": paths,
        "bytes_fetched": report.bytes_fetched,
        "blocks_fetched": report.blocks_fetched,
        "blocks_local": report.blocks_local,
        "node_bytes": report.node_bytes,
        "duplicate_bytes": report.duplicate_bytes,
        "peers": dict(report.peers),
        "dropped": dict(report.dropped),
        "seconds": round(report.seconds, 3),
        "mirrors": [asdict(hint) for hint in report.mirrors],
    }

"""What a running seed knows of itself: counts, who it is connected to, what it holds.

`Daemon` gathers; `local` and `/metrics` show. Counts from the seed's start and keeps nothing on disk.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import trio

from omnistore.config import Config
from omnistore.errors import StoreError
from omnistore.http.metrics import Metric
from omnistore.http.process import process_metrics
from omnistore.net.metering import MeteredNetwork
from omnistore.net.reachability import NEEDED, STATES, Reachability, described
from omnistore.node import Announced, Node, NodeEvent
from omnistore.pinning import Document, Site
from omnistore.store.eviction import evict
from omnistore.store.interface import ModelStatus
from omnistore.store.sweep import Swept
from omnistore.transfer.server import Served, Unavailable

if TYPE_CHECKING:  # with libp2p behind it
    from omnistore.net.upnp import PortMapper

_log = logging.getLogger(__name__)

CAP_EVERY: Final = 10.0
"""Seconds between two looks at the disk cap; a look takes a millisecond for a hundred models."""


@dataclass(slots=True)
class Statistics:
    """Counts since the start."""

    announced: Counter[str] = field(default_factory=lambda: Counter(stored=0, unconfirmed=0))
    """Announcements in the DHT by outcome."""
    blocks_sent: int = 0
    """Of streams that have ended."""
    blocks_failed: int = 0
    """That could not be read: a file changed or is rotten."""
    streams_ended: Counter[str] = field(default_factory=lambda: Counter(done=0, refused=0))
    """By outcome; refused are those whose requester broke the protocol, or did not read."""
    pins: Counter[str] = field(default_factory=lambda: Counter(done=0, failed=0, cancelled=0))
    """Pins that ended, by outcome."""
    pins_running: int = 0
    bytes_pinned: int = 0
    """Fetched for pins that are done."""
    models_evicted: int = 0
    bytes_evicted: int = 0
    """Freed to stay under the disk cap."""

    def count(self, event: NodeEvent) -> None:
        """One event of the node."""
        match event:
            case Announced(_, copies):
                self.announced["stored" if copies else "unconfirmed"] += 1
            case Served(_, blocks, _, reason):
                self.blocks_sent += blocks
                self.streams_ended["done" if reason is None else "refused"] += 1
            case Unavailable():
                self.blocks_failed += 1


@dataclass(slots=True, eq=False)
class Daemon:
    """A seed and its counts."""

    node: Node
    settings: Config
    statistics: Statistics
    started: float = field(default_factory=time.time)
    """Seconds since 1970."""

    @property
    def meter(self) -> MeteredNetwork:
        """The node's network as fetches use it."""
        return self.node.meter

    @property
    def site(self) -> Site:
        """Where its pins run."""
        return Site(
            self.meter, self.node.routing, self.node.store, self.node.limits, self.node.download,
            self.node.hints,
        )  # fmt: skip

    async def keep_under_cap(self, tell: Callable[[Swept], None]) -> None:
        """Evict whenever models take more than the cap, if there is one."""
        cap, store = self.settings.disk_cap, self.node.store
        while cap is not None:
            try:
                rounds = await trio.to_thread.run_sync(partial(evict, store, cap, now=time.time()))
            except StoreError as error:
                _log.warning("can not keep under the disk cap: %s", error.diagnosis())
                rounds = []
            for swept in rounds:
                self.statistics.models_evicted += len(swept.models)
                self.statistics.bytes_evicted += swept.bytes
                tell(swept)
            await trio.sleep(CAP_EVERY)

    async def status(self) -> Document:
        """The seed in a few numbers."""
        models = await self._models()
        traffic, counted = self.meter.traffic, self.statistics
        return {
            "peer_id": self.node.peer_id,
            "version": version("omni"),
            "pid": os.getpid(),
            "home": str(self.settings.home),
            "started": round(self.started, 3),
            "uptime_seconds": round(time.time() - self.started, 1),
            "addrs": list(self.node.network.addrs()),
            "peers_connected": len(self.node.network.peers()),
            "models": len(models),
            "bytes_held": sum(model.bytes_held for model in models),
            "disk_cap": self.settings.disk_cap,
            "up_limit": self.settings.up_limit,
            "down_limit": self.settings.down_limit,
            "bytes_sent": traffic.sent,
            "bytes_received": traffic.received,
            "streams": traffic.streams,
            "relay": self._relay(),
            "reachability": self._reachability(),
            "blocks_sent": counted.blocks_sent,
            "blocks_failed": counted.blocks_failed,
            "announcements": dict(counted.announced),
            "pins_running": counted.pins_running,
            "pins": dict(counted.pins),
        }

    def _relay(self) -> Document | None:
        """What it relays for others; None if it does not."""
        relay = self.node.relay
        if relay is None:
            return None
        state = relay.state
        return {
            "reservations": state.reservations(trio.current_time()),
            "circuits": state.circuits,
            "bytes": state.bytes_relayed,
            "refused": sum(state.refused.values()),
        }

    def _reachability(self) -> Document:
        """Whether others can connect, and how many say so."""
        found, network = self._found(), self.node.network
        mapper = self.node.mapper
        text, remedy = described(found, relays=len(network.circuits), mapping=mapper is not None)
        dialbacks = self.node.dialbacks
        return {
            "state": found.state,
            "scope": found.scope,
            "yes": found.yes,
            "no": found.no,
            "needed": NEEDED,
            "addrs": list(found.addrs),
            "text": text,
            "remedy": remedy,
            "relays": list(network.circuits),
            "mapping": _mapping(mapper) if mapper is not None else None,
            "made_direct": dict(self.node.punching.outcomes) if self.node.punching else {},
            "asked_of_us": dict(dialbacks.state.outcomes) if dialbacks else {},
        }

    def _found(self) -> Reachability:
        autonat = self.node.autonat
        return autonat.reachability if autonat else Reachability("unknown", "private", 0, 0)

    def peers(self) -> list[Document]:
        """Everyone connected or met lately, most bytes first."""
        connected = set(self.node.network.peers())
        traffic = self.meter.traffic.peers()
        rows = [
            {
                "peer": peer,
                "connected": peer in connected,
                "streams": traffic[peer].streams if peer in traffic else 0,
                "bytes_sent": traffic[peer].sent if peer in traffic else 0,
                "bytes_received": traffic[peer].received if peer in traffic else 0,
            }
            for peer in sorted(connected | traffic.keys())
        ]
        return sorted(rows, key=lambda row: -int(row["bytes_sent"]) - int(row["bytes_received"]))

    async def models(self) -> list[Document]:
        """Every model here and how much of it."""
        return [describe(status) for status in await self._models()]

    async def metrics(self) -> list[Metric]:
        """Everything that is counted or measured, for Prometheus; documented in spec/service/README.md."""
        models = await self._models()
        traffic, counted = self.meter.traffic, self.statistics
        free = shutil.disk_usage(self.settings.home).free
        found, dialbacks = self._found(), self.node.dialbacks

        def gauge(name: str, text: str, value: float) -> Metric:
            return Metric(name, "gauge", text, value)

        def counter(name: str, text: str, value: float) -> Metric:
            return Metric(name, "counter", text, value)

        def outcomes(name: str, text: str, counts: Counter[str]) -> Metric:
            return Metric(name, "counter", text, label="outcome", by_label=dict(counts))

        return [
            Metric("omni_build_info", "gauge", "The version that runs.", label="version",
                   by_label={version("omni"): 1}),
            gauge("omni_start_time_seconds", "When the seed started, in seconds since 1970.", self.started),
            counter("omni_transfer_sent_bytes_total", "Bytes sent over the transfer protocol.", traffic.sent),
            counter("omni_transfer_received_bytes_total", "Bytes received over the transfer protocol.",
                    traffic.received),
            gauge("omni_transfer_streams", "Transfer streams open now, in both directions.", traffic.streams),
            outcomes("omni_transfer_streams_ended_total",
                     "Served streams that ended; refused: the requester broke the protocol or did not read.",
                     counted.streams_ended),
            counter("omni_blocks_sent_total", "Blocks sent on streams that have ended.", counted.blocks_sent),
            counter("omni_blocks_failed_total", "Blocks held that could not be read or were rotten.",
                    counted.blocks_failed),
            gauge("omni_peers", "Peers connected now.", len(self.node.network.peers())),
            outcomes("omni_announcements_total", "Announcements in the DHT; stored: some peer confirmed it.",
                     counted.announced),
            outcomes("omni_pins_total", "Pins asked of this seed that have ended.", counted.pins),
            gauge("omni_pins_running", "Pins under way.", counted.pins_running),
            counter("omni_pinned_bytes_total", "Bytes fetched by pins that are done.", counted.bytes_pinned),
            gauge("omni_models", "Models known here, whole or in part.", len(models)),
            gauge("omni_store_bytes", "Bytes of models held.", sum(one.bytes_held for one in models)),
            counter("omni_evicted_models_total", "Models evicted to stay under the disk cap.",
                    counted.models_evicted),
            counter("omni_evicted_bytes_total", "Bytes freed to stay under the disk cap.",
                    counted.bytes_evicted),
            gauge("omni_disk_free_bytes", "Bytes free on the disk of the home.", free),
            Metric("omni_reachability", "gauge", "1 for what others found: whether they can connect here.",
                   label="state",
                   by_label={state: int(state == found.state) for state in STATES}),
            Metric("omni_reachability_votes", "gauge", "Networks that could, and could not, connect here.",
                   label="answer", by_label={"yes": found.yes, "no": found.no}),
            gauge("omni_relays", "Relays it is reached through.", len(self.node.network.circuits)),
            gauge("omni_port_mapped", "1 while the router says that it forwards a port to this node.",
                  len(self.node.network.mapped)),
            outcomes("omni_direct_connections_total",
                     "Relayed connections that reached this node: made direct, or not.",
                     self.node.punching.outcomes if self.node.punching else Counter()),
            outcomes("omni_dial_backs_total", "Peers dialled because they asked whether they can be.",
                     dialbacks.state.outcomes if dialbacks else Counter()),
            *process_metrics(),
        ]  # fmt: skip

    async def _models(self) -> Sequence[ModelStatus]:
        models: Sequence[ModelStatus] = await trio.to_thread.run_sync(self.node.store.models)
        return models


def _mapping(mapper: PortMapper) -> Document:
    """What the router says."""
    text, remedy = mapper.described()
    return {"addr": mapper.address, "why": mapper.why, "text": text, "remedy": remedy}


def describe(status: ModelStatus) -> dict[str, Any]:
    """A model, for another process."""
    manifest = status.model.manifest
    return {
        "cid": str(status.model.cid),
        "name": manifest.name,
        "bytes": sum(ref.size for ref in manifest.parts),
        "bytes_held": status.bytes_held,
        "whole": status.whole,
        "pinned": len(status.pinned),
        "parts": len(manifest.parts),
        "files": [str(path) for path in status.files],
        "referenced": status.referenced,
        "mirrors": list(status.mirrors),
    }

"""`Node`: the composition root, where store, network, DHT and transfer meet.

`open_node` starts what a node is made of and stops it in reverse, however the block ends. A seed
(`NodeOptions.server`) keeps DHT records for others, announces what its store holds, notices what
other processes add to the same home. A client does none of that, and is ready when one peer
answered that it joins through. Decides nothing itself.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import trio

from omnistore.cid import CID
from omnistore.config import Config, load_key
from omnistore.dht.names import NAMESPACE, NameRules
from omnistore.dht.service import DHTService
from omnistore.errors import BadConfig
from omnistore.joining import Joined, Ways, open_joining
from omnistore.keys import PrivateKey
from omnistore.membership import membership
from omnistore.naming import NameBook, Publication, Published
from omnistore.net.addresses import parse_dialable_untrusted
from omnistore.net.circuits import RelayLimits
from omnistore.net.metering import MeteredNetwork
from omnistore.net.reachability import Reachability
from omnistore.store.files import FileStore
from omnistore.transfer.bitswap_server import serve_bitswap
from omnistore.transfer.hinting import serve_hints
from omnistore.transfer.pacing import Pacer
from omnistore.transfer.rate import TokenBucket
from omnistore.transfer.serve import ServeLimits
from omnistore.transfer.server import ServeEvent, serve_transfer
from omnistore.transfer.window import LIMITS, FlowLimits, SessionLimits

if TYPE_CHECKING:  # importing libp2p takes half a second: only where a node starts
    from omnistore.net.autonat import Autonat, DialBackServer
    from omnistore.net.circuit_transport import Circuits
    from omnistore.net.dcutr import HolePunching
    from omnistore.net.libp2p import Libp2pNetwork
    from omnistore.net.relay import Relay
    from omnistore.net.upnp import PortMapper

logger = logging.getLogger(__name__)

SERVICES: Final = "omni.services"
"""Entry point group of what other packages run inside a node, such as `compute`."""
WATCH_EVERY: Final = 1.0
"""Seconds between looks at the index for what other processes did; a look takes microseconds."""


ROUTER_PATIENCE: Final = 12.0
"""Seconds for the router to answer, where it is asked; that there is none is known after nine."""


@dataclass(frozen=True, slots=True)
class Announced:
    """A CID was announced in the DHT."""

    cid: CID
    copies: int
    """Peers confirmed to have the record."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The addresses that others can dial changed: by a relay, the router, or what others found out."""

    addrs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reached:
    """Whether others can connect to this node became known, or changed."""

    found: Reachability


@dataclass(frozen=True, slots=True)
class PortMapped:
    """What the router says about forwarding a port to this node became known, or changed."""

    addr: str | None
    """The multiaddr outside; None where there is none."""
    why: str | None
    """Why the last attempt failed, in a word or two; with an address that still stands, perhaps."""
    text: str
    """For people."""


@dataclass(frozen=True, slots=True)
class Direct:
    """A peer that was connected through a relay is connected directly now."""

    peer: str
    how: str
    """`reversal`: one end dialled the other, which is public. `punch`: both dialled at once."""


NodeEvent: TypeAlias = Announced | Direct | Joined | Moved | PortMapped | Published | Reached | ServeEvent


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What kind of node, and where."""

    server: bool = False
    """A seed, rather than a command that leaves when it is done."""
    listen: Sequence[str] = ()
    """Multiaddrs; a client needs none."""
    bootstrap: Sequence[str] = ()
    """Multiaddrs ending in `/p2p/…` of nodes to join the DHT through."""
    announce: Sequence[str] = ()
    """Multiaddrs to hand out first, as seen from outside."""
    lan: bool = False
    """Look for other nodes on the local network; a seed is found there too."""
    recall: bool = False
    """Join through peers met before, too."""
    alone_ok: bool = False
    """For a client: go on when nobody answers that it could join through."""
    map_port: bool = False
    """Ask the router over UPnP to forward the port that it listens at."""
    relay: RelayLimits | None = None
    """Relay for others, within these."""
    relay_via: Sequence[str] = ()
    """Multiaddrs ending in `/p2p/…` of relays to be reached through."""
    relay_auto: bool = False
    """Be reached through some of the peers that relay, while nobody can connect to this node."""
    on_event: Callable[[NodeEvent], None] = lambda event: None


@dataclass(slots=True, eq=False)
class Node:
    """A running node. Made by `open_node`."""

    key: PrivateKey
    store: FileStore
    network: Libp2pNetwork
    routing: DHTService
    nursery: trio.Nursery
    """Its tasks end with the node."""
    options: NodeOptions
    meter: MeteredNetwork
    """`network` for the transfer protocol, counted."""
    upload: Pacer = field(default_factory=lambda: Pacer(None))
    """The cap on blocks sent, which everything that sends some heeds."""
    limits: SessionLimits = LIMITS
    """Of every fetch of this node."""
    hints: bool = False
    """Whether its fetches ask mirrors that peers name."""
    download: TokenBucket | None = None
    """The cap on blocks fetched, for every `FetchOptions.download` of this node."""
    relay: Relay | None = None
    """If it relays."""
    autonat: Autonat | None = None
    """If it listens: whether others can connect."""
    mapper: PortMapper | None = None
    """If it asks the router to forward a port."""
    punching: HolePunching | None = None
    """What makes relayed connections direct."""
    dialbacks: DialBackServer | None = None
    """If it tells others whether they can be connected to."""
    _index_version: int = field(default=-1)

    @property
    def peer_id(self) -> str:
        """Our peer ID, base58."""
        return self.network.peer_id

    async def announce(self) -> None:
        """Announce what the store holds now, and nothing else; needed only to be quicker than the watch."""
        self.routing.hold(await trio.to_thread.run_sync(self.store.announced))

    def start_service(self, name: str, options: Mapping[str, Any]) -> None:
        """Run the service that another package offers under `name`, beside the node's own tasks.

        Its signature is `async def service(node: Node, options: Mapping[str, Any]) -> None`.
        Raises `BadConfig` when no such service is installed.
        """
        found = entry_points(group=SERVICES, name=name)
        if not found:
            raise BadConfig(f"no service {name!r} is installed in this environment")
        service: Callable[[Node, Mapping[str, Any]], Awaitable[None]] = next(iter(found)).load()
        self.nursery.start_soon(service, self, options, name=f"service {name}")

    async def watch(self) -> None:
        """Announce what this or another process adds to the home, and stop for what it drops."""
        while True:
            version = await trio.to_thread.run_sync(self.store.version)
            if version != self._index_version:
                self._index_version = version
                await self.announce()
            await trio.sleep(WATCH_EVERY)


@asynccontextmanager
async def open_node(config: Config, options: NodeOptions) -> AsyncIterator[Node]:
    """Run a node of this home until the block ends.

    Raises `BadConfig` for addresses, `StoreError` for the home, and, for a client, `PeerUnreachable`
    when nobody answers that it could join through.
    """
    from omnistore.net.slim import import_libp2p

    import_libp2p()
    from omnistore.net.kademlia import open_kademlia
    from omnistore.net.libp2p import NetworkOptions, open_network

    for addr in (*options.bootstrap, *options.relay_via):
        parse_dialable_untrusted(addr)
    key = load_key(config.home)
    swarm = membership(config.home)
    network_options = NetworkOptions(
        announce=tuple(options.announce),
        connections=config.connections,
        dial_deadline=config.dial_timeout,
        psk=swarm.psk if swarm else None,
    )
    namespaces = {NAMESPACE: NameRules()}
    store = await trio.to_thread.run_sync(FileStore, config)
    try:
        async with (
            open_network(key, options.listen, network_options) as network,
            open_kademlia(
                network, server=options.server, namespaces=namespaces, keys=config.dht_keys
            ) as kademlia,
            trio.open_nursery() as nursery,
        ):
            routing = DHTService(
                kademlia, on_provided=lambda cid, copies: options.on_event(Announced(cid, copies))
            )
            node = Node(
                key,
                store,
                network,
                routing,
                nursery,
                options,
                MeteredNetwork(network),
                Pacer(config.up_limit),
                session_limits(config),
                config.mirrors,
            )
            if config.down_limit is not None:
                node.download = TokenBucket(config.down_limit, trio.current_time())
            _punch(node)
            _map_port(node)
            _autonat(node)
            _relay(node)
            await nursery.start(_serve, node, _serve_limits(config))
            nursery.start_soon(serve_hints, node.meter, node.store)
            if options.server:
                nursery.start_soon(_serve_bitswap, node)
                nursery.start_soon(routing.run)
                nursery.start_soon(node.watch)
                publication = Publication(routing, NameBook(config.home), key, options.on_event)
                kademlia.on_peer(publication.hurry)
                nursery.start_soon(publication.run)
            ways = _ways(config, options)
            async with open_joining(kademlia, ways, server=options.server, tell=options.on_event) as joining:
                if not options.server and (ways.bootstrap or ways.lan or ways.recall):
                    await joining.first(ways, alone_ok=options.alone_ok)
                yield node
            nursery.cancel_scope.cancel()
    finally:
        store.close()


def session_limits(config: Config) -> SessionLimits:
    """What every fetch of this home keeps to."""
    return SessionLimits(
        flow=FlowLimits(ceiling=config.window),
        peers=config.fetch_peers,
        stall_timeout=config.stall_timeout,
        provider_timeout=config.provider_timeout,
    )


def _serve_limits(config: Config) -> ServeLimits:
    return ServeLimits(
        streams=config.serve_streams, ahead=config.serve_peer_memory, memory=config.serve_memory
    )


def _ways(config: Config, options: NodeOptions) -> Ways:
    return Ways(
        bootstrap=options.bootstrap,
        lan=options.lan,
        listening=options.listen if options.server else None,
        home=config.home,
        recall=options.recall,
    )


def _moved(node: Node) -> None:
    """Tell everybody the addresses that there are now."""
    node.routing.moved()
    node.options.on_event(Moved(tuple(node.network.addrs())))


def _relay(node: Node) -> None:
    """Dial through relays, be reached through some, be one: whatever this node is to do of it."""
    from omnistore.net.circuit_transport import Circuits
    from omnistore.net.relay import Relay
    from omnistore.net.relay_use import RelayUse

    circuits: Circuits = Circuits(node.network, partial(_moved, node))
    circuits.install()
    for addr in node.options.relay_via:
        node.nursery.start_soon(circuits.keep_reserved, addr)
    autonat = node.autonat
    if node.options.relay_auto and autonat is not None:
        use = RelayUse(circuits, lambda: autonat.reachability.state)
        node.nursery.start_soon(use.run)
    if node.options.relay is not None:
        node.relay = Relay(node.network, node.options.relay)
        node.nursery.start_soon(node.relay.run)


def _autonat(node: Node) -> None:
    """Find out whether others can connect here, if it listens; if it serves, tell others the same."""
    from omnistore.net.autonat import Autonat, DialBackServer

    def changed(found: Reachability) -> None:
        before = list(node.network.confirmed)
        node.network.confirmed[:] = found.addrs if found.state == "public" else ()
        if node.network.confirmed != before:
            _moved(node)
        node.options.on_event(Reached(found))

    async def ask() -> None:
        if node.mapper is not None:
            # Votes on where nothing is forwarded yet would be void, and nobody is to be asked twice.
            with trio.move_on_after(ROUTER_PATIENCE):
                await node.mapper.answered.wait()
        await autonat.run()

    if node.options.server:
        node.dialbacks = DialBackServer(node.network)
        node.dialbacks.install()
    if node.options.listen:
        punched = node.punching.punched if node.punching is not None else set[str]()
        node.autonat = autonat = Autonat(node.network, changed, punched.__contains__)
        node.nursery.start_soon(ask)


def _map_port(node: Node) -> None:
    """Have the router forward a port, if it listens and was told to."""
    from omnistore.net.upnp import PortMapper

    def changed() -> None:
        text, _ = mapper.described()
        node.options.on_event(PortMapped(mapper.address, mapper.why, text))

    if node.options.listen and node.options.map_port:
        node.mapper = mapper = PortMapper(node.network, changed, partial(_moved, node))
        node.nursery.start_soon(mapper.run)


def _punch(node: Node) -> None:
    """Have direct connections where there are relayed ones."""
    from omnistore.net.dcutr import HolePunching

    def direct(peer: str, how: str) -> None:
        node.options.on_event(Direct(peer, how))

    node.punching = HolePunching(node.network, direct)
    node.nursery.start_soon(node.punching.run)


async def _serve_bitswap(node: Node) -> None:
    await serve_bitswap(node.meter, node.store, node.upload, events=node.options.on_event)


async def _serve(node: Node, limits: ServeLimits, task_status: Any) -> None:
    await serve_transfer(
        node.meter,
        node.store,
        events=node.options.on_event,
        limits=limits,
        pacer=node.upload,
        task_status=task_status,
    )

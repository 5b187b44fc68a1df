"""`Node`: the composition root, where store, network, DHT and transfer meet.

`open_node` starts what a node is made of and stops it in reverse, however the block ends. A seed
(`NodeOptions.server`) keeps DHT records for others, announces what its store holds, notices what
other processes add to the same home, and stays connected to its bootstrap peers. A client does
none of that, and is ready when one bootstrap peer answered. Decides nothing itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import trio

from omnistore.cid import CID
from omnistore.config import Config, load_key
from omnistore.dht.names import NAMESPACE, NameRules
from omnistore.dht.service import DHTService
from omnistore.errors import BadConfig, PeerUnreachable
from omnistore.keys import PrivateKey
from omnistore.membership import membership
from omnistore.naming import NameBook, Publication, Published
from omnistore.net.addresses import parse_dialable_untrusted
from omnistore.net.metering import MeteredNetwork
from omnistore.store.files import FileStore
from omnistore.transfer.pacing import Pacer
from omnistore.transfer.rate import TokenBucket
from omnistore.transfer.server import ServeEvent, serve_transfer

if TYPE_CHECKING:  # importing libp2p takes half a second: only where a node starts
    from omnistore.net.kademlia import KademliaNode
    from omnistore.net.libp2p import Libp2pNetwork

logger = logging.getLogger(__name__)

SERVICES: Final = "omni.services"
"""Entry point group of what other packages run inside a node, such as `compute`."""
WATCH_EVERY: Final = 1.0
"""Seconds between looks at the index for what other processes did; a look takes microseconds."""
LOOK_EVERY: Final = 5.0
"""Seconds between looks whether a bootstrap peer is still connected."""
REJOIN_FIRST: Final = 1.0
REJOIN_MOST: Final = 60.0
"""Seconds between two tries to reach a bootstrap peer: doubling from the first to the most."""


@dataclass(frozen=True, slots=True)
class Announced:
    """A CID was announced in the DHT."""

    cid: CID
    copies: int
    """Peers confirmed to have the record."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A bootstrap peer was reached, or could not be."""

    addr: str
    error: PeerUnreachable | None = None


NodeEvent: TypeAlias = Announced | Joined | Published | ServeEvent


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
    alone_ok: bool = False
    """For a client: go on when no bootstrap peer answers."""
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
    download: TokenBucket | None = None
    """The cap on blocks fetched, for every `FetchOptions.download` of this node."""
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
    when no bootstrap peer answers.
    """
    from omnistore.net.kademlia import open_kademlia
    from omnistore.net.libp2p import NetworkOptions, open_network

    for addr in options.bootstrap:
        parse_dialable_untrusted(addr)
    key = load_key(config.home)
    swarm = membership(config.home)
    network_options = NetworkOptions(announce=tuple(options.announce), psk=swarm.psk if swarm else None)
    store = await trio.to_thread.run_sync(FileStore, config)
    try:
        async with (
            open_network(key, options.listen, network_options) as network,
            open_kademlia(network, server=options.server, namespaces={NAMESPACE: NameRules()}) as kademlia,
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
            )
            if config.down_limit is not None:
                node.download = TokenBucket(config.down_limit, trio.current_time())
            await nursery.start(_serve, node)
            if options.server:
                nursery.start_soon(routing.run)
                nursery.start_soon(node.watch)
                publication = Publication(routing, NameBook(config.home), key, options.on_event)
                kademlia.on_peer(publication.hurry)
                nursery.start_soon(publication.run)
            await _join_all(node, kademlia)
            yield node
            nursery.cancel_scope.cancel()
    finally:
        store.close()


async def _serve(node: Node, task_status: Any) -> None:
    await serve_transfer(
        node.meter,
        node.store,
        events=node.options.on_event,
        pacer=node.upload,
        task_status=task_status,
    )


async def _join(node: Node, kademlia: KademliaNode, addr: str) -> None:
    """Connect to a bootstrap peer and learn what it is."""
    peer = await node.network.connect(addr)
    if not await kademlia.meet(peer):
        raise PeerUnreachable(
            f"{addr} answers, but keeps no DHT records",
            remedy="Bootstrap through a node that runs `omni seed`.",
        )


async def _stay_joined(node: Node, kademlia: KademliaNode, addr: str, tell: Callable[[Joined], None]) -> None:
    """Reach a bootstrap peer, and again whenever the connection is lost; tell how each try ended."""
    wait = REJOIN_FIRST
    peer = addr.rpartition("/")[2]
    if peer == node.peer_id:
        tell(Joined(addr, PeerUnreachable(f"{addr} is the node of this home itself")))
        return
    while True:
        if peer in node.network.peers():
            await trio.sleep(LOOK_EVERY)
            continue
        try:
            await _join(node, kademlia, addr)
        except PeerUnreachable as error:
            tell(Joined(addr, error))
            await trio.sleep(wait)
            wait = min(2 * wait, REJOIN_MOST)
        else:
            wait = REJOIN_FIRST
            tell(Joined(addr))
            if node.options.server:
                await kademlia.refresh()


async def _join_all(node: Node, kademlia: KademliaNode) -> None:
    """Join through every bootstrap peer. A client waits for one of them; raises when none answers."""
    addrs = set(node.options.bootstrap)
    send, receive = trio.open_memory_channel[Joined](math.inf)

    def tell(event: Joined) -> None:
        node.options.on_event(event)
        send.send_nowait(event)

    for addr in addrs:
        node.nursery.start_soon(_stay_joined, node, kademlia, addr, tell)
    failures: dict[str, PeerUnreachable] = {}
    while not node.options.server and len(failures) < len(addrs):
        event = await receive.receive()
        if event.error is None:
            return
        failures[event.addr] = event.error
    if failures and not node.options.alone_ok:
        raise PeerUnreachable(
            "no bootstrap peer answers: " + "; ".join(failure.message for failure in failures.values()),
            remedy="Check that it runs, and the address that `omni seed` printed there.",
        )

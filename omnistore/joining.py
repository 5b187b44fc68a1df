"""How a node gets into the DHT and stays there (spec/04-discovery §6-§7).

Through the bootstrap nodes it was told of, again whenever one is lost; through nodes that announce
themselves on the local network; through peers met before. Dials nobody else, and lets go again of
whoever turns out to be no node of this network.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from omnistore.errors import PeerUnreachable
from omnistore.net.acquaintances import recall, remember
from omnistore.net.interface import Provider

if TYPE_CHECKING:  # importing libp2p takes half a second: only where a node starts
    from omnistore.net.kademlia import KademliaNode
    from omnistore.net.libp2p import Libp2pNetwork

logger = logging.getLogger(__name__)

LOOK_EVERY: Final = 5.0
"""Seconds between looks whether a bootstrap peer is still connected."""
REJOIN_FIRST: Final = 1.0
REJOIN_MOST: Final = 60.0
"""Seconds between two tries to reach a peer: doubling from the first to the most."""
LAN_PATIENCE: Final = 5.0
"""Seconds that a command waits for somebody on the local network: an answer takes one or two."""
LAN_PEERS: Final = 32
"""Nodes of the local network that one stays connected to; the DHT knows the others."""
LAN_TRIES: Final = 6
"""Dials without success after which a node that announced itself is let go: two minutes."""
RECALLED: Final = 16
"""Peers met before that are tried at the start, each once."""
REMEMBER_EVERY: Final = 60.0
"""Seconds between two notes of who is connected."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A peer to join through was reached, or could not be."""

    addr: str
    error: PeerUnreachable | None = None


@dataclass(frozen=True, slots=True)
class Ways:
    """Through whom to join."""

    bootstrap: Sequence[str] = ()
    """Multiaddrs ending in `/p2p/…`."""
    lan: bool = False
    """Whether to look on the local network."""
    listening: Sequence[str] | None = None
    """Where we listen, if we are to be found on the local network too."""
    home: Path | None = None
    """Where the peers met are noted down."""
    recall: bool = False
    """Whether those noted before are tried too."""


@dataclass(slots=True, eq=False)
class Joining:
    """The tasks that join and stay joined. Made by `open_joining`."""

    network: Libp2pNetwork
    kademlia: KademliaNode
    server: bool
    tell: Callable[[Joined], None]
    """Called with how each try at a bootstrap peer ended, and with each other peer reached."""
    nursery: trio.Nursery
    _near: dict[str, Provider] = field(default_factory=dict)
    """Nodes of the local network being looked after, each as it last announced itself."""
    _events: tuple[trio.MemorySendChannel[Joined], trio.MemoryReceiveChannel[Joined]] = field(
        default_factory=lambda: trio.open_memory_channel[Joined](math.inf)
    )

    async def first(self, ways: Ways, *, alone_ok: bool) -> None:
        """Wait until one peer is reached. Raises `PeerUnreachable` when none can be, unless `alone_ok`."""
        failures: dict[str, PeerUnreachable] = {}
        patience = LAN_PATIENCE if ways.lan or ways.recall else 0.0
        with trio.move_on_after(math.inf if ways.bootstrap else patience):
            while not ways.bootstrap or len(failures) < len(set(ways.bootstrap)):
                event = await self._events[1].receive()
                if event.error is None:
                    return
                failures[event.addr] = event.error
        if alone_ok:
            return
        if failures:
            raise PeerUnreachable(
                "no bootstrap peer answers: " + "; ".join(failure.message for failure in failures.values()),
                remedy="Check that it runs, and the address that `omni seed` printed there.",
            )
        raise PeerUnreachable(
            "no node answers on the local network" if ways.lan else "no node that was met before answers",
            remedy="Run `omni seed` on a machine of this network, or name one with --peer or --bootstrap.",
        )

    def report(self, event: Joined) -> None:
        """A try ended."""
        self.tell(event)
        self._events[0].send_nowait(event)

    async def stay_joined(self, addr: str) -> None:
        """Reach a bootstrap peer, and again whenever the connection is lost; tell how each try ended."""
        wait = REJOIN_FIRST
        where, _, peer = addr.rpartition("/p2p/")
        if peer == self.network.peer_id:
            self.report(Joined(addr, PeerUnreachable(f"{addr} is the node of this home itself")))
            return
        while True:
            if peer in self.network.peers():
                await trio.sleep(LOOK_EVERY)
                continue
            try:
                await self._join(Provider(peer, (where,)))
            except PeerUnreachable as error:
                self.report(Joined(addr, error))
                await trio.sleep(wait)
                wait = min(2 * wait, REJOIN_MOST)
            else:
                wait = REJOIN_FIRST
                self.report(Joined(addr))
                await self._refresh()

    async def watch_lan(self, listening: Sequence[str] | None) -> None:
        """Join through whoever announces itself on the local network, and announce ourselves if we listen."""
        from omnistore.net.mdns import open_mdns

        async with open_mdns(self.network.peer_id, self.network.addrs, listening) as lan:
            async for found in lan.found:
                if found.peer in self._near:
                    self._near[found.peer] = found
                elif len(self._near) < LAN_PEERS:
                    self._near[found.peer] = found
                    self.nursery.start_soon(self._stay_near, found.peer)

    async def _stay_near(self, peer: str) -> None:
        """Stay connected to a node of the local network, until it is gone."""
        try:
            wait, failures = REJOIN_FIRST, 0
            while failures < LAN_TRIES:
                if peer in self.network.peers():
                    await trio.sleep(LOOK_EVERY)
                    continue
                try:
                    addr = await self._join(self._near[peer])
                except PeerUnreachable as error:
                    logger.info("%s on the local network: %s", peer, error)
                    await self.network.disconnect(peer)
                    failures += 1
                    await trio.sleep(wait)
                    wait = min(2 * wait, REJOIN_MOST)
                else:
                    wait, failures = REJOIN_FIRST, 0
                    self.report(Joined(addr))
                    await self._refresh()
        finally:
            del self._near[peer]

    async def reach_again(self, home: Path) -> None:
        """Try peers met before, each once, last met first."""
        known = await trio.to_thread.run_sync(recall, home, time.time())
        async with trio.open_nursery() as nursery:
            for one in known[:RECALLED]:
                if one.peer != self.network.peer_id:
                    nursery.start_soon(self._reach_once, Provider(one.peer, one.addrs))

    async def _reach_once(self, known: Provider) -> None:
        if known.peer in self.network.peers():
            return
        try:
            addr = await self._join(known)
        except PeerUnreachable as error:
            logger.debug("%s, met before: %s", known.peer, error)
            return
        self.report(Joined(addr))
        await self._refresh()

    async def keep_note(self, home: Path) -> None:
        """Write down who is connected, now and then and at the end."""
        try:
            while True:
                await trio.sleep(REMEMBER_EVERY)
                await trio.to_thread.run_sync(remember, home, self.kademlia.servers(), time.time())
        finally:
            if met := self.kademlia.servers():
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(remember, home, met, time.time())

    async def _join(self, peer: Provider) -> str:
        """Connect to a peer and learn what it is; its address."""
        await self.network.reach(peer)
        addr = f"{peer.addrs[0]}/p2p/{peer.peer}"
        if not await self.kademlia.meet(peer.peer):
            raise PeerUnreachable(
                f"{addr} answers, but keeps no DHT records",
                remedy="Bootstrap through a node that runs `omni seed`.",
            )
        return addr

    async def _refresh(self) -> None:
        if self.server:
            await self.kademlia.refresh()


@asynccontextmanager
async def open_joining(
    kademlia: KademliaNode, ways: Ways, *, server: bool, tell: Callable[[Joined], None]
) -> AsyncIterator[Joining]:
    """Join, and stay joined until the block ends."""
    async with trio.open_nursery() as nursery:
        joining = Joining(kademlia.network, kademlia, server, tell, nursery)
        for addr in set(ways.bootstrap):
            nursery.start_soon(joining.stay_joined, addr)
        if ways.lan:
            nursery.start_soon(joining.watch_lan, ways.listening)
        if ways.home is not None:
            if ways.recall:
                nursery.start_soon(joining.reach_again, ways.home)
            nursery.start_soon(joining.keep_note, ways.home)
        yield joining
        nursery.cancel_scope.cancel()

"""Being reached through relays without being told which: the shell around `relay_choice` (spec/04 §9).

Only peers that are connected already are asked, and only those that say in identify that they relay:
nobody is dialled for it. A relay's word about us is not needed: `autonat` decides whether we need one.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import trio
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError

from omnistore.errors import BadConfig
from omnistore.net.addresses import parse_any_untrusted
from omnistore.net.circuit_transport import Circuits
from omnistore.net.kad_protocol import protocols
from omnistore.net.reachability import State, scope
from omnistore.net.relay import HOP
from omnistore.net.relay_choice import RelayChoice

logger = logging.getLogger(__name__)

LOOK_EVERY: Final = 2.0
"""Seconds between looks whether a relay is needed, and known."""
TRIES: Final = 3
"""Reservations that fail one after another before a relay is given up."""


@dataclass(slots=True, eq=False)
class RelayUse:
    """Keeps reservations at relays while they are needed. `run` it beside the network."""

    circuits: Circuits
    state: Callable[[], State]
    """What others found about us."""
    rng: random.Random = field(default_factory=random.SystemRandom)
    choice: RelayChoice = field(default_factory=RelayChoice)
    _held: dict[str, trio.CancelScope] = field(default_factory=dict)

    async def run(self) -> None:
        """Take relays and drop them, for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                known = self._known()
                change = self.choice.change(self.state(), self._held, list(known), trio.current_time())
                for relay in change.drop:
                    logger.info("no longer reached through the relay %s", relay)
                    self._held[relay].cancel()
                for relay in change.take:
                    self._held[relay] = trio.CancelScope()
                    nursery.start_soon(self._keep, relay, known[relay])
                await trio.sleep(LOOK_EVERY)

    async def _keep(self, relay: str, addr: str) -> None:
        with self._held[relay] as scope:
            await self.circuits.keep_reserved(f"{addr}/p2p/{relay}", tries=TRIES)
        if not scope.cancelled_caught:
            self.choice.failed(relay, trio.current_time())
        self.circuits.release(relay)
        del self._held[relay]

    def _known(self) -> dict[str, str]:
        """Connected peers that relay, and where others reach them; in random order."""
        network = self.circuits.network
        found = {}
        for peer in sorted(network.peers()):
            peer_id = ID.from_base58(peer)
            if HOP not in protocols(network.host, peer_id):
                continue
            at = {host for host, _ in network.remote_addresses(peer)}
            try:
                addrs = map(str, network.host.get_peerstore().addrs(peer_id))
            except PeerStoreError:
                continue
            best = _best_untrusted(addrs, at)
            if at and best is not None:
                found[peer] = best
        peers = list(found)
        self.rng.shuffle(peers)
        return {peer: found[peer] for peer in peers}


def _best_untrusted(addrs: Iterable[str], at: set[str]) -> str | None:
    """Where others reach a peer that is connected from the IP addresses `at`; None if nothing fits.

    At one of them, or, where we see it from within, at a public one.
    """
    ranked = []
    for text in addrs:
        try:
            address = parse_any_untrusted(text)
        except BadConfig:
            continue
        if address.relay is None and address.port and address.kind in ("ip4", "ip6"):
            public = scope(address.host) == "public"
            if address.host in at or public:
                ranked.append((public, address.host in at, address.transport))
    return max(ranked)[2] if ranked else None

"""Dialling, in place of py-libp2p 0.8.1's `Swarm.dial_peer`, which

- waits 250 ms after every dial, successful or not (`_HAPPY_EYEBALLS_DELAY`);
- tries a single TCP address of a peer, however many it has;
- refuses a peer for 60 s after one failure, also when told a new address meanwhile;
- never tries loopback addresses when others are known, and has no deadline of its own.

Its auto-connector dials every peer whose address it has heard, towards half its upper bound, also
with a lower bound of zero: it is switched off (`install`).

Here: every address, staggered, the first that answers as the right peer wins, one deadline for all.
Reaches into `Swarm._dial_addr_single_attempt` and replaces two methods.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import trio
from libp2p.network.exceptions import SwarmException
from libp2p.peer.peerstore import PeerStoreError

from omnistore.errors import BadConfig
from omnistore.net.addresses import Address, parse_any_untrusted

logger = logging.getLogger(__name__)

STAGGER: Final = 0.1
"""Seconds before the next address is tried beside one that has not answered."""
HEAD_START: Final = 0.5
"""Seconds that direct addresses have before relays are asked beside them; less when all have failed."""
MAX_CIRCUITS: Final = 4
"""Addresses through relays that are tried of one peer."""
MAX_ADDRESSES: Final = 16
"""Addresses of one peer that are tried; a record may list any number."""


def install(swarm: Any, deadline: float) -> Dialer:
    """Dial our way, and only when asked."""

    async def nobody() -> None:
        """In place of the auto-connector's look for somebody to dial."""

    dialer = Dialer(swarm, deadline)
    swarm.dial_peer = dialer.dial_peer
    swarm.auto_connector.maybe_connect = nobody
    return dialer


@dataclass(slots=True)
class Dialer:
    """Connects to peers by the addresses in the peer store."""

    swarm: Any
    deadline: float
    """Seconds for one peer, all its addresses together."""
    circuit: Callable[[Address, Any], Awaitable[Any]] | None = None
    """Dials an address through a relay, where that is possible at all."""
    _under_way: dict[Any, trio.Event] = field(default_factory=dict)

    async def dial_peer(self, peer_id: Any) -> list[Any]:
        """The open connections to a peer, dialling if there is none. Raises `SwarmException`."""
        if peer_id == self.swarm.self_id:
            raise SwarmException("a node does not dial itself")
        while True:
            open_ones = [conn for conn in self.swarm.get_connections(peer_id) if not conn.is_closed]
            if open_ones:
                return open_ones
            other = self._under_way.get(peer_id)
            if other is None:
                break
            await other.wait()
        done = self._under_way[peer_id] = trio.Event()
        try:
            return [await self._dial(peer_id)]
        finally:
            del self._under_way[peer_id]
            done.set()

    async def _dial(self, peer_id: Any) -> Any:
        addresses, circuits = self._addresses(peer_id)
        if not addresses and not circuits:
            raise SwarmException(f"no usable address of {peer_id} is known")
        won: list[Any] = []
        failures: list[str] = []

        async def attempt(addr: Any, failed: trio.Event) -> None:
            try:
                if isinstance(addr, Address):
                    assert self.circuit is not None
                    conn = await self.circuit(addr, peer_id)
                else:
                    conn = await self.swarm._dial_addr_single_attempt(addr, peer_id)
            except Exception as error:  # noqa: BLE001  # upstream raises anything; it is one address that failed
                failures.append(f"{addr}: {_reason(error)}")
                failed.set()
            else:
                won.append(conn)
                race.cancel()

        with trio.move_on_after(self.deadline) as race:
            async with trio.open_nursery() as nursery:
                for addr in (*addresses, *circuits):
                    if addr in circuits:
                        # A direct connection that takes a little longer is worth more.
                        with trio.move_on_after(HEAD_START):
                            while len(failures) < len(addresses):  # noqa: ASYNC110  # any of several tasks
                                await trio.sleep(0.01)
                    failed = trio.Event()
                    nursery.start_soon(attempt, addr, failed)
                    with trio.move_on_after(STAGGER):
                        await failed.wait()
        for late in won[1:]:
            await late.close()
        if won:
            return won[0]
        tried = "; ".join(failures) or ", ".join(str(addr) for addr in (*addresses, *circuits))
        when = f"answered within {self.deadline:g} s" if race.cancelled_caught else "answers"
        raise SwarmException(f"no address {when} ({tried})")

    def _addresses(self, peer_id: Any) -> tuple[Sequence[Any], Sequence[Address]]:
        """Those to dial, and those to dial through relays."""
        try:
            known = self.swarm.peerstore.addrs(peer_id)
        except PeerStoreError:
            return [], []
        usable = []
        circuits: list[Address] = []
        for addr in known:
            try:
                parsed = parse_any_untrusted(str(addr))
            except BadConfig:
                continue
            if parsed.relay is not None:
                if self.circuit is not None and parsed.port and parsed.relay != str(peer_id):
                    circuits.append(parsed)
            elif not parsed.is_wildcard and parsed.port:
                usable.append((parsed.is_loopback, addr))
        # Loopback last: on another machine it leads to whoever listens there.
        usable.sort(key=lambda entry: entry[0])
        return [addr for _, addr in usable[:MAX_ADDRESSES]], circuits[:MAX_CIRCUITS]


def _reason(error: BaseException) -> str:
    """The innermost cause: upstream wraps "connection refused" three times, and trio in a group."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            break
    code = error.errno if isinstance(error, OSError) else None
    if code is not None and code > 0:
        # trio's own text names the address once more.
        return os.strerror(code)
    return str(error) or type(error).__name__

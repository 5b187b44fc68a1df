"""Whom a node dials to tell them whether they can be dialled (pure; spec/04-discovery §10).

Only the IP address that the question came from is ever dialled, at ports that the asker named, and only
so often: nobody can point this node at a third party. Knows no messages and no sockets: `autonat` is
the shell.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from omnistore.net.reachability import plain_host, scope


@dataclass(frozen=True, slots=True)
class DialBackLimits:
    """What strangers may have us dial."""

    per_peer: int = 3
    """In a minute: one whose addresses change asks again."""
    per_host: int = 6
    """In a minute from one IP address, whatever peers are there: a household, not one machine's thousand."""
    in_all: int = 30
    """In a minute: one dial every two seconds costs nothing."""
    ports: int = 4
    """Of one question: TCP over IPv4 and IPv6 have mostly one and the same."""
    seconds: float = 6.0
    """For all of one question."""
    loopback: bool = False
    """Whether this machine itself is dialled. Never but in tests: behind a local proxy, strangers seem to be
    there."""


@dataclass(frozen=True, slots=True)
class Declined:
    """Nobody is dialled. `status` is a name of the protocol's ResponseStatus."""

    status: Literal["E_DIAL_REFUSED", "E_BAD_REQUEST"]
    why: str


@dataclass(slots=True)
class DialBacks:
    """All that one node was asked for lately."""

    limits: DialBackLimits = field(default_factory=DialBackLimits)
    outcomes: Counter[str] = field(default_factory=lambda: Counter(reached=0, failed=0, refused=0))
    """Questions by how they ended, since the start."""
    _lately: deque[tuple[float, str, str]] = field(default_factory=deque)
    """When, who, from which IP address: the last minute's, at most `in_all`."""

    def ask(self, peer: str, seen_at: str, addrs: Sequence[str], now: float) -> list[str] | Declined:
        """The multiaddrs to dial for a peer that is seen at the IP address `seen_at` and names `addrs`."""
        targets = self._targets(plain_host(seen_at), addrs)
        if isinstance(targets, Declined):
            return self._decline(targets)
        while self._lately and self._lately[0][0] <= now - 60:
            self._lately.popleft()
        of_peer = sum(other == peer for _, other, _ in self._lately)
        of_host = sum(host == plain_host(seen_at) for _, _, host in self._lately)
        limits = self.limits
        if len(self._lately) >= limits.in_all or of_peer >= limits.per_peer or of_host >= limits.per_host:
            return self._decline(Declined("E_DIAL_REFUSED", "too many questions: ask again in a minute"))
        self._lately.append((now, peer, plain_host(seen_at)))
        return targets

    def _targets(self, host: str, addrs: Sequence[str]) -> list[str] | Declined:
        kind = "ip6" if ":" in host else "ip4"
        if scope(host) == "loopback" and not self.limits.loopback:
            return Declined("E_DIAL_REFUSED", "seen at a loopback address, which is this machine's own")
        ports: dict[str, bool] = {}
        for addr in addrs:
            _, named_kind, named, _, port, *circuit = addr.split("/")
            if not circuit and named_kind in (kind, f"dns{kind[2]}", "dns"):
                ports[port] = ports.get(port, False) or named == host
        if scope(host) != "public":
            # Seen at a private address that is not its own, it is behind a proxy of ours: nothing is there.
            ports = {port: own for port, own in ports.items() if own}
        if not ports:
            return Declined("E_DIAL_REFUSED", f"no address fits {host}, where this node sees you")
        return [f"/{kind}/{host}/tcp/{port}" for port in list(ports)[: self.limits.ports]]

    def _decline(self, declined: Declined) -> Declined:
        self.outcomes["refused"] += 1
        return declined

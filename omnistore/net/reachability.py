"""Whether others can connect to this node, from what several of them say (pure; spec/04-discovery §10).

Each peer that was asked to dial us back has one vote, for an hour. Votes of one network (IPv4 /24, IPv6
/64) count once, however many peers it has, and nothing is believed that fewer than three networks agree
on. What the internet says overrides the local network: only where nobody outside was asked does the
local network's word count, and then for that network alone. Knows no messages and no sockets: `autonat`
is the shell.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, get_args

from omnistore.net.pauses import Pauses

NEEDED: Final = 3
"""Networks that must agree before anything is believed."""
WANTED: Final = 4
"""Votes collected while they agree: one may leave."""
MOST: Final = 12
"""Votes collected while they do not."""
VALID: Final = 3600.0
"""Seconds that a vote counts: port forwardings and addresses change."""
RENEW: Final = 2400.0
"""Seconds after which a peer may be asked again, so that votes overlap."""
AGAIN: Final = 300.0
"""Seconds after which a peer that gave no answer may be asked again."""

ASK_ROUTER: Final = 'let it ask the router to forward its port (port_mapping = "upnp" in config.toml)'
"""What a private node may be told to do first."""

Scope: TypeAlias = Literal["public", "private", "loopback"]
State: TypeAlias = Literal["public", "lan", "private", "unknown"]
STATES: Final[tuple[State, ...]] = get_args(State)


def plain_host(host: str) -> str:
    """An IP address as it is compared: without a zone, an IPv4 one in IPv6's clothes as IPv4.

    Raises `ValueError` for what is no IP address.
    """
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def scope(host: str) -> Scope:
    """From where an IP address can be reached: shared, link-local and reserved ones count as private.

    Raises `ValueError` for what is no IP address.
    """
    address = ipaddress.ip_address(plain_host(host))
    if address.is_loopback:
        return "loopback"
    return "public" if address.is_global and not address.is_multicast else "private"


def network_of(host: str) -> str:
    """What counts as one voice: the network that an IP address is in, on a LAN the machine."""
    address = ipaddress.ip_address(plain_host(host))
    if scope(host) != "public":
        return str(address)
    bits = 24 if address.version == 4 else 64
    return str(ipaddress.ip_network((address, bits), strict=False))


@dataclass(frozen=True, slots=True)
class Vote:
    """What one peer found when it dialled us."""

    host: str
    """The IP address where that peer is, as we see it."""
    reached: bool
    at: float
    """When, in the clock of `now`."""
    addr: str | None = None
    """The multiaddr at which it reached us."""

    @property
    def scope(self) -> Scope:
        """For whom it speaks: the internet only if that is where both ends are."""
        ends = {scope(self.host)}
        if self.addr is not None:
            ends.add(scope(self.addr.split("/")[2]))
        return "loopback" if "loopback" in ends else "private" if "private" in ends else "public"


@dataclass(frozen=True, slots=True)
class Reachability:
    """What is known."""

    state: State
    """`public`: from anywhere. `lan`: on the local network, others were not asked. `private`: not."""
    scope: Scope
    """Who was asked: the internet, or (`private`) the local network alone."""
    yes: int
    no: int
    """Networks whose peers could connect, and could not."""
    addrs: tuple[str, ...] = ()
    """Multiaddrs that at least `NEEDED` networks reached us at."""


@dataclass(slots=True)
class Votes:
    """The votes that count, and whom to ask next."""

    _votes: dict[str, Vote] = field(default_factory=dict)
    _asked: Pauses = field(default_factory=Pauses)

    def cast(self, peer: str, vote: Vote) -> None:
        """A peer answered; its earlier vote is void. What this machine says of itself is no vote."""
        if vote.scope == "loopback":
            return
        self._votes.pop(peer, None)
        self._votes[peer] = vote
        while len(self._votes) > MOST:
            del self._votes[next(iter(self._votes))]

    def asked(self, peer: str, now: float, *, answered: bool) -> None:
        """A peer was asked: not again for a while, longer if it answered."""
        self._asked.pause(peer, RENEW if answered else AGAIN, now)

    def clear(self) -> None:
        """Our addresses changed: everything is open again."""
        self._votes.clear()
        self._asked.clear()

    def to_ask(self, connected: Mapping[str, str], now: float) -> list[str]:
        """Who of `connected` (peer to IP address) to ask now, in its order; one of each network.

        Nobody while enough votes are fresh and agree.
        """
        free = {peer: host for peer, host in connected.items() if self._asked.may(peer, now)}
        outside = any(scope(host) == "public" for host in free.values())
        where: Scope = "public" if outside or self._scope(now) == "public" else "private"
        fresh = {
            network_of(vote.host)
            for vote in self._votes.values()
            if vote.at > now - RENEW and vote.scope == where
        }
        found = self.reachability(now)
        settled = found.state != "unknown" and found.scope == where
        missing = (WANTED if settled or len(fresh) < WANTED else MOST) - len(fresh)
        chosen: dict[str, str] = {}
        for peer, host in free.items():
            network = network_of(host)
            if scope(host) == where and network not in fresh and network not in chosen:
                chosen[network] = peer
        return list(chosen.values())[: max(0, missing)]

    def reachability(self, now: float) -> Reachability:
        """What may be believed."""
        where = self._scope(now)
        voices: dict[str, Vote] = {}
        for vote in self._valid(now):
            if vote.scope == where:
                voices[network_of(vote.host)] = vote
        yes = sum(vote.reached for vote in voices.values())
        no = len(voices) - yes
        state: State = "unknown"
        # One dissenter for every three: neither a liar nor a broken route decides.
        if yes >= NEEDED and yes >= 3 * no:
            state = "public" if where == "public" else "lan"
        elif no >= NEEDED and no >= 3 * yes:
            state = "private"
        return Reachability(state, where, yes, no, _agreed(voices.values()))

    def _valid(self, now: float) -> list[Vote]:
        """Oldest first, so that the newest of a network stands."""
        return sorted((vote for vote in self._votes.values() if vote.at > now - VALID), key=lambda v: v.at)

    def _scope(self, now: float) -> Scope:
        return "public" if any(vote.scope == "public" for vote in self._valid(now)) else "private"


def _agreed(votes: Iterable[Vote]) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for vote in votes:
        if vote.addr is not None:
            counts[vote.addr] = counts.get(vote.addr, 0) + 1
    return tuple(sorted(addr for addr, count in counts.items() if count >= NEEDED))


def described(found: Reachability, *, relays: int = 0, mapping: bool = False) -> tuple[str, str | None]:
    """What is known, for people, and what to do about it.

    `relays`: how many we are reached through. `mapping`: whether the router is asked to forward a port.
    """
    asked = found.yes + found.no
    if found.state == "public":
        where = f" at {', '.join(found.addrs)}" if found.addrs else ""
        return f"public: {found.yes} of {asked} networks could connect to this node{where}", None
    if found.state == "lan":
        return (
            f"reachable on this LAN: {found.yes} of {asked} of its machines could connect."
            " Whether others can, nobody outside was asked",
            None,
        )
    if found.state == "private":
        if found.scope == "private":
            return (
                f"private: {found.no} of {asked} machines of this LAN could not connect to this node",
                "Let the firewall of this machine accept the TCP port that `omni seed` listens on.",
            )
        text = f"private: {found.no} of {asked} networks could not connect to this node (NAT or a firewall)"
        if relays:
            text = f"{text}; it is reached through {relays} relay{'s' * (relays > 1)}"
            return text, None if mapping else f"To be reached directly, {ASK_ROUTER}."
        ask = "" if mapping else f"{ASK_ROUTER}, or "
        return (
            text,
            f"To be reached, {ask}forward the TCP port that `omni seed` listens on (4141) to this machine, or"
            " name a relay with --relay-via. Fetching needs nothing.",
        )
    if found.yes and found.no:
        return f"unknown: {found.yes} networks could connect to this node, {found.no} could not", None
    return f"unknown: {asked} of {NEEDED} answers that are needed", None

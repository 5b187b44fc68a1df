"""Having the router forward a port to this seed: when to ask for what (pure; spec/04-discovery §10).

    the router's word        what follows
    mapped                   the address is claimed; asked again at half of the lease
    taken                    another port, `PORTS` in a row; what was held is lost
    double NAT, refused      what was held is lost; asked again later, and later still
    no gateway, no answer    the same, but what was held is claimed to the end of its lease

A mapping is a claim, not a proof: whether anybody gets through is for `reachability` to find out. Knows
no sockets: `upnp` is the shell, `igd` speaks to the router.
"""

from __future__ import annotations

import ipaddress
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

from omnistore.net.reachability import scope

if TYPE_CHECKING:
    import random

LEASE: Final = 3600
"""Seconds asked for: what a seed that was killed leaves behind is gone after them."""
SHORTEST: Final = 120
"""Seconds; a router that gives less refuses."""
PORTS: Final = 4
"""Outside ports tried in a row."""
ANY_PORT: Final = (49152, 65535)
"""What others are drawn from when the port that we listen at is taken: those for private use (RFC 6335)."""
RETRY: Final = 60.0
"""Seconds to the second attempt; doubled with each."""
RETRY_MOST: Final = 1800.0
MAX_SAID: Final = 120
"""Characters kept of what a router says."""

Why: TypeAlias = Literal["no gateway", "no answer", "no listener", "double NAT", "refused", "taken"]
_PASSING: Final = ("no gateway", "no answer")
"""Says nothing about a mapping that stands."""
_REMEDIES: Final[Mapping[Why, str]] = {
    "no gateway": "Switch UPnP on in the router, or forward the port there by hand.",
    "no answer": "Restart the router, or forward the port there by hand.",
    "no listener": "Let `omni seed` listen at 0.0.0.0, or at its address in the router's network.",
    "double NAT": "Forward the port in both routers, ask the provider for a public address, or use a relay.",
    "refused": "Allow UPnP to this machine in the router, or forward the port there by hand.",
    "taken": "Free a port in the router, or forward one there by hand.",
}


@dataclass(frozen=True, slots=True)
class Map:
    """What to ask of the router."""

    port: int
    """Outside, TCP."""
    listening: Mapping[str, int]
    """Our IPv4 addresses, and the port listened at there."""
    lease: int = LEASE
    """Seconds."""


@dataclass(frozen=True, slots=True)
class Unmap:
    """What to take back from it."""

    ports: tuple[int, ...]
    listening: Mapping[str, int]
    """As it was asked with: what leads elsewhere is not ours."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """The router says that it forwards."""

    host: str
    """Its address outside, IPv4 and public."""
    port: int
    lan: str
    """Ours, to which it forwards."""
    lease: float
    """Seconds from when it was asked."""

    @property
    def addr(self) -> str:
        """As a multiaddr."""
        return f"/ip4/{self.host}/tcp/{self.port}"


@dataclass(frozen=True, slots=True)
class Failed:
    """It does not."""

    why: Why
    said: str
    """The particulars, for people."""


def answer_untrusted(data: bytes, asked: Map) -> Mapped | Failed:
    """What the router's answers, as `igd` wrote them down, amount to; never raises."""
    try:
        document: Any = json.loads(data)
        if "why" in document:
            why = document["why"]
            return Failed(why if why in get_args(Why) else "no answer", _said_untrusted(document["said"]))
        host = document["host"]
        if not host:
            return Failed("no gateway", "one does that has no address outside: it is not connected")
        host = str(ipaddress.IPv4Address(_said_untrusted(host)))
        if scope(host) != "public":
            return Failed("double NAT", f"its own address is {host}")
        if document["lan"] not in asked.listening:
            return Failed("no listener", f"it sees this machine at {_said_untrusted(document['lan'])}")
        lease = document["lease"]
        if isinstance(lease, bool) or not isinstance(lease, int):
            raise TypeError(lease)
    except (ValueError, TypeError, KeyError, RecursionError):
        return Failed("no answer", "nothing that makes sense")
    if 0 < lease < SHORTEST:
        return Failed("refused", f"it gives {lease} s")
    # 0 is for ever, or not told; a longer one than was asked for does no harm.
    granted = float(lease if 0 < lease < asked.lease else asked.lease)
    return Mapped(host, asked.port, document["lan"], granted)


def _said_untrusted(text: object) -> str:
    return "".join(char if char.isprintable() else "?" for char in str(text)[:MAX_SAID])


def question(asked: Map | Unmap) -> str:
    """For `igd`."""
    return json.dumps(asdict(asked))


@dataclass(slots=True)
class PortMapping:
    """One port's way to the outside."""

    rng: random.Random
    failed: Failed | None = None
    """Why the last attempt came to nothing, if it did."""
    _held: Mapped | None = None
    _until: float = -math.inf
    _next: float = -math.inf
    """When to ask."""
    _asked_at: float = 0.0
    _listening: Mapping[str, int] = field(default_factory=dict)
    _port: int | None = None
    """Outside, to be asked for; None: the one that we listen at."""
    _failures: int = 0
    _taken: int = 0
    _asked: int = 0
    """The port outside of the last question."""
    _unsure: set[int] = field(default_factory=set)
    """Ports asked for without an answer."""
    _granted: set[int] = field(default_factory=set)
    """Ports that the router said were ours, once."""

    def due(self, listening: Mapping[str, int], now: float) -> Map | None:
        """What to ask now, if anything. `listening`: our IPv4 addresses and the port at each.

        When they change the router is asked at once.
        """
        if listening != self._listening:
            self._listening, self._next, self._failures, self._taken = dict(listening), now, 0, 0
            if self._held is not None and self._held.lan not in listening:
                self._held = None
        if now < self._next:
            return None
        if not listening:
            self.answered(Failed("no listener", "this node listens at no IPv4 address"), now)
            return None
        port = self._port or next(iter(listening.values()))
        self._asked_at, self._asked, self._next = now, port, math.inf
        self._unsure.add(port)
        return Map(port, self._listening)

    def answered(self, answer: Mapped | Failed, now: float) -> None:
        """What came of the question."""
        if isinstance(answer, Mapped):
            self._held, self._until, self._port = answer, self._asked_at + answer.lease, answer.port
            self._granted.add(answer.port)
            self.failed, self._failures, self._taken = None, 0, 0
            self._next = self._asked_at + answer.lease / 2
            return
        self.failed = answer
        if answer.why != "no answer":
            self._unsure.discard(self._asked)
        if answer.why not in _PASSING:
            self._held = None
        if answer.why == "taken":
            self._taken += 1
            self._port = self.rng.randint(*ANY_PORT)
            if self._taken % PORTS:
                self._next = now
                return
            self._port = None
        self._next = now + min(RETRY * 2**self._failures, RETRY_MOST)
        self._failures = min(self._failures + 1, 16)

    def address(self, now: float) -> str | None:
        """The multiaddr that the router is said to forward to us."""
        return self._held.addr if self._held is not None and now < self._until else None

    def closing(self) -> Unmap | None:
        """What to take back at the end."""
        ports = self._granted | self._unsure
        return Unmap(tuple(sorted(ports)), self._listening) if ports else None

    def described(self, now: float) -> tuple[str, str | None]:
        """How it stands, for people, and what to do about it."""
        addr = self.address(now)
        if addr is not None:
            return f"the router forwards {addr} to this node", None
        if self.failed is None:
            return "the router is being asked", None
        why, said = self.failed.why, self.failed.said
        text = {
            "no gateway": "no router answers UPnP here",
            "no answer": "the router gives no answer",
            "no listener": "this node does not listen where the router could forward to",
            "double NAT": "the router is behind another one, or its provider's NAT",
            "refused": "the router refuses",
            "taken": "the router has given its ports to others",
        }[why]
        return f"{text} ({said})", _REMEDIES[why]

"""From a relayed connection to a direct one: who says what when (pure; relay/DCUtR; spec/04 §11).

Who was reached through the relay begins; it lets the other know when both are to dial:

    role      state       event            then
    begins    -           begin            send CONNECT, note the time            -> asked
              asked       CONNECT          send SYNC; dial after half the trip    -> dialling
              dialling    failed           send CONNECT, at most thrice           -> asked
              dialling    connected                                               -> done
    answers   -           CONNECT          send CONNECT                           -> asked
              asked       SYNC             dial at once                           -> dialling
              dialling    CONNECT          send CONNECT, at most thrice           -> asked
    both      any         anything else    the other breaks the protocol

Knows no messages and no sockets: `dcutr` is the shell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from omnistore.errors import RemoteProtocolError
from omnistore.net.pauses import Pauses
from omnistore.net.reachability import Scope, scope

ROUNDS: Final = 3
"""Tries on one stream: the time measured may be off once."""
TARGETS: Final = 4
"""Addresses dialled of one peer: IPv4 and IPv6, as it is seen and as it was told to be reached."""
LONGEST: Final = 5.0
"""Seconds of a round trip through the relay, beyond which nothing can be timed by it."""
PAUSE: Final = 60.0
"""Seconds after which the same peer may be tried again."""
AT_ONCE: Final = 8
"""Peers that this is done with at once: each means some dials."""

Kind: TypeAlias = Literal["CONNECT", "SYNC"]


@dataclass(frozen=True, slots=True)
class Send:
    """Say this to the peer, through the relay."""

    kind: Kind


@dataclass(frozen=True, slots=True)
class Dial:
    """Dial all of these at once."""

    addrs: tuple[str, ...]
    at: float
    """When, in the clock of `now`."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """There will be no direct connection."""

    why: str


Command: TypeAlias = Send | Dial | GiveUp


@dataclass(slots=True)
class Punch:
    """One end of one attempt."""

    begins: bool
    """Whether this end was reached through the relay, and so begins."""
    seen_at: Scope
    """Where the relay sees this node: addresses of another kind are not dialled."""
    _state: Literal["new", "asked", "dialling"] = "new"
    _rounds: int = 0
    _asked_at: float = 0.0
    _targets: tuple[str, ...] = ()

    def begin(self, now: float) -> list[Command]:
        """Begin, or begin again after a failure."""
        if self._rounds == ROUNDS:
            return [GiveUp(f"{ROUNDS} attempts failed")]
        self._state, self._asked_at = "asked", now
        self._rounds += 1
        return [Send("CONNECT")]

    def received_untrusted(self, kind: Kind | None, addrs: Iterable[str], now: float) -> list[Command]:
        """What to do about a message. Raises `RemoteProtocolError`."""
        if self.begins and kind == "CONNECT" and self._state == "asked":
            return self._told(tuple(addrs), now)
        if not self.begins and kind == "CONNECT" and self._state != "asked" and self._rounds < ROUNDS:
            self._state = "asked"
            self._rounds += 1
            self._targets = targets_untrusted(addrs, self.seen_at)
            return [Send("CONNECT")]
        if not self.begins and kind == "SYNC" and self._state == "asked":
            self._state = "dialling"
            return [Dial(self._targets, now)]
        raise RemoteProtocolError(f"{kind or 'an unknown message'} in the state {self._state}")

    def _told(self, addrs: tuple[str, ...], now: float) -> list[Command]:
        trip = now - self._asked_at
        targets = targets_untrusted(addrs, self.seen_at)
        if not targets:
            return [GiveUp("it names no address that could be dialled from here")]
        if trip > LONGEST:
            return [GiveUp(f"the relay takes {trip:.1f} s there and back")]
        self._state = "dialling"
        return [Send("SYNC"), Dial(targets, now + trip / 2)]


def targets_untrusted(addrs: Iterable[str], seen_at: Scope) -> tuple[str, ...]:
    """Those of a peer's addresses that are dialled: IP, not through relays, of the kind that we have too.

    So nobody has us dial into our own network who does not share it, nor more than `TARGETS`.
    """
    found: dict[str, None] = {}
    for addr in addrs:
        _, kind, host, _, port, *circuit = addr.split("/")
        if kind in ("ip4", "ip6") and not circuit and port != "0" and scope(host) == seen_at:
            found[addr] = None
        if len(found) == TARGETS:
            break
    return tuple(found)


@dataclass(slots=True)
class Throttle:
    """Who was tried lately."""

    _pauses: Pauses = field(default_factory=Pauses)

    def may(self, peer: str, now: float) -> bool:
        """Whether to try that peer now; if so, it counts as tried."""
        if not self._pauses.may(peer, now):
            return False
        self._pauses.pause(peer, PAUSE, now)
        return True

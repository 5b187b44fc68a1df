"""What a relay grants and to whom (pure; libp2p circuit relay v2, spec/04-discovery §9).

    event                       answer
    reserve(peer, host)         until when, or a refusal
    connect(source, target)     a circuit, or a refusal
    moved(circuit, count)       whether the circuit may go on
    closed(circuit)
    lost(peer)                  its reservation ends with its connection

Knows no messages and no sockets: `relay` is the shell.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What a relay gives away. A circuit costs two streams, and its bytes twice: in and out again."""

    reservations: int = 128
    """Peers that may be reached through us; each keeps a connection open."""
    reservations_per_host: int = 8
    """Of one IP address: a household behind one NAT, not one machine with a thousand identities."""
    reservation_seconds: float = 3600.0
    """Until a reservation must be renewed, so that one forgotten costs an hour at most."""
    circuits: int = 64
    """Open at once: at some 1 MiB in buffers each, 64 MiB."""
    circuits_per_peer: int = 8
    """Of one peer, at either end: one may not take them all."""
    circuit_bytes: int = 4 << 30
    """In both directions together: a small model whole. A fetch that needs more opens the next."""
    circuit_seconds: float = 7200.0
    """A circuit's longest life: what hangs is cut sometime."""
    opening_seconds: float = 10.0
    """For the target to say whether it takes a connection."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Not granted. `why` is a name of the protocol's Status."""

    why: Literal["RESERVATION_REFUSED", "RESOURCE_LIMIT_EXCEEDED", "PERMISSION_DENIED", "NO_RESERVATION"]


@dataclass(slots=True, eq=False)
class Circuit:
    """One connection between two others."""

    source: str
    target: str
    ends_at: float
    count: int = 0
    """Bytes so far, both directions together."""


Granted: TypeAlias = float
"""When a reservation ends, in the clock of `now`."""


@dataclass(slots=True)
class Relaying:
    """All that one relay has granted."""

    limits: RelayLimits = field(default_factory=RelayLimits)
    bytes_relayed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Refusals by reason, since the start."""
    _reservations: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Peer to its IP address and when its reservation ends."""
    _circuits: set[Circuit] = field(default_factory=set)

    @property
    def circuits(self) -> int:
        """Open now."""
        return len(self._circuits)

    def reservations(self, now: float) -> int:
        """Valid now."""
        return sum(end > now for _, end in self._reservations.values())

    def holders(self) -> list[str]:
        """Whoever has a reservation."""
        return list(self._reservations)

    def reserve(self, peer: str, host: str, now: float) -> Granted | Refused:
        """A peer wants to be reachable through us; a valid reservation is renewed."""
        for other in [other for other, (_, end) in self._reservations.items() if end <= now]:
            del self._reservations[other]
        of_host = sum(known == host for other, (known, _) in self._reservations.items() if other != peer)
        full = len(self._reservations) >= self.limits.reservations and peer not in self._reservations
        if full or of_host >= self.limits.reservations_per_host:
            return self._refuse("RESERVATION_REFUSED")
        end = now + self.limits.reservation_seconds
        self._reservations[peer] = (host, end)
        return end

    def lost(self, peer: str) -> None:
        """A peer's last connection to us is gone."""
        self._reservations.pop(peer, None)

    def connect(self, source: str, target: str, now: float) -> Circuit | Refused:
        """Begin a circuit from `source` to `target`."""
        if source == target:
            return self._refuse("PERMISSION_DENIED")
        if self._reservations.get(target, ("", now))[1] <= now:
            return self._refuse("NO_RESERVATION")
        ends = Counter(end for one in self._circuits for end in (one.source, one.target))
        most = self.limits.circuits_per_peer
        if self.circuits >= self.limits.circuits or ends[source] >= most or ends[target] >= most:
            return self._refuse("RESOURCE_LIMIT_EXCEEDED")
        circuit = Circuit(source, target, now + self.limits.circuit_seconds)
        self._circuits.add(circuit)
        return circuit

    def moved(self, circuit: Circuit, count: int) -> bool:
        """Bytes are about to be passed on; whether they may."""
        circuit.count += count
        if circuit.count > self.limits.circuit_bytes:
            return False
        self.bytes_relayed += count
        return True

    def closed(self, circuit: Circuit) -> None:
        """A circuit ended."""
        self._circuits.discard(circuit)

    def _refuse(
        self,
        why: Literal["RESERVATION_REFUSED", "RESOURCE_LIMIT_EXCEEDED", "PERMISSION_DENIED", "NO_RESERVATION"],
    ) -> Refused:
        self.refused[why] += 1
        return Refused(why)

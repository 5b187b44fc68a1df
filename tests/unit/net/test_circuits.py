"""What a relay grants, and when it stops."""

from __future__ import annotations

from omnistore.net.circuits import Circuit, Refused, Relaying, RelayLimits


def opened(relaying: Relaying, source: str, target: str, now: float = 0) -> Circuit:
    circuit = relaying.connect(source, target, now)
    assert isinstance(circuit, Circuit)
    return circuit


def test_a_reservation_ends_and_is_renewed() -> None:
    relaying = Relaying(RelayLimits(reservation_seconds=10))
    assert relaying.reserve("a", "1.1.1.1", 0) == 10
    assert relaying.reserve("a", "1.1.1.1", 5) == 15
    assert (relaying.reservations(14), relaying.reservations(15)) == (1, 0)
    opened(relaying, "b", "a", 14)
    assert relaying.connect("b", "a", 15) == Refused("NO_RESERVATION")


def test_reservations_are_bounded_in_all_and_by_address() -> None:
    relaying = Relaying(RelayLimits(reservations=3, reservations_per_host=2, reservation_seconds=10))
    assert relaying.reserve("a", "1.1.1.1", 0) == 10
    assert relaying.reserve("b", "1.1.1.1", 0) == 10
    assert relaying.reserve("c", "1.1.1.1", 0) == Refused("RESERVATION_REFUSED")
    assert relaying.reserve("d", "2.2.2.2", 0) == 10
    assert relaying.reserve("e", "3.3.3.3", 0) == Refused("RESERVATION_REFUSED")
    # Those there are may renew; those who went, and those whose time is over, make room.
    assert relaying.reserve("a", "1.1.1.1", 1) == 11
    relaying.lost("b")
    assert relaying.reserve("e", "3.3.3.3", 1) == 11
    assert relaying.reserve("f", "4.4.4.4", 10) == 20
    assert relaying.refused == {"RESERVATION_REFUSED": 2}


def test_circuits_are_bounded_in_all_and_by_peer() -> None:
    relaying = Relaying(RelayLimits(circuits=3, circuits_per_peer=2))
    for peer in "abc":
        relaying.reserve(peer, peer, 0)
    assert relaying.connect("a", "a", 0) == Refused("PERMISSION_DENIED")
    first = opened(relaying, "x", "a")
    opened(relaying, "x", "b")
    assert relaying.connect("x", "c", 0) == Refused("RESOURCE_LIMIT_EXCEEDED")
    opened(relaying, "y", "a")
    # a has two, and there are three.
    assert relaying.connect("z", "c", 0) == Refused("RESOURCE_LIMIT_EXCEEDED")
    relaying.closed(first)
    opened(relaying, "z", "a")


def test_a_circuit_carries_so_much() -> None:
    relaying = Relaying(RelayLimits(circuit_bytes=100, circuit_seconds=7))
    relaying.reserve("a", "", 0)
    circuit = opened(relaying, "b", "a", 3)
    assert circuit.ends_at == 10
    assert relaying.moved(circuit, 60)
    assert relaying.moved(circuit, 40)
    assert not relaying.moved(circuit, 1)
    assert relaying.bytes_relayed == 100

"""What a node says and believes on the local network; no packet is sent here."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnistore.keys import PrivateKey
from omnistore.net.mdns import MAX_ADDRS, encode_record, lan_addresses, parse_record_untrusted

PEER = PrivateKey(bytes(32)).public.peer_id
OTHER = PrivateKey(bytes(31) + b"1").public.peer_id
INTERFACES = ["127.0.0.1", "::1", "192.168.1.20", "fe80::1", "fd00::20", "10.0.0.5", "203.0.113.9", "8.8.8.8"]


def record(*entries: str) -> bytes:
    return b"".join(bytes((len(entry.encode()),)) + entry.encode() for entry in entries)


@pytest.mark.parametrize(
    ("listening", "expected"),
    [
        ([], ["192.168.1.20", "10.0.0.5", "203.0.113.9"]),
        (["/ip4/0.0.0.0/tcp/4141"], ["192.168.1.20", "10.0.0.5", "203.0.113.9"]),
        (["/ip4/127.0.0.1/tcp/4141"], []),
        (["/ip6/::1/tcp/4141"], []),
        (["/ip4/10.0.0.5/tcp/4141", "/ip4/127.0.0.1/tcp/4141"], ["10.0.0.5"]),
        (["/ip4/8.8.8.8/tcp/4141"], []),
    ],
    ids=["a command", "everywhere", "loopback", "loopback 6", "one of two", "a public address"],
)
def test_only_private_addresses_that_are_listened_at_are_used(
    listening: list[str], expected: list[str]
) -> None:
    # 203.0.113.0/24 is set aside for documentation: Python counts it as private.
    assert lan_addresses(listening, INTERFACES) == expected


def test_a_record_holds_the_addresses_of_the_local_network() -> None:
    addrs = [f"/ip{6 if ':' in host else 4}/{host}/tcp/4141" for host in INTERFACES]
    found = parse_record_untrusted(encode_record(PEER, [*addrs, "/dns4/example.org/tcp/1"]))
    assert found is not None
    assert found.peer == PEER
    assert found.addrs == (
        "/ip4/192.168.1.20/tcp/4141",
        "/ip6/fd00::20/tcp/4141",
        "/ip4/10.0.0.5/tcp/4141",
        "/ip4/203.0.113.9/tcp/4141",
    )
    assert parse_record_untrusted(encode_record(PEER, ["/ip4/127.0.0.1/tcp/4141"])) is None


@pytest.mark.parametrize(
    "entry",
    [
        f"dnsaddr=/ip4/127.0.0.1/tcp/80/p2p/{PEER}",
        f"dnsaddr=/ip4/8.8.8.8/tcp/80/p2p/{PEER}",
        f"dnsaddr=/ip4/0.0.0.0/tcp/80/p2p/{PEER}",
        f"dnsaddr=/ip4/224.0.0.251/tcp/80/p2p/{PEER}",
        f"dnsaddr=/ip6/fe80::1/tcp/80/p2p/{PEER}",
        f"dnsaddr=/dns4/localhost/tcp/80/p2p/{PEER}",
        f"dnsaddr=/ip4/10.0.0.1/udp/80/p2p/{PEER}",
        f"dnsaddr=/ip4/10.0.0.1/tcp/0/p2p/{PEER}",
        "dnsaddr=/ip4/10.0.0.1/tcp/80",
        "dnsaddr=/ip4/10.0.0.1/tcp/80/p2p/nonsense",
        "dnsaddr=",
        f"id={PEER}",
        "dnsaddr=/ip4/１０.0.0.1/tcp/80",
    ],
)
def test_records_that_would_send_us_elsewhere_are_ignored(entry: str) -> None:
    assert parse_record_untrusted(record(entry)) is None
    good = f"dnsaddr=/ip4/10.0.0.1/tcp/80/p2p/{PEER}"
    found = parse_record_untrusted(record(entry, good))
    assert found is not None
    assert (found.peer, found.addrs) == (PEER, ("/ip4/10.0.0.1/tcp/80",))


def test_a_record_is_about_one_peer_and_a_few_addresses() -> None:
    entries = [f"dnsaddr=/ip4/10.0.0.{n}/tcp/80/p2p/{PEER if n else OTHER}" for n in range(50)]
    found = parse_record_untrusted(record(*entries))
    assert found is not None
    assert (found.peer, found.addrs) == (OTHER, ("/ip4/10.0.0.0/tcp/80",))
    found = parse_record_untrusted(record(*entries[1:]))
    assert found is not None
    assert (found.peer, len(found.addrs)) == (PEER, MAX_ADDRS)


@given(st.binary(max_size=400))
def test_nonsense_is_no_node(data: bytes) -> None:
    assert parse_record_untrusted(data) is None
    assert parse_record_untrusted(b"\x63dnsaddr=" + data) is None

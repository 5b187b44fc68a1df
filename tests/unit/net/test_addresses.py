"""Multiaddrs: parsed, refused by name, expanded to what can be dialled."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnistore.errors import BadConfig
from omnistore.keys import PrivateKey
from omnistore.net.addresses import (
    Address,
    check_listenable,
    expand,
    interface_addresses,
    parse_any_untrusted,
    parse_dialable_untrusted,
    parse_untrusted,
)

PEER = PrivateKey(bytes(32)).public.peer_id


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/127.0.0.1/tcp/4141",
        f"/ip4/10.0.0.1/tcp/1/p2p/{PEER}",
        "/ip6/::1/tcp/65535",
        f"/dns4/seed.example.org/tcp/4141/p2p/{PEER}",
    ],
)
def test_addresses_round_trip(text: str) -> None:
    assert str(parse_untrusted(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "localhost:4141",
        "/ip4/127.0.0.1",
        "/ip4/127.0.0.1/udp/1",
        "/ip4/127.0.0.1/tcp/65536",
        "/ip4/127.0.0.1/tcp/-1",
        "/ip4/127.0.0.1/tcp/1x",
        "/ip4/127.0.0.1/tcp/٣",
        "/ip4/127.1/tcp/1",
        "/ip4/::1/tcp/1",
        "/ip6/127.0.0.1/tcp/1",
        "/dns//tcp/1",
        "/ip4/127.0.0.1/tcp/1/ws",
        "/ip4/127.0.0.1/tcp/1/p2p/",
        "/ip4/127.0.0.1/tcp/1/p2p/not-a-peer",
        "/unix/a/tcp/1",
        f"/ip4/127.0.0.1/tcp/1/ipfs/{PEER}",
        "/dns/" + "a" * 600 + "/tcp/1",
    ],
)
def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadConfig) as caught:
        parse_untrusted(text)
    assert repr(text)[:20] in str(caught.value)


@given(st.text(max_size=100))
def test_any_text_ends_in_an_address_or_the_one_error(text: str) -> None:
    try:
        parse_untrusted(text)
    except BadConfig:
        return


def test_dialling_needs_the_peer() -> None:
    address, peer = parse_dialable_untrusted(f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}")
    assert (peer, address.port) == (PEER, 1)
    with pytest.raises(BadConfig, match="which peer to expect"):
        parse_dialable_untrusted("/ip4/127.0.0.1/tcp/1")


def test_wildcards_expand_to_their_own_family_loopback_last() -> None:
    bound = [parse_untrusted("/ip6/::/tcp/2"), parse_untrusted("/ip4/0.0.0.0/tcp/1")]
    interfaces = ["127.0.0.1", "::1", "192.168.1.5", "fe80::1", "2001:db8::1", "192.168.1.5"]
    assert [str(address) for address in expand(bound, interfaces)] == [
        "/ip4/192.168.1.5/tcp/1",
        "/ip6/2001:db8::1/tcp/2",
        "/ip4/127.0.0.1/tcp/1",
        "/ip6/::1/tcp/2",
    ]
    assert expand([Address("ip4", "10.1.1.1", 7)], interfaces) == [Address("ip4", "10.1.1.1", 7)]


def test_this_machine_has_a_loopback_interface() -> None:
    assert "127.0.0.1" in interface_addresses()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_is_checked_although_its_holder_shares_it(host: str) -> None:
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(BadConfig, match=f"port {port} is in use"):
            check_listenable([Address("ip4", host, port)])
    check_listenable([Address("ip4", host, port)])


@pytest.mark.parametrize("text", ["/ip4/203.0.113.9/tcp/0", "/dns4/localhost/tcp/1"])
def test_addresses_of_other_machines_can_not_be_listened_on(text: str) -> None:
    with pytest.raises(BadConfig, match="can not listen"):
        check_listenable([parse_untrusted(text)])


RELAY = PrivateKey(bytes([1]) * 32).public.peer_id


def test_an_address_through_a_relay() -> None:
    text = f"/ip4/1.2.3.4/tcp/4141/p2p/{RELAY}/p2p-circuit/p2p/{PEER}"
    address = parse_any_untrusted(text)
    assert (address.relay, address.peer, str(address)) == (RELAY, PEER, text)
    assert address.transport == f"/ip4/1.2.3.4/tcp/4141/p2p/{RELAY}/p2p-circuit"
    assert parse_any_untrusted(address.transport).peer is None
    # It can be dialled, and nobody listens at it.
    assert parse_dialable_untrusted(text) == (address, PEER)
    with pytest.raises(BadConfig):
        parse_untrusted(text)


@pytest.mark.parametrize(
    "text",
    [
        f"/ip4/1.2.3.4/tcp/4141/p2p-circuit/p2p/{PEER}",
        f"/ip4/1.2.3.4/tcp/4141/p2p/{RELAY}/p2p-circuit/p2p/",
        f"/ip4/1.2.3.4/tcp/4141/p2p/{RELAY}/p2p-circuit/{PEER}",
        f"/ip4/1.2.3.4/tcp/4141/p2p/{RELAY}/p2p-circuit/p2p/{PEER}/p2p-circuit",
        f"/p2p/{RELAY}/p2p-circuit/p2p/{PEER}",
        "/p2p-circuit",
    ],
)
def test_what_is_no_address_through_a_relay(text: str) -> None:
    with pytest.raises(BadConfig):
        parse_any_untrusted(text)

"""Whom strangers can make us dial: nobody but themselves, and not often."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnistore.net.dialback import Declined, DialBackLimits, DialBacks
from omnistore.net.reachability import plain_host

OWN = ("/ip4/192.168.1.2/tcp/4141", "/ip6/fd00::1/tcp/4141", "/ip4/10.9.9.9/tcp/5000")


def test_only_where_the_question_comes_from_is_dialled() -> None:
    assert DialBacks().ask("a", "8.8.8.8", OWN, 0) == ["/ip4/8.8.8.8/tcp/4141", "/ip4/8.8.8.8/tcp/5000"]
    # A victim among the addresses is dialled at the asker's own.
    assert DialBacks().ask("a", "8.8.8.8", ["/ip4/9.9.9.9/tcp/80"], 0) == ["/ip4/8.8.8.8/tcp/80"]
    assert DialBacks().ask("a", "::ffff:8.8.8.8", OWN[:1], 0) == ["/ip4/8.8.8.8/tcp/4141"]
    assert DialBacks().ask("a", "2001:4860::1", OWN, 0) == ["/ip6/2001:4860::1/tcp/4141"]
    assert DialBacks().ask("a", "8.8.8.8", ["/dns4/example.org/tcp/9"], 0) == ["/ip4/8.8.8.8/tcp/9"]


@pytest.mark.parametrize("addrs", [[], ["/ip6/2001:4860::1/tcp/1"], ["/ip4/8.8.8.8/tcp/1/p2p/x/p2p-circuit"]])
def test_who_names_nothing_of_use_is_refused(addrs: list[str]) -> None:
    assert isinstance(DialBacks().ask("a", "8.8.8.8", addrs, 0), Declined)


def test_a_private_address_is_dialled_only_if_the_asker_has_it() -> None:
    asked = DialBacks()
    assert asked.ask("a", "192.168.1.2", OWN, 0) == ["/ip4/192.168.1.2/tcp/4141"]
    # Seen at our own proxy's address, a stranger may not look for ports there.
    assert isinstance(asked.ask("b", "172.17.0.1", OWN, 0), Declined)
    assert isinstance(asked.ask("c", "127.0.0.1", ["/ip4/127.0.0.1/tcp/22"], 0), Declined)
    assert isinstance(asked.ask("c", "::1", ["/ip6/::1/tcp/22"], 0), Declined)
    assert asked.outcomes["refused"] == 3


def test_thousands_of_addresses_are_four_dials() -> None:
    many = [f"/ip4/8.8.8.8/tcp/{port}" for port in range(1, 5000)]
    targets = DialBacks().ask("a", "8.8.8.8", many, 0)
    assert targets == many[: DialBackLimits().ports]


def test_three_a_minute_of_a_peer_six_of_an_address_thirty_in_all() -> None:
    asked = DialBacks()
    for _ in range(3):
        assert not isinstance(asked.ask("a", "8.8.8.8", OWN, 0), Declined)
    assert asked.ask("a", "8.8.8.8", OWN, 59) == Declined(
        "E_DIAL_REFUSED", "too many questions: ask again in a minute"
    )
    assert not isinstance(asked.ask("a", "8.8.8.8", OWN, 60), Declined)
    asked = DialBacks()
    granted = [asked.ask(f"peer {i}", "8.8.8.8", OWN, 0) for i in range(100)]
    assert sum(not isinstance(one, Declined) for one in granted) == 6
    granted = [asked.ask(f"peer {i}", f"8.8.{i}.1", OWN, 1) for i in range(100)]
    assert sum(not isinstance(one, Declined) for one in granted) == 30 - 6
    assert not isinstance(asked.ask("peer 99", "8.8.99.1", OWN, 61), Declined)


@given(
    st.ip_addresses().map(str),
    st.lists(st.builds("/ip{}/{}/tcp/{}".format, st.sampled_from("46"), st.ip_addresses(), st.integers(1))),
)
def test_no_address_named_by_a_stranger_is_ever_dialled(seen_at: str, addrs: list[str]) -> None:
    targets = DialBacks().ask("a", seen_at, addrs, 0)
    if not isinstance(targets, Declined):
        assert {target.split("/")[2] for target in targets} == {plain_host(seen_at)}
        assert {target.split("/")[4] for target in targets} <= {addr.split("/")[4] for addr in addrs}

"""What several peers say about us, and how much of it is believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnistore.net.reachability import (
    AGAIN,
    MOST,
    NEEDED,
    RENEW,
    VALID,
    WANTED,
    Reachability,
    Vote,
    Votes,
    described,
    network_of,
    plain_host,
    scope,
)

ADDR = "/ip4/5.5.5.5/tcp/4141"


def votes(*cast: tuple[str, bool], at: float = 0.0, addr: str | None = None) -> Votes:
    """One peer at each IP address, named after it."""
    made = Votes()
    for host, reached in cast:
        made.cast(f"peer {host}", Vote(host, reached, at, addr if reached else None))
    return made


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("8.8.8.8", "public"), ("10.1.2.3", "private"), ("100.64.0.1", "private"),
        ("169.254.1.1", "private"), ("127.0.0.2", "loopback"), ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"), ("::ffff:8.8.8.8", "public"), ("fe80::1%eth0", "private"),
        ("2001:4860::1", "public"), ("fd00::1", "private"), ("0.0.0.0", "private"),
        ("224.0.0.1", "private"), ("203.0.113.1", "private"),
    ],
)  # fmt: skip
def test_scopes(host: str, expected: str) -> None:
    assert scope(host) == expected


def test_one_network_is_one_voice() -> None:
    assert network_of("8.8.8.8") == network_of("8.8.8.9") != network_of("8.8.9.8")
    assert network_of("2001:4860::1") == network_of("2001:4860::2:1") != network_of("2001:4860:0:1::1")
    # On a LAN every machine is one.
    assert network_of("10.0.0.1") != network_of("10.0.0.2")
    assert plain_host("::ffff:1.2.3.4") == "1.2.3.4"


def test_three_networks_make_it_public_and_two_do_not() -> None:
    two = votes(("8.8.8.8", True), ("9.9.9.9", True))
    assert two.reachability(1) == Reachability("unknown", "public", 2, 0)
    three = votes(("8.8.8.8", True), ("9.9.9.9", True), ("11.1.1.1", True), addr=ADDR)
    assert three.reachability(1) == Reachability("public", "public", 3, 0, (ADDR,))
    assert votes(("8.8.8.8", False), ("9.9.9.9", False), ("11.1.1.1", False)).reachability(1).state == (
        "private"
    )


def test_many_peers_of_one_network_are_one_liar() -> None:
    told = votes(*((f"8.8.8.{i}", True) for i in range(10)))
    assert (told.reachability(1).state, told.reachability(1).yes) == ("unknown", 1)


@pytest.mark.parametrize("truth", [True, False])
def test_one_liar_flips_nothing(truth: bool) -> None:
    honest = votes(*((f"{i}.8.8.8", truth) for i in (8, 9, 11)))
    before = honest.reachability(1).state
    honest.cast("liar", Vote("12.1.1.1", not truth, 0))
    assert honest.reachability(1).state == before == ("public" if truth else "private")
    # Alone, it is not believed either; two against three leave it open.
    assert votes(("12.1.1.1", not truth)).reachability(1).state == "unknown"
    honest.cast("another", Vote("13.1.1.1", not truth, 0))
    assert honest.reachability(1).state == "unknown"
    # It may change its mind as often as it likes: its last word is its only one.
    for _ in range(100):
        honest.cast("liar", Vote("12.1.1.1", not truth, 0))
    assert honest.reachability(1).state == "unknown"


def test_an_address_counts_when_three_agree_on_it() -> None:
    told = votes(("8.8.8.8", True), ("9.9.9.9", True), ("11.1.1.1", True), addr=ADDR)
    told.cast("liar", Vote("12.1.1.1", True, 0, "/ip4/6.6.6.6/tcp/4141"))
    assert told.reachability(1).addrs == (ADDR,)


def test_a_lan_is_never_called_public() -> None:
    lan = votes(("10.0.0.1", True), ("10.0.0.2", True), ("10.0.0.3", True))
    assert (lan.reachability(1).state, lan.reachability(1).scope) == ("lan", "private")
    assert "LAN" in described(lan.reachability(1))[0]
    assert "public" not in described(lan.reachability(1))[0]
    # A peer on the internet that reached a private address speaks for no internet.
    odd = votes(*((f"{i}.8.8.8", True) for i in (8, 9, 11)), addr="/ip4/10.0.0.9/tcp/4141")
    assert odd.reachability(1).state == "lan"
    # One word from outside, and the LAN's no longer counts.
    lan.cast("outside", Vote("8.8.8.8", False, 0))
    assert lan.reachability(1) == Reachability("unknown", "public", 0, 1)


def test_this_machine_is_no_witness() -> None:
    assert votes(("127.0.0.1", True), ("::1", True)).reachability(1) == Reachability(
        "unknown", "private", 0, 0
    )
    claimed = votes(*((f"{i}.8.8.8", True) for i in (8, 9, 11)), addr="/ip4/127.0.0.1/tcp/4141")
    assert claimed.reachability(1).state == "unknown"


def test_votes_expire_and_are_renewed_before() -> None:
    told = votes(*((f"{i}.8.8.8", True) for i in (8, 9, 11, 12)))
    connected = {f"peer {i}.8.8.8": f"{i}.8.8.8" for i in (8, 9, 11, 12)}
    for peer in connected:
        told.asked(peer, 0, answered=True)
    assert told.to_ask(connected, RENEW - 1) == []
    assert sorted(told.to_ask(connected, RENEW + 1)) == sorted(connected)
    assert told.reachability(VALID - 1).state == "public"
    assert told.reachability(VALID + 1) == Reachability("unknown", "private", 0, 0)


def test_no_more_are_asked_than_needed() -> None:
    crowd = {f"peer {i}": f"8.{i}.1.1" for i in range(100)}
    empty = Votes()
    assert len(empty.to_ask(crowd, 0)) == WANTED
    # Those who gave no answer are let be for a while, others asked in their place.
    first = empty.to_ask(crowd, 0)
    for peer in first:
        empty.asked(peer, 0, answered=False)
    second = empty.to_ask(crowd, 1)
    assert len(second) == WANTED
    assert not set(first) & set(second)
    assert first[0] in empty.to_ask(crowd, AGAIN + 1)
    # Where they disagree, more are asked, but not all.
    divided = votes(*((f"8.{i}.1.1", i % 2 == 0) for i in range(WANTED)))
    assert len(divided.to_ask(crowd, 1)) == MOST - WANTED
    # One of each network.
    assert len(Votes().to_ask({f"peer {i}": f"8.8.8.{i}" for i in range(9)}, 0)) == 1


def test_whoever_is_outside_is_asked_although_the_lan_agrees() -> None:
    lan = votes(*((f"10.0.0.{i}", True) for i in range(1, 6)))
    assert lan.to_ask({"near": "10.0.0.9"}, 1) == []
    assert lan.to_ask({"near": "10.0.0.9", "far": "8.8.8.8", "here": "127.0.0.1"}, 1) == ["far"]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 60), st.sampled_from(["8.{}.1.1", "10.0.0.{}", "127.0.0.{}"]),
            st.booleans(), st.floats(0, 5000),
        ),
        max_size=80,
    )
)  # fmt: skip
def test_whatever_is_said_nothing_is_believed_without_three(
    said: list[tuple[int, str, bool, float]],
) -> None:
    told = Votes()
    for peer, host, reached, at in sorted(said, key=lambda one: one[3]):
        told.cast(str(peer), Vote(host.format(peer), reached, at))
        found = told.reachability(at)
        if found.state in ("public", "lan"):
            assert found.yes >= NEEDED
            assert (found.state == "public") == (found.scope == "public")
        if found.state == "private":
            assert found.no >= NEEDED
        assert found.yes + found.no <= MOST


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Reachability("public", "public", 4, 1, (ADDR,)), ["public", "4 of 5", "5.5.5.5"]),
        (Reachability("private", "public", 0, 3), ["private", "NAT"]),
        (Reachability("private", "private", 0, 3), ["private", "LAN"]),
        (Reachability("unknown", "public", 1, 0), ["unknown", "1 of 3"]),
        (Reachability("unknown", "public", 2, 2), ["unknown", "2 networks", "2 could not"]),
    ],
)
def test_what_people_read(found: Reachability, words: list[str]) -> None:
    text, remedy = described(found)
    assert all(word in text for word in words)
    assert (remedy is not None) == (found.state == "private")
    if found.state == "private" and found.scope == "public":
        assert remedy is not None
        assert "port_mapping" in remedy
        told, remedy = described(found, relays=1)
        assert told == f"{text}; it is reached through 1 relay"
        assert remedy is not None
        assert "port_mapping" in remedy
        # Who has the router asked already is told of what else there is.
        _, remedy = described(found, mapping=True)
        assert remedy is not None
        assert "port_mapping" not in remedy
        assert described(found, relays=1, mapping=True)[1] is None

"""Who says what when, so that both ends dial at one moment; and whom nobody can have us dial."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnistore.errors import RemoteProtocolError
from omnistore.net.holepunch import (
    LONGEST,
    PAUSE,
    ROUNDS,
    TARGETS,
    Command,
    Dial,
    GiveUp,
    Kind,
    Punch,
    Send,
    Throttle,
    targets_untrusted,
)

A, B = "/ip4/8.8.8.8/tcp/4141", "/ip4/9.9.9.9/tcp/4141"


def test_two_ends_dial_at_one_moment() -> None:
    """Back to back, over a relay that takes 0.1 s one way."""
    begins, answers = Punch(begins=True, seen_at="public"), Punch(begins=False, seen_at="public")
    now = 10.0
    for _ in range(ROUNDS):
        assert begins.begin(now) == [Send("CONNECT")]
        assert answers.received_untrusted("CONNECT", [B], now + 0.1) == [Send("CONNECT")]
        sync, dial = begins.received_untrusted("CONNECT", [A], now + 0.2)
        assert sync == Send("SYNC")
        (other,) = answers.received_untrusted("SYNC", [], now + 0.3)
        assert isinstance(dial, Dial)
        assert isinstance(other, Dial)
        assert dial.at == pytest.approx(other.at) == pytest.approx(now + 0.3)
        assert (dial.addrs, other.addrs) == ((A,), (B,))
        now += 10
    assert begins.begin(now) == [GiveUp("3 attempts failed")]
    with pytest.raises(RemoteProtocolError):
        answers.received_untrusted("CONNECT", [B], now)


@pytest.mark.parametrize(
    ("begins", "told"),
    [
        (True, ["SYNC"]), (True, [None]), (True, ["CONNECT", "CONNECT"]), (True, ["CONNECT", "SYNC"]),
        (False, ["SYNC"]), (False, [None]), (False, ["CONNECT", "CONNECT"]),
        (False, ["CONNECT", "SYNC", "SYNC"]),
    ],
)  # fmt: skip
def test_what_is_out_of_turn_ends_it(begins: bool, told: list[Kind | None]) -> None:
    punch = Punch(begins=begins, seen_at="public")
    if begins:
        punch.begin(0)
    for kind in told[:-1]:
        punch.received_untrusted(kind, [A], 0.1)
    with pytest.raises(RemoteProtocolError):
        punch.received_untrusted(told[-1], [A], 0.2)


def test_what_can_not_work_is_not_tried() -> None:
    punch = Punch(begins=True, seen_at="public")
    punch.begin(0)
    (given_up,) = punch.received_untrusted("CONNECT", ["/ip4/10.0.0.1/tcp/1"], 0.1)
    assert isinstance(given_up, GiveUp)
    punch = Punch(begins=True, seen_at="public")
    punch.begin(0)
    (given_up,) = punch.received_untrusted("CONNECT", [A], LONGEST + 1)
    assert isinstance(given_up, GiveUp)


def test_nobody_is_dialled_in_a_network_that_we_do_not_share() -> None:
    named = [A, "/ip4/10.0.0.1/tcp/22", "/ip4/127.0.0.1/tcp/22", "/dns4/example.org/tcp/1",
             f"{A}/p2p/x/p2p-circuit", "/ip6/2001:4860::1/tcp/9"]  # fmt: skip
    assert targets_untrusted(named, "public") == (A, "/ip6/2001:4860::1/tcp/9")
    assert targets_untrusted(named, "private") == ("/ip4/10.0.0.1/tcp/22",)
    assert len(targets_untrusted([f"/ip4/8.8.8.8/tcp/{port}" for port in range(1, 99)], "public")) == TARGETS


def test_one_peer_is_tried_now_and_then() -> None:
    throttle = Throttle()
    assert [throttle.may("a", now) for now in (0, 1, PAUSE - 1, PAUSE + 1)] == [True, False, False, True]
    assert throttle.may("b", 1)


KINDS = st.sampled_from(["CONNECT", "SYNC", None])


@given(st.booleans(), st.lists(st.tuples(KINDS, st.floats(0, 3), st.booleans()), max_size=20))
def test_whatever_comes_dials_stay_few(begins: bool, told: list[tuple[Kind | None, float, bool]]) -> None:
    punch, now = Punch(begins=begins, seen_at="public"), 0.0
    commands: list[Command] = punch.begin(now) if begins else []
    dials = 0
    for kind, later, failed in told:
        now += later
        try:
            commands = punch.received_untrusted(kind, [A, B], now)
        except RemoteProtocolError:
            break
        dials += sum(isinstance(command, Dial) for command in commands)
        assert all(command.at <= now + LONGEST / 2 for command in commands if isinstance(command, Dial))
        if begins and failed and any(isinstance(command, Dial) for command in commands):
            punch.begin(now)
    assert dials <= ROUNDS

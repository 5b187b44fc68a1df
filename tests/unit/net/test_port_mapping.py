"""When the router is asked for what, and what its answers amount to."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnistore.net.port_mapping import (
    ANY_PORT,
    LEASE,
    PORTS,
    RETRY,
    RETRY_MOST,
    Failed,
    Map,
    Mapped,
    PortMapping,
    Unmap,
    Why,
    answer_untrusted,
    question,
)

HOST = "11.5.0.1"
LAN = "192.168.5.2"
HERE = {LAN: 4141}
ASKED = Map(4141, HERE)
GOOD = {"host": HOST, "lan": LAN, "lease": LEASE}


def machine() -> PortMapping:
    return PortMapping(random.Random(7))


def asked(state: PortMapping, now: float) -> Map:
    found = state.due(HERE, now)
    assert found is not None
    return found


def mapped(state: PortMapping, now: float, lease: float = LEASE) -> str:
    port = asked(state, now).port
    state.answered(Mapped(HOST, port, LAN, lease), now + 2)
    addr = state.address(now + 2)
    assert addr == f"/ip4/{HOST}/tcp/{port}"
    return addr


def test_the_port_that_is_listened_at_is_asked_for_and_again_at_half_of_the_lease() -> None:
    state = machine()
    assert state.address(0) is None
    addr = mapped(state, 0)
    assert asked(machine(), 0) == ASKED
    assert state.due(HERE, LEASE / 2 - 1) is None
    assert asked(state, LEASE / 2) == ASKED
    # Nobody answers: it is claimed for as long as the router promised, from when it was asked.
    state.answered(Failed("no answer", ""), LEASE / 2 + 20)
    assert state.address(LEASE - 1) == addr
    assert state.address(LEASE) is None


@pytest.mark.parametrize("why", ["no gateway", "no answer", "double NAT", "refused"])
def test_what_fails_is_tried_again_later_and_later(why: Why) -> None:
    state, now, waits = machine(), 0.0, []
    for _ in range(8):
        asked(state, now)
        state.answered(Failed(why, "because"), now)
        text, remedy = state.described(now)
        assert "because" in text
        assert remedy
        wait = next(seconds for seconds in range(10_000) if state.due(HERE, now + seconds) is not None)
        state.answered(Failed(why, "because"), now)
        # That look was one more attempt.
        waits.append(wait)
        now += wait + RETRY_MOST
    assert waits[0] == RETRY
    assert waits == sorted(waits)
    assert waits[-1] == RETRY_MOST


@pytest.mark.parametrize(("why", "stands"), [
    ("no gateway", True), ("no answer", True), ("double NAT", False), ("refused", False), ("taken", False),
])  # fmt: skip
def test_a_router_that_says_no_ends_the_claim_and_silence_does_not(why: Why, stands: bool) -> None:
    state = machine()
    mapped(state, 0)
    asked(state, LEASE / 2)
    state.answered(Failed(why, ""), LEASE / 2)
    assert (state.address(LEASE / 2) is not None) == stands
    # Either way the router may still forward: it is told at the end.
    assert state.closing() == Unmap((4141,), HERE)


def test_another_port_where_ours_is_taken_and_a_pause_where_several_are() -> None:
    state = machine()
    ports = []
    for _ in range(PORTS):
        ports.append(asked(state, 0).port)
        state.answered(Failed("taken", "port 1"), 0)
    assert ports[0] == 4141
    assert all(ANY_PORT[0] <= port <= ANY_PORT[1] for port in ports[1:])
    assert state.due(HERE, RETRY - 1) is None
    assert state.closing() is None
    assert asked(state, RETRY).port == 4141
    state.answered(Failed("taken", "port 1"), RETRY)
    addr = mapped(state, RETRY)
    # It stays with the port that it got.
    assert mapped(state, RETRY + LEASE / 2) == addr
    assert state.closing() == Unmap((int(addr.rpartition("/")[2]),), HERE)


def test_new_addresses_of_ours_are_told_at_once() -> None:
    state = machine()
    mapped(state, 0)
    assert state.due(HERE, 10) is None
    moved = {"192.168.7.9": 4141}
    assert state.due(moved, 10) == Map(4141, moved)
    assert state.address(10) is None
    state.answered(Failed("no gateway", ""), 12)
    assert state.due(moved, 13) is None


def test_who_listens_nowhere_asks_nobody() -> None:
    state = machine()
    assert state.due({}, 0) is None
    assert state.failed is not None
    assert state.failed.why == "no listener"
    assert state.closing() is None
    assert state.due(HERE, 1) == ASKED


def test_what_was_asked_and_not_answered_is_taken_back() -> None:
    state = machine()
    asked(state, 0)
    assert state.closing() == Unmap((4141,), HERE)
    assert json.loads(question(Unmap((4141,), HERE))) == {"ports": [4141], "listening": HERE}
    assert json.loads(question(ASKED)) == {"port": 4141, "listening": HERE, "lease": LEASE}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"host": "192.168.1.7"}, "double NAT"),
        ({"host": "100.64.3.4"}, "double NAT"),
        ({"host": "0.0.0.0"}, "double NAT"),
        ({"host": "127.0.0.1"}, "double NAT"),
        ({"host": "239.1.2.3"}, "double NAT"),
        ({"host": "255.255.255.255"}, "double NAT"),
        ({"host": ""}, "no gateway"),
        ({"host": None}, "no gateway"),
        ({"host": "2001:db8::1"}, "no answer"),
        ({"host": "11.5.0.1/tcp/1"}, "no answer"),
        ({"host": 0xB050001}, "no answer"),
        ({"host": {}}, "no gateway"),
        ({"lan": "192.168.5.3"}, "no listener"),
        ({"lan": None}, "no listener"),
        ({"lan": []}, "no answer"),
        ({"lease": 30}, "refused"),
        ({"lease": "3600"}, "no answer"),
        ({"lease": True}, "no answer"),
        ({"lease": 1e9}, "no answer"),
        ({"why": "refused", "said": "\x1b[2J\n" + "x" * 1000}, "refused"),
        ({"why": "nonsense", "said": ""}, "no answer"),
        ({"why": ["x"], "said": ""}, "no answer"),
        ({"why": "refused"}, "no answer"),
    ],
)
def test_answers_that_are_no_mapping(change: dict[str, Any], why: Why) -> None:
    answer = answer_untrusted(json.dumps(GOOD | change).encode(), ASKED)
    assert isinstance(answer, Failed)
    assert answer.why == why
    assert answer.said.isprintable()
    assert len(answer.said) < 200


@pytest.mark.parametrize(
    ("said", "lease"), [(3599, 3599), (120, 120), (0, LEASE), (-5, LEASE), (10**30, LEASE), (86400, LEASE)]
)
def test_no_lease_is_longer_than_what_was_asked_for(said: int, lease: float) -> None:
    answer = answer_untrusted(json.dumps(GOOD | {"lease": said}).encode(), ASKED)
    assert answer == Mapped(HOST, 4141, LAN, lease)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.binary()
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(["host", "lan", "lease", "why", "said"]), JSON).map(
        lambda change: json.dumps(GOOD | change).encode()
    )
)
def test_any_answer_is_a_public_address_or_a_reason(data: bytes) -> None:
    answer = answer_untrusted(data, ASKED)
    if isinstance(answer, Mapped):
        assert (answer.host, answer.port) == (json.loads(data)["host"], 4141)
        assert 120 <= answer.lease <= LEASE
    else:
        assert answer.said.isprintable()


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["mapped", "no gateway", "no answer", "double NAT", "refused", "taken"]),
        st.floats(0, 4000),
        st.sampled_from([HERE, {LAN: 4142}, {"10.0.0.9": 4141}, {}]),
    ),
    max_size=30,
)


@given(STEPS, st.integers())
def test_whatever_the_router_says(steps: list[Any], seed: int) -> None:
    """Claimed is what it promised last, until then; asked is one thing at a time; all is taken back."""
    state, now, open_ports = PortMapping(random.Random(seed)), 0.0, set[int]()
    promised: tuple[str, float] | None = None
    for answer, wait, listening in steps:
        now += wait
        found = state.due(listening, now)
        # Nothing is forwarded to where we are no longer.
        promised = promised if LAN in listening else None
        if found is not None:
            assert found.listening == listening
            # One at a time, unless our addresses change meanwhile.
            assert state.due(listening, now + 10**6) is None
            if answer == "mapped" and LAN in listening:
                open_ports.add(found.port)
                state.answered(Mapped(HOST, found.port, LAN, 600.0), now)
                promised = f"/ip4/{HOST}/tcp/{found.port}", now + 600
            else:
                why: Why = "no listener" if answer == "mapped" else answer
                state.answered(Failed(why, ""), now)
                promised = promised if why in ("no gateway", "no answer") else None
        expected = promised[0] if promised is not None and now < promised[1] else None
        assert state.address(now) == expected
        assert state.described(now)[0]
    closing = state.closing()
    assert open_ports <= set(closing.ports if closing is not None else ())

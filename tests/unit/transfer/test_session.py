"""One decision at a time: what a session asks, gives up, refuses and reports."""

from __future__ import annotations

from itertools import product

import pytest

from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.errors import LocalProtocolError
from omnistore.transfer import events as e
from omnistore.transfer.demand import Wanted
from omnistore.transfer.life import TRANSITIONS, BlockState
from omnistore.transfer.session import Session
from omnistore.transfer.source import EARLY_MOST
from omnistore.transfer.window import FlowLimits, SessionLimits

MIB = 1 << 20
PART = CID.of_digest(DAG_CBOR, bytes(32))
OTHER = CID.of_digest(DAG_CBOR, b"\1" * 32)


def block(number: int, size: int = MIB) -> Wanted:
    return Wanted(CID.of_digest(RAW, number.to_bytes(32, "big")), size)


BLOCKS = tuple(block(n) for n in range(8))
ALL = e.WantsAdded(PART, BLOCKS, 0xFF)


def session(**limits: object) -> Session:
    # At 1 MiB a second and after a second, a gain of two makes a window of two blocks.
    return Session(lambda: 0.0, SessionLimits(**{"flow": FlowLimits(gain=2.0), **limits}))  # type: ignore[arg-type]


def joined(
    machine: Session, *peers: str, bitmap: bytes | None = b"\xff", now: float = 0.0
) -> list[e.Command]:
    """Have peers join that answer what they are asked about PART."""
    out: list[e.Command] = []
    for peer in peers:
        out += machine.step(e.PeerJoined(peer, 1000, 100), now)
        out += machine.step(e.HoldsReceived(peer, PART, bitmap), now)
    return out


def wants(commands: list[e.Command]) -> list[tuple[str, list[int]]]:
    return [
        (command.peer, [BLOCKS.index(block) for block in command.blocks])
        for command in commands
        if isinstance(command, e.SendWant)
    ]


def kinds(commands: list[e.Command]) -> list[type]:
    return [type(command) for command in commands]


def received(peer: str, number: int) -> e.BlockReceived:
    return e.BlockReceived(peer, BLOCKS[number].cid, BLOCKS[number].size)


def test_a_peer_is_asked_what_it_holds_then_for_blocks() -> None:
    machine = session()
    assert machine.step(ALL, 0) == []
    assert machine.step(e.PeerJoined("a", 1000, 100), 0) == [e.AskHave("a", (PART,))]
    assert wants(machine.step(e.HoldsReceived("a", PART, b"\xf0"), 0)) == [("a", [4, 5])]
    assert machine.outstanding == 2 * MIB


def test_what_a_peer_holds_is_asked_before_the_blocks_are_known() -> None:
    machine = session()
    machine.step(e.PeerJoined("a", 1000, 100), 0)
    assert machine.step(e.PartsNamed((PART, OTHER)), 0) == [e.AskHave("a", (PART, OTHER))]
    # Who comes later is asked too, and asked once.
    assert machine.step(e.PeerJoined("b", 1000, 1), 0) == [e.AskHave("b", (PART,))]
    assert machine.step(e.HoldsReceived("a", PART, b"\xf0"), 0) == []
    assert machine.step(e.PartsNamed((PART,)), 0) == []
    assert wants(machine.step(ALL, 1)) == [("a", [4, 5])]
    # One that had nothing to tell is asked again now: it may have the node by now.
    machine.step(e.HoldsReceived("a", OTHER, None), 1)
    late = e.WantsAdded(OTHER, (block(100),), 1)
    assert machine.step(late, 1.5) == [e.AskHave("a", (OTHER,))]


def test_a_bitmap_that_turns_out_not_to_fit_bans() -> None:
    machine = session()
    machine.step(e.PeerJoined("a", 1000, 100), 0)
    machine.step(e.PartsNamed((PART,)), 0)
    machine.step(e.HoldsReceived("a", PART, b"\xff\x01"), 0)
    assert kinds(machine.step(ALL, 1)) == [e.DropPeer]
    assert "a" in machine.banned


def test_bitmaps_told_early_are_bounded() -> None:
    machine = session()
    parts = tuple(CID.of_digest(DAG_CBOR, number.to_bytes(32, "big")) for number in range(1000))
    machine.step(e.PeerJoined("a", 1000, 100), 0)
    due, counts = machine.step(e.PartsNamed(parts), 0), []
    while due:
        (asked,) = due
        assert isinstance(asked, e.AskHave)
        counts.append(len(asked.parts))
        for part in asked.parts:
            assert machine.step(e.HoldsReceived("a", part, bytes(8192)), 0) == []
        due = machine.step(e.Tick(), 0)
    assert counts == [100, 100, EARLY_MOST - 200]


def test_nodes_are_asked_at_once() -> None:
    machine = session()
    node = Wanted(PART, 64 << 10, exact=False)
    machine.step(e.WantsAdded(None, (node,), 1), 0)
    assert machine.step(e.PeerJoined("a", 1000, 100), 0) == [e.SendWant("a", (node,))]
    assert machine.step(e.BlockReceived("a", PART, 500), 1) == [e.Verify("a", PART)]
    assert machine.step(e.BlockVerified(PART), 1) == [e.Done()]


def test_a_node_that_is_missing_is_asked_of_another() -> None:
    machine = session()
    node = Wanted(PART, 64 << 10, exact=False)
    machine.step(e.WantsAdded(None, (node,), 1), 0)
    machine.step(e.PeerJoined("a", 1000, 100), 0)
    machine.step(e.PeerJoined("b", 1000, 100), 0)
    assert machine.step(e.MissingReceived("a", (PART,)), 1) == [e.SendWant("b", (node,))]
    assert machine.step(e.MissingReceived("b", (PART,)), 1) == []


def test_blocks_are_spread_over_peers() -> None:
    machine = session()
    machine.step(ALL, 0)
    assert wants(joined(machine, "a", "b")) == [("a", [0, 1]), ("b", [2, 3])]


def test_a_refill_waits_until_it_is_worth_a_message() -> None:
    machine = session(flow=FlowLimits(least=8 * MIB))
    many = tuple(block(n, 64 << 10) for n in range(1000))
    machine.step(e.WantsAdded(PART, many, (1 << 1000) - 1), 0)
    machine.step(e.PeerJoined("a", 1000, 100), 0)
    machine.step(e.HoldsReceived("a", PART, b"\xff" * 125), 0)
    refills = []
    for number in range(64):
        commands = machine.step(e.BlockReceived("a", many[number].cid, 64 << 10), 0.01)
        refills += [len(command.blocks) for command in commands if isinstance(command, e.SendWant)]
    assert refills == [16, 16, 16, 16]


def test_wrong_bytes_ban_their_sender_and_the_block_is_asked_again() -> None:
    machine = session()
    machine.step(ALL, 0)
    joined(machine, "a", "b")
    assert machine.step(received("a", 0), 0.1) == [
        e.Verify("a", BLOCKS[0].cid),
        e.SendWant("a", (BLOCKS[4],)),
    ]
    commands = machine.step(e.BlockRefused("a", BLOCKS[0].cid), 0.1)
    assert isinstance(commands[0], e.DropPeer)
    assert (commands[0].peer, commands[0].banned) == ("a", True)
    assert list(machine.banned) == ["a"]
    assert machine.step(e.PeerJoined("a", 10, 10), 0.2) == [e.DropPeer("a", machine.banned["a"], True)]
    assert wants(machine.step(received("b", 2), 0.2)) == [("b", [0])]
    assert wants(machine.step(received("b", 3), 0.3)) == [("b", [1])]


def test_a_bitmap_that_does_not_fit_bans() -> None:
    for bitmap in (b"", b"\xff\xff", b"\xff\x00"):
        machine = session()
        machine.step(ALL, 0)
        joined(machine, "a", bitmap=bitmap)
        assert list(machine.banned) == ["a"]
    machine = session()
    machine.step(e.WantsAdded(PART, BLOCKS[:3], 7), 0)
    joined(machine, "a", bitmap=b"\x08")
    assert list(machine.banned) == ["a"]


def test_a_peer_that_knows_nothing_of_a_part_is_not_asked_for_it() -> None:
    machine = session()
    machine.step(ALL, 0)
    assert wants(joined(machine, "a", bitmap=None)) == []
    assert machine.unheld() == [PART]
    assert kinds(machine.step(e.Tick(), 0.9)) == []
    # It may be fetching the part itself: asked again after a while.
    assert machine.step(e.Tick(), 6) == [e.AskHave("a", (PART,))]


def test_the_rarest_blocks_go_first() -> None:
    machine = session(flow=FlowLimits(least=3 * MIB))
    machine.step(ALL, 0)
    machine.step(e.PeerJoined("c", 1, 100), 0)
    machine.step(e.HoldsReceived("c", PART, b"\x07"), 0)
    assert wants(joined(machine, "a", bitmap=b"\xff")) == [("a", [3, 4, 5])]


def test_urgent_parts_go_before_the_rarest() -> None:
    machine = session(flow=FlowLimits(least=MIB, gain=2.0))
    machine.step(ALL, 0)
    joined(machine, "a")
    awaited = (block(100), block(101))
    machine.step(e.WantsAdded(OTHER, awaited, 3, urgent=True), 1)
    machine.step(e.PeerJoined("b", 0, 100), 1)
    for peer in ("a", "b"):
        machine.step(e.HoldsReceived(peer, OTHER, b"\x03"), 1)
    asked = [c for c in machine.step(received("a", 0), 1.2) if isinstance(c, e.SendWant)]
    assert [(command.peer, command.blocks) for command in asked] == [("a", awaited)]


@pytest.mark.parametrize(("others", "asked"), [(b"\xff", [0, 1]), (b"\x00", [4, 5])])
def test_where_others_fetch_too_any_of_the_rarest_goes_first(others: bytes, asked: list[int]) -> None:
    machine = Session(lambda: 0.5, SessionLimits())
    machine.step(ALL, 0)
    machine.step(e.PeerJoined("b", 0, 100), 0)
    machine.step(e.HoldsReceived("b", PART, others), 0)
    assert wants(joined(machine, "a")) == [("a", asked)]


def test_a_claim_that_turned_out_wrong_is_not_believed_again() -> None:
    machine = session()
    machine.step(ALL, 0)
    joined(machine, "a")
    machine.step(e.MissingReceived("a", (BLOCKS[0].cid,)), 1)
    machine.step(e.MissingReceived("a", (BLOCKS[1].cid,)), 1)
    machine.step(e.HoldsReceived("a", PART, b"\xff"), 10)
    asked = {n for _, numbers in wants(machine.step(received("a", 2), 11)) for n in numbers}
    assert not asked & {0, 1}


def test_silence_drops_and_its_asks_go_to_others() -> None:
    machine = session()
    machine.step(ALL, 0)
    joined(machine, "a")
    joined(machine, "b", bitmap=b"\x00")
    machine.step(e.BytesReceived("a"), 10)
    assert kinds(machine.step(e.Tick(), 24)) == [e.AskHave, e.SendCancel]
    machine.step(e.HoldsReceived("b", PART, b"\x00"), 25)
    assert machine.step(e.Tick(), 25.5) == [e.DropPeer("a", "stalled: no byte for 15.5 s", False)]
    assert wants(machine.step(e.HoldsReceived("b", PART, b"\x01"), 26)) == [("b", [0])]
    assert machine.banned == {}


def test_a_silent_peer_shows_that_it_lives_by_answering_a_cancel() -> None:
    """A seeder with many requesters sends each nothing for long: it is asked to take one ask back."""
    machine = session()
    machine.step(ALL, 0)
    joined(machine, "busy")
    last = BLOCKS[1].cid
    cancel, missing = e.SendCancel("busy", (last,)), e.MissingReceived("busy", (last,))
    for now in range(2, 40, 2):
        assert machine.step(e.Tick(), now) == [cancel]
        assert machine.step(e.Tick(), now + 0.1) == []
        # Nobody else was asked, so the block is wanted again, and this peer may be asked for it.
        assert wants(machine.step(missing, now + 0.2)) == [("busy", [1])]
    assert machine.peers == ("busy",)


def test_a_block_that_comes_though_its_ask_was_taken_back_is_used() -> None:
    machine = session()
    machine.step(e.WantsAdded(PART, BLOCKS[:1], 1), 0)
    joined(machine, "busy", bitmap=b"\x01")
    assert machine.step(e.Tick(), 2) == [e.SendCancel("busy", (BLOCKS[0].cid,))]
    assert machine.step(received("busy", 0), 3) == [e.Verify("busy", BLOCKS[0].cid)]
    assert machine.duplicate_bytes == 0


def test_a_trickle_is_dropped_when_others_hold_what_it_owes() -> None:
    machine = session()
    machine.step(e.WantsAdded(PART, BLOCKS[:2], 3), 0)
    joined(machine, "a", "b", bitmap=b"\x03")
    for now in range(1, 21):
        machine.step(e.BytesReceived("a"), now)
    commands = machine.step(e.Tick(), 21)
    assert e.DropPeer("a", "too slow: one block took over 21 s", False) in commands
    assert wants(commands) == [("b", [0, 1])]


def test_no_clock_runs_while_our_own_disk_holds_a_peer_up() -> None:
    machine = session()
    machine.step(e.WantsAdded(PART, BLOCKS[:2], 3), 0)
    joined(machine, "a", "b", bitmap=b"\x03")
    for now in range(1, 60):
        machine.step(e.BytesReceived("a", held_up=True), now)
        assert not any(
            isinstance(command, e.DropPeer | e.SendCancel) for command in machine.step(e.Tick(), now)
        )
    assert machine.peers == ("a", "b")


def test_a_peer_that_stalled_is_asked_last() -> None:
    machine = session()
    machine.step(e.WantsAdded(OTHER, (block(100),), 1), 0)
    machine.step(e.PeerJoined("a", 1000, 100), 0)
    machine.step(e.HoldsReceived("a", OTHER, b"\x01"), 0)
    assert kinds(machine.step(e.Tick(), 16)) == [e.DropPeer]
    machine.step(e.WantsAdded(PART, BLOCKS, 0), 16)
    joined(machine, "a", "b", now=17)
    more = wants(machine.step(e.WantsAdded(PART, BLOCKS, 0x07), 17))
    assert more == [("b", [0, 1]), ("a", [2])]


def test_a_peer_that_leaves_gives_its_asks_back() -> None:
    machine = session()
    machine.step(ALL, 0)
    joined(machine, "a", "b")
    machine.step(e.PeerLeft("a"), 1)
    assert machine.outstanding == 2 * MIB
    assert wants(machine.step(received("b", 2), 1)) == [("b", [0])]
    assert wants(machine.step(received("b", 3), 1)) == [("b", [1])]


def test_the_tail_is_taken_over_once_and_the_late_copy_is_a_duplicate() -> None:
    machine = session()
    machine.step(e.WantsAdded(PART, BLOCKS[:2], 3), 0)
    joined(machine, "slow", bitmap=b"\x03", now=0)
    joined(machine, "fast", bitmap=b"\x03", now=2)
    commands = machine.step(e.Tick(), 8)
    assert e.SendCancel("slow", (BLOCKS[1].cid,)) in commands
    assert {n for peer, numbers in wants(commands) for n in numbers if peer == "fast"} == {0, 1}
    assert machine.step(e.Tick(), 8.1) == []
    assert kinds(machine.step(received("fast", 1), 8.2)) == [e.Verify]
    machine.step(e.BlockVerified(BLOCKS[1].cid), 8.2)
    assert machine.step(received("slow", 1), 8.3) == []
    assert machine.duplicate_bytes == MIB
    # The first copy wins, whoever sends it; the other is cancelled.
    assert machine.step(received("slow", 0), 8.4) == [
        e.Verify("slow", BLOCKS[0].cid),
        e.SendCancel("fast", (BLOCKS[0].cid,)),
    ]
    assert machine.step(e.BlockVerified(BLOCKS[0].cid), 8.4) == [e.Done()]


def test_a_block_of_two_parts_is_fetched_once() -> None:
    machine = session()
    machine.step(e.WantsAdded(PART, BLOCKS[:2], 3), 0)
    machine.step(e.WantsAdded(OTHER, (BLOCKS[1], BLOCKS[2]), 3), 0)
    machine.step(e.PeerJoined("a", 1000, 100), 0)
    # What the peer says of either part is enough to ask it.
    assert wants(machine.step(e.HoldsReceived("a", OTHER, b"\x01"), 0)) == [("a", [1])]
    assert wants(machine.step(e.HoldsReceived("a", PART, b"\x03"), 0)) == [("a", [0])]
    machine.step(received("a", 1), 0.1)
    machine.step(e.BlockVerified(BLOCKS[1].cid), 0.1)
    assert set(machine.missing()) == {BLOCKS[0].cid, BLOCKS[2].cid}


def test_lonely_and_impatient() -> None:
    machine = session(provider_timeout=30, stall_timeout=60)
    machine.step(ALL, 0)
    machine.step(e.Tick(), 1)
    assert machine.step(e.Tick(), 30) == []
    failed = machine.step(e.Tick(), 32)
    assert failed == [e.Failed("no-providers", tuple(block.cid for block in BLOCKS))]
    assert machine.step(e.Tick(), 100) == []

    machine = session(provider_timeout=30, stall_timeout=60)
    machine.step(ALL, 0)
    joined(machine, "a")
    for now in range(1, 60):
        machine.step(e.BytesReceived("a"), now)
        assert machine.step(e.Tick(), now) == []
    machine.step(e.BytesReceived("a"), 61)
    assert machine.step(e.Tick(), 61) == [e.Failed("timed-out", tuple(block.cid for block in BLOCKS))]


def test_no_more_sources_fails_at_once() -> None:
    machine = session()
    machine.step(ALL, 0)
    joined(machine, "a")
    assert machine.step(e.SourcesExhausted(), 1) == []
    commands = machine.step(e.PeerBroke("a", "sent garbage"), 2)
    assert kinds(commands) == [e.DropPeer]
    assert kinds(machine.step(e.Tick(), 2.1)) == [e.Failed]


def test_queries_stay_within_what_the_peer_takes() -> None:
    machine = session()
    parts = [CID.of_digest(DAG_CBOR, n.to_bytes(32, "big")) for n in range(5)]
    for n, part in enumerate(parts):
        machine.step(e.WantsAdded(part, (block(100 + n),), 0), 0)
    asked = [c for c in machine.step(e.PeerJoined("a", 10, 2), 0) if isinstance(c, e.AskHave)]
    assert [len(command.parts) for command in asked] == [2]
    first = asked[0].parts[0]
    assert kinds(machine.step(e.HoldsReceived("a", first, b"\x01"), 0)) == [e.AskHave]


def test_asks_stay_within_what_the_peer_takes() -> None:
    machine = session()
    small = tuple(block(n, 100) for n in range(50))
    machine.step(e.WantsAdded(PART, small, (1 << 50) - 1), 0)
    machine.step(e.PeerJoined("a", 7, 7), 0)
    commands = machine.step(e.HoldsReceived("a", PART, b"\xff" * 6 + b"\x03"), 0)
    assert [len(command.blocks) for command in commands if isinstance(command, e.SendWant)] == [7]


@pytest.mark.parametrize(("state", "verb"), [*product(BlockState, sorted({verb for _, verb in TRANSITIONS}))])
def test_only_what_the_table_allows_can_happen(state: BlockState, verb: str) -> None:
    machine = session()
    machine._states[BLOCKS[0].cid] = state
    after = TRANSITIONS.get((state, verb))
    if after is None:
        with pytest.raises(LocalProtocolError):
            machine._move(BLOCKS[0].cid, verb)
    else:
        machine._move(BLOCKS[0].cid, verb)
        assert machine._states[BLOCKS[0].cid] is after


def test_an_answer_nobody_asked_for_is_our_bug() -> None:
    machine = session()
    machine.step(ALL, 0)
    joined(machine, "a")
    with pytest.raises(LocalProtocolError):
        machine.step(received("a", 7), 1)

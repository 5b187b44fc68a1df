"""Frames under fuzz: any split, any damage, any order; only RemoteProtocolError comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omninfer import frames as f
from omninfer.conversation import TABLE, Conversation, State
from omninfer.framing import Decoder, encode
from omnistore import dagcbor
from omnistore.block import Block
from omnistore.errors import LocalProtocolError, RemoteProtocolError

MODEL = Block.node(b"\xa0").cid
VALID = [
    bytes.fromhex(vector["bytes"])
    for vector in json.loads(
        (Path(__file__).resolve().parents[2] / "spec" / "vectors" / "frames.json").read_text(encoding="utf-8")
    )["valid"]
]
EVERY = f.CACHING_COORDINATOR | f.CACHING_LENDER


def load(*, embed: bool = True, head: bool = True, slots: int = 2, context: int = 16) -> f.Load:
    return f.Load(MODEL, 0 if embed else 1, 4, embed, head, "auto", context, slots, ())


@st.composite
def activations(draw: st.DrawFn) -> f.Activations:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    values = draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns))
    return f.Activations.of(np.array(values, dtype=np.float32).reshape(rows, columns))


forwards = st.builds(
    f.Forward,
    seq=st.integers(0, 9),
    slot=st.integers(0, 3),
    position=st.integers(0, 20),
    input=st.one_of(st.lists(st.integers(0, 999), min_size=1, max_size=4).map(tuple), activations()),
    logits=st.booleans(),
)
outputs = st.builds(f.Output, seq=st.integers(0, 9), values=activations())
pings = st.binary(max_size=20)
any_frame: st.SearchStrategy[f.Frame] = st.one_of(
    forwards,
    outputs,
    st.builds(f.Ping, pings),
    st.builds(f.Pong, pings),
    st.builds(f.Ask, st.just("auto")),
    st.sampled_from([load(), load(embed=False), load(head=False)]),
    st.builds(f.Trim, st.integers(0, 3), st.integers(0, 20)),
    st.builds(f.Drop, st.integers(0, 3)),
    st.builds(f.Cache, st.integers(1, 600), st.sampled_from(["full", "q8"])),
    st.builds(f.Fork, st.just(0), st.integers(1, 3), st.integers(0, 20)),
    st.builds(f.Recall, st.integers(0, 3), st.just((bytes(16),))),
    st.builds(f.Keep, st.integers(0, 3), st.just((bytes(16),))),
    st.builds(f.Held, st.integers(0, 3), st.just(64)),
    st.just(f.Bye()),
    st.just(f.Profile("numpy", 10, 10, 1000)),
    st.just(f.Progress("load", 1, 2)),
    st.just(f.Ready(5, 5)),
    st.just(f.Refuse("busy", "no", "later")),
    st.just(f.Error("gone")),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(any_frame, max_size=6), st.data())
def test_frames_survive_any_split_of_their_bytes(frames: list[f.Frame], data: st.DataObject) -> None:
    stream = b"".join(encode(frame) for frame in frames)
    decoder, found = Decoder(EVERY), []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        found += decoder.feed_untrusted(stream[:cut])
        stream = stream[cut:]
    assert found == frames
    assert decoder.between_frames


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(VALID), st.data())
def test_damaged_frames_raise_one_class_or_are_other_valid_frames(frame: bytes, data: st.DataObject) -> None:
    damaged = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = Decoder(EVERY).feed_untrusted(bytes(damaged))
    except RemoteProtocolError:
        return
    assert all(encode(one) for one in found)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(EVERY)), st.data())
def test_valid_dag_cbor_of_the_wrong_shape_is_refused_or_means_something(
    name: str, data: st.DataObject
) -> None:
    samples = [v for v in map(decoded_body, VALID) if name in v]
    body = dict(samples[0][name])
    for key in data.draw(st.sets(st.sampled_from([*body, "other"]), min_size=1)):
        body[key] = data.draw(values)
    encoded = dagcbor.encode({name: body})
    try:
        Decoder(EVERY).feed_untrusted(len(encoded).to_bytes(4, "big") + encoded + bytes(64))
    except RemoteProtocolError as error:
        assert error.message


def decoded_body(frame: bytes) -> dict[str, dict[str, dagcbor.Value]]:
    length = int.from_bytes(frame[:4], "big")
    value = dagcbor.decode_untrusted(frame[4 : 4 + length], limit=1 << 16)
    assert isinstance(value, dict)
    return value


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_refused_or_waits_for_more(noise: bytes) -> None:
    try:
        Decoder(EVERY).feed_untrusted(noise)
    except RemoteProtocolError as error:
        assert error.message


@settings(max_examples=200, deadline=None)
@given(st.lists(any_frame, max_size=20))
def test_a_conversation_takes_any_order_without_any_other_error(frames: list[f.Frame]) -> None:
    conversation = Conversation("lender", caching=True)
    for frame in frames:
        before = conversation.state
        try:
            conversation.received_untrusted(frame)
        except RemoteProtocolError:
            continue
        assert conversation.state is TABLE[f.name_of(frame)][before]
        assert conversation.unanswered <= f.LIMITS.forwards


def ready(**options: bool | int) -> Conversation:
    conversation = Conversation("lender")
    conversation.received_untrusted(load(**options))  # type: ignore[arg-type]  # a mix of flags and counts
    conversation.sending(f.Ready(1, 0))
    return conversation


HIDDEN = f.Activations.of(np.zeros((2, 3), dtype=np.float32))
ONE_ROW = f.Activations.of(np.zeros((1, 3), dtype=np.float32))


@pytest.mark.parametrize(
    ("fault", "options", "frames"),
    [
        ("sequence starts late", {}, [f.Forward(1, 0, 0, (1,), True)]),
        ("sequence repeats", {}, [f.Forward(0, 0, 0, (1,), True), f.Forward(0, 0, 1, (1,), True)]),
        ("slot that was not asked for", {}, [f.Forward(0, 2, 0, (1,), True)]),
        ("trim of such a slot", {}, [f.Trim(2, 0)]),
        ("drop of such a slot", {}, [f.Drop(5)]),
        ("beyond the context", {}, [f.Forward(0, 0, 15, (1, 2), True)]),
        ("hidden states for an embedding", {}, [f.Forward(0, 0, 0, HIDDEN, True)]),
        ("tokens without one", {"embed": False}, [f.Forward(0, 0, 0, (1,), True)]),
        ("too many unanswered", {}, [f.Forward(n, 0, 0, (1,), True) for n in range(17)]),
        ("too many pings", {}, [f.Ping(b"")] * 17),
        ("a second load", {}, [load()]),
        ("ask while ready", {}, [f.Ask("auto")]),
        ("after bye", {}, [f.Bye(), f.Ping(b"")]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_lender_refuses(fault: str, options: dict[str, bool], frames: list[f.Frame]) -> None:
    conversation = ready(**options)
    with pytest.raises(RemoteProtocolError):
        for frame in frames:
            conversation.received_untrusted(frame)


@pytest.mark.parametrize(
    ("fault", "head", "answers"),
    [
        ("output nobody asked for", False, [f.Output(0, HIDDEN), f.Output(1, HIDDEN)]),
        ("output of a later forward", False, [f.Output(1, HIDDEN)]),
        ("too few rows", False, [f.Output(0, ONE_ROW)]),
        ("hidden states where logits were asked", True, [f.Output(0, HIDDEN)]),
        ("pong without ping", False, [f.Pong(b"")]),
        ("ready twice", False, [f.Ready(1, 0)]),
        ("profile while ready", False, [f.Profile("numpy", 1, 1, 1000)]),
        ("after an error", False, [f.Error("x"), f.Output(0, HIDDEN)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_coordinator_refuses(fault: str, head: bool, answers: list[f.Frame]) -> None:
    conversation = Conversation("coordinator")
    conversation.sending(load(head=head))
    conversation.received_untrusted(f.Progress("fetch", 0, 9))
    conversation.received_untrusted(f.Ready(1, 0))
    conversation.sending(f.Forward(0, 0, 0, (1, 2), True))
    with pytest.raises(RemoteProtocolError):
        for frame in answers:
            conversation.received_untrusted(frame)


def test_our_own_fault_is_a_local_one() -> None:
    conversation = Conversation("coordinator")
    with pytest.raises(LocalProtocolError, match="in state idle"):
        conversation.sending(f.Forward(0, 0, 0, (1,), True))
    with pytest.raises(LocalProtocolError, match="breaks the protocol"):
        encode(f.Forward(0, 0, 0, (), True))
    with pytest.raises(LocalProtocolError, match="breaks the protocol"):
        encode(f.Drop(64))


def test_a_broken_decoder_stays_broken() -> None:
    decoder = Decoder(EVERY)
    with pytest.raises(RemoteProtocolError):
        decoder.feed_untrusted(bytes(4))
    with pytest.raises(LocalProtocolError):
        decoder.feed_untrusted(encode(f.Bye()))


def test_a_pong_must_answer_the_oldest_ping() -> None:
    conversation = Conversation("coordinator")
    conversation.sending(f.Ping(b"12"))
    with pytest.raises(RemoteProtocolError, match="answers no ping"):
        conversation.received_untrusted(f.Pong(b"1"))
    assert conversation.state is State.IDLE


def caching(side: Literal["coordinator", "lender"], tokens: int = 512) -> Conversation:
    """After a load in version 1.1.0; shown what both sides sent."""
    conversation = Conversation(side, caching=True)
    for frame in (f.Cache(tokens, "full"), load(context=512, slots=4), f.Ready(1, 0)):
        conversation.sending(frame)
    return conversation


LABELS = (bytes(16), bytes(16))


def test_the_older_version_knows_no_newer_frame() -> None:
    for frame in (f.Cache(1, "full"), f.Fork(0, 1, 0), f.Recall(0, LABELS), f.Keep(0, LABELS), f.Held(0, 64)):
        with pytest.raises(RemoteProtocolError):
            Conversation("lender").received_untrusted(frame)
        with pytest.raises(RemoteProtocolError):
            ready().received_untrusted(frame)


def test_memory_of_slots_is_counted_in_steps_until_they_are_empty() -> None:
    one = caching("lender")
    one.received_untrusted(f.Forward(0, 0, 0, (1, 2), True))
    assert (one.room(0), one.room_left) == (256, 256)
    one.received_untrusted(f.Fork(0, 1, 1))
    assert (one.room(1), one.room_left) == (256, 0)
    one.received_untrusted(f.Trim(0, 1))
    with pytest.raises(RemoteProtocolError, match="slots of 768 tokens, and 512"):
        one.received_untrusted(f.Forward(1, 2, 0, (1,), True))
    one = caching("lender")
    one.received_untrusted(f.Forward(0, 0, 0, (1, 2), True))
    one.received_untrusted(f.Drop(0))
    assert one.room_left == 512


def test_a_recall_is_answered_once_and_for_as_much_as_was_asked() -> None:
    for held in (f.Held(1, 64), f.Held(0, 192)):
        one = caching("coordinator")
        one.sending(f.Recall(0, LABELS))
        with pytest.raises(RemoteProtocolError, match="answer no recall"):
            one.received_untrusted(held)
    one = caching("coordinator")
    one.sending(f.Recall(0, LABELS))
    with pytest.raises(LocalProtocolError, match="being recalled"):
        one.sending(f.Forward(0, 0, 0, (1,), True))
    one.received_untrusted(f.Held(0, 128))
    assert one.room(0) == 256
    with pytest.raises(RemoteProtocolError, match="answer no recall"):
        one.received_untrusted(f.Held(0, 128))


def test_a_slot_that_was_emptied_before_its_recall_was_answered_stays_empty() -> None:
    one = caching("coordinator")
    one.sending(f.Recall(0, LABELS))
    one.sending(f.Drop(0))
    one.sending(f.Forward(0, 0, 0, (1,), True))
    one.received_untrusted(f.Held(0, 128))
    one.sending(f.Drop(0))
    assert one.room(0) == 0
    one.sending(f.Recall(0, LABELS))

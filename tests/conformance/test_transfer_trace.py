"""spec/vectors/transfer-trace.json, a whole fetch in bytes, replayed against both sides of the code."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from omnistore.block import Block
from omnistore.cid import CID
from omnistore.transfer.asks import Arrived, Asks, Refused
from omnistore.transfer.demand import Wanted
from omnistore.transfer.messages import REQUESTER, SERVER, Decoder, Error, Hello, Holds
from omnistore.transfer.serve import FindHeld, ReadBlocks, ServeLimits, Serving
from tests.conformance.write_transfer_trace import document
from tests.conformance.write_transfer_vectors import VECTORS, named

TRACE = json.loads((VECTORS / "transfer-trace.json").read_text())
STREAMS = ("a", "b")
SIZES = {CID.parse_untrusted(link): len(bytes.fromhex(data)) for link, data in TRACE["payloads"].items()}


def steps(stream: str) -> list[tuple[str, bytes, str, dict[str, Any]]]:
    """(who says it, its bytes, its name, its fields) of one stream, in order."""
    return [
        (step["from"], bytes.fromhex(step["hex"]), *next(iter(step["message"].items())))
        for step in TRACE["steps"]
        if step["stream"] == stream
    ]


def test_the_trace_is_what_the_code_does() -> None:
    assert json.loads(json.dumps(document())) == TRACE


def test_it_has_everything_that_can_happen() -> None:
    said = {name for stream in STREAMS for _, _, name, _ in steps(stream)}
    assert said == {"hello", "have", "holds", "want", "deliver", "cancel", "missing", "error"}
    assert all(before["at"] <= after["at"] for before, after in pairwise(TRACE["steps"]))


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_bytes_and_decoded_forms_agree(stream: str, piece: int) -> None:
    for side, accepts in (("requester", REQUESTER), ("server", SERVER)):
        data = b"".join(data for who, data, _, _ in steps(stream) if who == side)
        decoder = Decoder(accepts)
        found = [
            named(message)
            for start in range(0, len(data), piece)
            for message in decoder.feed_untrusted(data[start : start + piece])
        ]
        assert decoder.between_messages
        assert json.loads(json.dumps(found)) == [
            {name: fields} for who, _, name, fields in steps(stream) if who == side
        ]


@pytest.mark.parametrize("stream", STREAMS)
def test_as_the_requester(stream: str) -> None:
    asks = Asks()
    owed: set[CID] = set()
    for who, data, name, fields in steps(stream):
        if who == "requester":
            links = [CID.parse_untrusted(link) for link in fields.get("links", fields.get("parts", ()))]
            if name == "want":
                owed |= set(links)
                assert asks.want([Wanted(link, SIZES[link]) for link in links]) == data
            elif name == "have":
                assert asks.have(links) == data
            else:
                cancelled = [link for link in owed if _number(stream, link) in fields["asks"]]
                assert asks.cancel(cancelled) == data
            continue
        for answer in asks.receive_untrusted(data):
            match answer:
                case Arrived(wanted, payload):
                    assert Block.verify_untrusted(wanted.cid, bytes(payload)).cid in owed
                    owed.discard(wanted.cid)
                case Refused(cids):
                    owed -= set(cids)
                case Holds(part, blocks):
                    assert str(part) == TRACE["part"] and (blocks or b"").hex() == TRACE["holds"][stream]
                case Hello() | Error():
                    assert named(answer) == {name: fields}
    assert not owed


def _number(stream: str, link: CID) -> int:
    """The number under which a link was asked for."""
    return next(
        fields["first"] + fields["links"].index(str(link))
        for _, _, name, fields in steps(stream)
        if name == "want" and str(link) in fields["links"]
    )


@pytest.mark.parametrize("stream", STREAMS)
def test_as_the_server(stream: str) -> None:
    """What the requester says is taken in, and what is then due is what the trace has the server say."""
    serving = Serving(ServeLimits(batch=1))
    opened = serving.open("requester", 0.0)
    assert opened is not None
    number, hello = opened
    said: list[dict[str, Any]] = [named(hello)]
    reading: list[tuple[int, CID]] = []
    for who, data, name, fields in steps(stream):
        if who == "requester":
            for message in Decoder(REQUESTER).feed_untrusted(data):
                reply = serving.receive_untrusted(number, message)  # type: ignore[arg-type]
                said += [named(reply)] if reply is not None else []
        elif name == "deliver":
            ask, cid = reading.pop(0)
            serving.sends(number, 0.0)
            serving.was_taken(number, SIZES[cid], 0.0)
            serving.was_sent(number, SIZES[cid], 0.0)
            said.append({"deliver": {"ask": ask, "data": TRACE["payloads"][str(cid)]}})
        elif name == "error":
            said.append({name: fields})
        # One thing at a time, as the recorded server does it.
        while not reading and (job := serving.next(0.0)) is not None:
            match job:
                case FindHeld(_, part):
                    bitmap = bytes.fromhex(TRACE["holds"][stream])
                    serving.was_found(number, part, bitmap)
                    said.append(named(Holds(part, bitmap)))
                case ReadBlocks(_, (one,)):
                    serving.was_read(number, SIZES[one[1]])
                    reading.append(one)
    assert json.loads(json.dumps(said)) == [
        {name: fields} for who, _, name, fields in steps(stream) if who == "server"
    ]


@pytest.mark.parametrize("stream", STREAMS)
def test_every_ask_is_answered_once(stream: str) -> None:
    asked = [
        fields["first"] + index
        for _, _, name, fields in steps(stream)
        if name == "want"
        for index in range(len(fields["links"]))
    ]
    answered = [
        ask
        for _, _, name, fields in steps(stream)
        if name in ("deliver", "missing")
        for ask in (fields["asks"] if name == "missing" else [fields["ask"]])
    ]
    assert asked == list(range(len(asked))) and sorted(answered) == asked

"""spec/vectors/frames.json: what another implementation must accept, encode and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omninfer.frames import (
    CACHING_COORDINATOR,
    CACHING_LENDER,
    COORDINATOR,
    LENDER,
    Activations,
    Frame,
    name_of,
)
from omninfer.framing import Decoder, encode
from omnistore.cid import CID
from omnistore.errors import RemoteProtocolError
from omnistore.net.interface import Provider

VECTORS = json.loads(
    (Path(__file__).resolve().parents[2] / "spec" / "vectors" / "frames.json").read_text(encoding="utf-8")
)
SIDES = {"coordinator": COORDINATOR, "lender": LENDER}
CACHING_SIDES = {"coordinator": CACHING_COORDINATOR, "lender": CACHING_LENDER}


def decoder_of(vector: dict[str, Any]) -> Decoder:
    sides = CACHING_SIDES if vector.get("version") == "1.1.0" else SIDES
    return Decoder(sides[vector["from"]])


def plain(value: object) -> Any:
    """A field as the vectors write it."""
    match value:
        case Activations(rows, columns, data):
            return {"rows": rows, "columns": columns, "float32le": data.hex()}
        case bytes():
            return value.hex()
        case Provider(peer, addrs):
            return {"peer": peer, "addrs": list(addrs)}
        case tuple():
            return [plain(item) for item in value]
        case CID():
            return str(value)
        case _:
            return value


def fields(frame: Frame) -> dict[str, Any]:
    return {name: plain(getattr(frame, name)) for name in frame.__slots__}


@pytest.mark.parametrize("vector", VECTORS["valid"], ids=lambda v: f"{v['frame']}-{len(v['bytes']) // 2}")
def test_valid_frames_decode_and_encode_to_the_same_bytes(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["bytes"])
    decoder = decoder_of(vector)
    (frame,) = decoder.feed_untrusted(data)
    assert decoder.between_frames
    assert name_of(frame) == vector["frame"]
    assert fields(frame) == vector["fields"]
    assert encode(frame) == data


@pytest.mark.parametrize("vector", VECTORS["invalid"], ids=lambda v: v["fault"])
def test_invalid_frames_are_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        decoder_of(vector).feed_untrusted(bytes.fromhex(vector["bytes"]))


def test_every_frame_has_a_vector() -> None:
    assert {vector["frame"] for vector in VECTORS["valid"]} == CACHING_COORDINATOR | CACHING_LENDER


def test_a_receiver_of_1_0_0_refuses_what_is_newer() -> None:
    newer = [vector for vector in VECTORS["valid"] if vector.get("version") == "1.1.0"]
    assert {vector["frame"] for vector in newer} == (
        CACHING_COORDINATOR | CACHING_LENDER
    ) - COORDINATOR - LENDER
    for vector in newer:
        with pytest.raises(RemoteProtocolError):
            Decoder(SIDES[vector["from"]]).feed_untrusted(bytes.fromhex(vector["bytes"]))

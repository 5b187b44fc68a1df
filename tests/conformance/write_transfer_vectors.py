"""Writes spec/vectors/transfer-*.json: `python -m tests.conformance.write_transfer_vectors`.

To be run when a vector is added. A change to messages that were there before is a change of the
protocol and needs another protocol ID.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from blake3 import blake3

from omnistore import dagcbor
from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.transfer import events as e
from omnistore.transfer.demand import Wanted
from omnistore.transfer.messages import (
    Cancel,
    Deliver,
    Error,
    Have,
    Hello,
    Holds,
    Message,
    Missing,
    Want,
    encode,
)
from omnistore.transfer.session import Session

VECTORS = Path(__file__).resolve().parent.parent.parent / "spec" / "vectors"
MIB = 1 << 20


def cid(text: str, codec: int = RAW) -> CID:
    return CID.of_digest(codec, blake3(text.encode()).digest())


PART = cid("part", DAG_CBOR)
A, B, C, D = (cid(text) for text in "abcd")
MESSAGES: dict[str, Message] = {
    "hello": Hello(1024, 256),
    "want one": Want(0, (A,)),
    "want more": Want(1, (B, C)),
    "want the last number": Want((1 << 53) - 1, (A,)),
    "cancel": Cancel((2, 0)),
    "have": Have((PART,)),
    "block of five bytes": Deliver(0, b"hello"),
    "block of 300 bytes": Deliver(24, bytes(300)),
    "missing": Missing((1, 2, 300)),
    "holds blocks 0, 1 and 9 of ten": Holds(PART, b"\x03\x02"),
    "holds nothing known": Holds(PART, None),
    "error": Error("busy", "too many streams; come back later"),
}


def frame(value: dagcbor.Value) -> bytes:
    return prefixed(dagcbor.encode(value))


def prefixed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def refused() -> dict[str, tuple[str, bytes]]:
    """Name → (who refuses it, bytes)."""
    want = dagcbor.encode({"want": {"first": 0, "links": [A]}})
    return {
        "length 0": ("server", bytes(4)),
        "length 65537": ("server", (65537).to_bytes(4, "big")),
        "not a map": ("server", frame([1])),
        "two names": ("server", frame({"cancel": {"asks": [0]}, "have": {"parts": [PART]}})),
        "unknown name": ("server", frame({"give": {}})),
        "server's message to a server": ("server", encode(Hello(1, 1))),
        "requester's message to a requester": ("requester", encode(Cancel((0,)))),
        "missing field": ("server", frame({"want": {"first": 0}})),
        "additional field": ("server", frame({"cancel": {"asks": [0], "why": "x"}})),
        "fields out of order": ("server", prefixed(want.replace(b"\x65first\x00", b"") + b"\x65first\x00")),
        "longer form of an integer": (
            "server",
            prefixed(dagcbor.encode({"cancel": {"asks": [1]}})[:-1] + b"\x18\x01"),
        ),
        "byte behind the item": ("server", prefixed(want + b"\x00")),
        "no links": ("server", frame({"want": {"first": 0, "links": []}})),
        "a link twice": ("server", frame({"want": {"first": 0, "links": [A, A]}})),
        "a link as text": ("server", frame({"want": {"first": 0, "links": [str(A)]}})),
        "negative ask": ("server", frame({"cancel": {"asks": [-1]}})),
        "ask beyond 2^53": ("server", frame({"cancel": {"asks": [(1 << 53) + 1]}})),
        "ask that is true": ("server", frame({"cancel": {"asks": [True]}})),
        "empty block": ("requester", frame({"block": {"ask": 0, "size": 0}})),
        "block over 2 MiB": ("requester", frame({"block": {"ask": 0, "size": 2 * MIB + 1}})),
        "empty bitmap": ("requester", frame({"holds": {"part": PART, "blocks": b""}})),
        "bitmap over 8 KiB": ("requester", frame({"holds": {"part": PART, "blocks": bytes(8193)}})),
        "hello that takes no asks": ("requester", frame({"hello": {"asks": 0, "queries": 1}})),
        "unknown error code": ("requester", frame({"error": {"code": "teapot", "text": ""}})),
    }


def plain(value: Any) -> Any:
    """A value of an event, command or message as JSON: CIDs as text, bytes as hex."""
    if isinstance(value, CID):
        return str(value)
    if isinstance(value, bytes | memoryview):
        return bytes(value).hex()
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def named(value: Any) -> dict[str, Any]:
    """`{"block-received": {…}}`."""
    return {re.sub(r"(?<!^)(?=[A-Z])", "-", type(value).__name__).lower(): plain(value)}


def events() -> list[tuple[float, e.Event]]:
    """A fetch of four blocks: a rare one, a liar, a staller, an answer that comes too late."""
    part = tuple(Wanted(link, MIB) for link in (A, B, C, D))
    return [
        (0.0, e.WantsAdded(None, (Wanted(PART, 65536, False),), 1)),
        (0.0, e.PeerJoined("liar", 1024, 256)),
        (0.2, e.BlockReceived("liar", PART, 700)),
        (0.2, e.BlockVerified(PART)),
        (0.2, e.WantsAdded(PART, part, 0b1111)),
        (0.3, e.HoldsReceived("liar", PART, b"\x0f")),
        (0.4, e.PeerJoined("slow", 1024, 256)),
        (0.5, e.HoldsReceived("slow", PART, b"\x0c")),
        (0.6, e.BlockReceived("liar", A, MIB)),
        (0.6, e.BlockRefused("liar", A)),
        (0.7, e.PeerJoined("good", 1024, 256)),
        (0.8, e.HoldsReceived("good", PART, b"\x0f")),
        (0.9, e.BlockReceived("good", A, MIB)),
        (0.9, e.BlockVerified(A)),
        (1.0, e.BlockReceived("good", B, MIB)),
        (1.0, e.BlockVerified(B)),
        (3.0, e.Tick()),
        (3.1, e.BlockReceived("good", D, MIB)),
        (3.1, e.BlockVerified(D)),
        (3.2, e.MissingReceived("slow", (D,))),
        (3.3, e.BlockReceived("slow", C, MIB)),
        (3.3, e.BlockVerified(C)),
        (3.4, e.BlockReceived("good", C, MIB)),
    ]


def payload(message: Message) -> bytes:
    return bytes(message.data) if isinstance(message, Deliver) else b""


def documents() -> dict[str, Any]:
    """File name → contents."""
    session = Session(lambda: 0.0)
    trace = [
        {"now": now, "event": named(event), "commands": [named(c) for c in session.step(event, now)]}
        for now, event in events()
    ]
    return {
        "transfer-messages.json": {
            "accepted": [
                {
                    "name": name,
                    "hex": (
                        encode(message) + (bytes(message.data) if isinstance(message, Deliver) else b"")
                    ).hex(),
                    "message": named(message),
                }
                for name, message in MESSAGES.items()
            ],
            "refused": [
                {"name": name, "by": by, "hex": data.hex()} for name, (by, data) in refused().items()
            ],
        },
        "transfer-session.json": trace,
    }


if __name__ == "__main__":
    for name, document in documents().items():
        (VECTORS / name).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")

"""Writes spec/vectors/transfer-trace.json: `python -m tests.conformance.write_transfer_trace`.

A whole fetch of one part from two servers, byte by byte, as our own cores hold it: both greet and tell what
they hold, one answers at once and the other hardly, whose asks are therefore taken over (end-game), one too
late; the last word is an `error`. Time is made up, so every run gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from omnistore.block import Block
from omnistore.cid import CID
from omnistore.transfer import events as e
from omnistore.transfer.asks import Arrived, Asks, Refused
from omnistore.transfer.demand import Wanted
from omnistore.transfer.messages import (
    REQUESTER,
    SERVER,
    Decoder,
    Deliver,
    Error,
    FromServer,
    Hello,
    Holds,
    encode,
)
from omnistore.transfer.serve import FindHeld, ReadBlocks, ServeLimits, Serving
from omnistore.transfer.session import Session
from omnistore.transfer.window import FlowLimits, SessionLimits
from tests.conformance.write_transfer_vectors import PART, VECTORS, named

SIZE = 64
BLOCKS = tuple(Block.raw(bytes([number]) * SIZE) for number in range(8))
HELD = {"a": b"\xff", "b": b"\xfe"}
"""What each server holds of the part: b lacks the first block."""
EVERY = {"a": 0.05, "b": 1.0}
"""Seconds that each server takes for a block."""
TICK = 0.1


@dataclass
class Peer:
    """One server and the requester's end of the stream to it."""

    name: str
    serving: Serving = field(default_factory=lambda: Serving(ServeLimits(batch=1)))
    asks: Asks = field(default_factory=Asks)
    stream: int = 0
    due: tuple[float, int, CID] | None = None
    """When the block that is being read leaves."""


class Trace:
    """Runs the fetch and notes every message."""

    def __init__(self) -> None:
        limits = SessionLimits(flow=FlowLimits(least=2 * SIZE, ceiling=64 * SIZE, queueing=0.0))
        self.session = Session(lambda: 0.0, limits)
        self.peers = {name: Peer(name) for name in HELD}
        self.steps: list[dict[str, Any]] = []
        self.now = 0.0
        self.done = False

    def run(self) -> list[dict[str, Any]]:
        """Every message in the order in which it was sent."""
        self.step(e.WantsAdded(PART, tuple(Wanted(block.cid, SIZE) for block in BLOCKS), 0xFF))
        for peer in self.peers.values():
            opened = peer.serving.open(peer.name, self.now)
            assert opened is not None
            peer.stream, hello = opened
            self.say(peer, hello)
        # What was cancelled too late is still answered, by its block.
        while not self.done or any(peer.due for peer in self.peers.values()):
            self.now = round(self.now + 0.05, 2)
            for peer in self.peers.values():
                self.serve(peer)
            if round(self.now / TICK, 2) % 1 == 0:
                self.step(e.Tick())
        self.say(self.peers["a"], Error("closing", "the node stops"))
        return self.steps

    def serve(self, peer: Peer) -> None:
        """What a server does at this moment."""
        if peer.due is not None and peer.due[0] <= self.now:
            _, ask, cid = peer.due
            peer.due = None
            block = next(block for block in BLOCKS if block.cid == cid)
            peer.serving.sends(peer.stream, self.now)
            peer.serving.was_taken(peer.stream, SIZE, self.now)
            peer.serving.was_sent(peer.stream, SIZE, self.now)
            self.say(peer, Deliver(ask, bytes(block.data)))
        while peer.due is None and (job := peer.serving.next(self.now)) is not None:
            match job:
                case FindHeld(_, part):
                    peer.serving.was_found(peer.stream, part, HELD[peer.name])
                    self.say(peer, Holds(part, HELD[peer.name]))
                case ReadBlocks(_, ((ask, cid),)):
                    peer.serving.was_read(peer.stream, SIZE)
                    peer.due = (self.now + EVERY[peer.name] - 0.001, ask, cid)

    def step(self, event: e.Event) -> None:
        """One event of the requester, and what it says about it."""
        for command in self.session.step(event, self.now):
            match command:
                case e.AskHave(name, parts):
                    self.ask(name, self.peers[name].asks.have(parts))
                case e.SendWant(name, blocks):
                    self.ask(name, self.peers[name].asks.want(blocks))
                case e.SendCancel(name, cids):
                    self.ask(name, self.peers[name].asks.cancel(cids))
                case e.Verify(_, cid):
                    self.step(e.BlockVerified(cid))
                case e.Done():
                    self.done = True

    def ask(self, name: str, data: bytes) -> None:
        """The requester sends, the server takes it in."""
        peer = self.peers[name]
        messages = Decoder(REQUESTER).feed_untrusted(data)
        self.note(name, "requester", data, messages)
        for message in messages:
            reply = peer.serving.receive_untrusted(peer.stream, message)  # type: ignore[arg-type]
            if reply is not None:
                self.say(peer, reply)

    def say(self, peer: Peer, message: FromServer) -> None:
        """The server sends, the requester takes it in."""
        data = encode(message) + (bytes(message.data) if isinstance(message, Deliver) else b"")
        self.note(peer.name, "server", data, Decoder(SERVER).feed_untrusted(data))
        for answer in peer.asks.receive_untrusted(data):
            events: dict[type, Callable[[Any], e.Event]] = {
                Hello: lambda hello: e.PeerJoined(peer.name, hello.asks, hello.queries),
                Arrived: lambda block: e.BlockReceived(peer.name, block.wanted.cid, len(block.data)),
                Refused: lambda refused: e.MissingReceived(peer.name, refused.cids),
                Holds: lambda holds: e.HoldsReceived(peer.name, holds.part, holds.blocks),
                Error: lambda error: e.PeerLeft(peer.name),
            }
            self.step(events[type(answer)](answer))

    def note(self, stream: str, side: str, data: bytes, messages: Any) -> None:
        """One entry of the trace for each message."""
        for message in messages:
            head = encode(message)
            size = len(head) + (len(message.data) if isinstance(message, Deliver) else 0)
            self.steps.append(
                {
                    "at": self.now,
                    "stream": stream,
                    "from": side,
                    "hex": data[:size].hex(),
                    "message": named(message),
                }
            )
            data = data[size:]
        assert not data


def document() -> dict[str, Any]:
    """The file's content."""
    return {
        "about": "spec/05-transfer: one part from two servers, in the order of sending; `at` in seconds",
        "part": str(PART),
        "links": [str(block.cid) for block in BLOCKS],
        "holds": {name: bitmap.hex() for name, bitmap in HELD.items()},
        "payloads": {str(block.cid): bytes(block.data).hex() for block in BLOCKS},
        "steps": Trace().run(),
    }


if __name__ == "__main__":
    (VECTORS / "transfer-trace.json").write_text(json.dumps(document(), indent=1) + "\n")

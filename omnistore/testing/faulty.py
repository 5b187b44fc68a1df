"""`FaultyPeer` and `annoy`: the two ends of the transfer protocol, behaving badly on purpose.

Shipped so that any implementation can be held against them: serve `FaultyPeer(store, fault).stream`
on a network and fetch from it; point `annoy` at a server. Each fault is one that a peer of the
open internet can have; what an implementation must do about it is in spec/05-transfer.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

import trio

from omnistore import dagcbor
from omnistore.cid import CID, RAW
from omnistore.errors import MalformedManifest, PeerUnreachable, StoreError
from omnistore.manifest import part_links_untrusted
from omnistore.net.interface import Network, Provider, Stream
from omnistore.store.interface import Store
from omnistore.transfer.messages import (
    LENGTH_SIZE,
    PROTOCOL,
    REQUESTER,
    Cancel,
    Decoder,
    Deliver,
    Have,
    Hello,
    Holds,
    Missing,
    Want,
    encode,
)

Fault = Literal[
    "lies",
    "stalls",
    "halts",
    "trickles",
    "dies",
    "lacks",
    "claims",
    "silent",
    "floods",
    "garbage",
    "wrong-length",
    "oversize",
    "unasked",
    "twice",
    "bad-bitmap",
]
"""`lies`: a flipped byte in every block after the first few. `stalls`: sends nothing more. `halts`: the
same, in the middle of a block. `trickles`: a byte a second. `dies`: resets in mid-block. `lacks`: holds
nothing. `claims`: says it holds everything, then `missing`. `silent`: never greets. `floods`: answers
that nobody asked for, without end. `garbage`: random bytes. `wrong-length`, `oversize`: a block that is a
byte short, or larger than any. `unasked`: a block for an ask that was never made. `twice`: the same answer
twice. `bad-bitmap`: a `holds` of the wrong length."""
FAULTS: Final = get_args(Fault)
BROKEN: Final = frozenset(
    {"lies", "floods", "garbage", "wrong-length", "oversize", "unasked", "twice", "bad-bitmap"}
)
"""Faults that break the protocol: whoever has one must be dropped for good, and named."""


@dataclass(slots=True, eq=False)
class FaultyPeer:
    """A server with one fault; otherwise slow, simple and right."""

    store: Store
    fault: Fault
    after: int = 3
    """Raw blocks sent properly first: nodes are always served, or nothing would begin."""
    sent: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    async def stream(self, stream: Stream) -> None:
        """Serve one inbound stream, badly."""
        if self.fault == "silent":
            await trio.sleep_forever()
        await stream.send_all(encode(Hello(1024, 256)))
        decoder = Decoder(REQUESTER)
        try:
            while data := await stream.receive_some(64 << 10):
                for message in decoder.feed_untrusted(data):
                    await self._answer(stream, message)
        except PeerUnreachable:
            await stream.reset()

    async def _answer(self, stream: Stream, message: object) -> None:
        match message:
            case Want(first, links):
                for ask, cid in enumerate(links, first):
                    await self._deliver(stream, ask, cid)
            case Have(parts):
                for part in parts:
                    await stream.send_all(encode(Holds(part, self._bitmap(part))))
            case Cancel():
                pass  # Everything was answered in order already.

    def _bitmap(self, part: CID) -> bytes | None:
        try:
            links = part_links_untrusted(self.store.read(part))
        except (StoreError, MalformedManifest):
            return None
        size = -(-len(links) // 8)
        if self.fault == "bad-bitmap":
            return b"\xff" * (size + 1)
        if self.fault == "lacks":
            return bytes(size)
        held = self.store.held(links)
        mask = sum(1 << index for index, cid in enumerate(links) if self.fault == "claims" or cid in held)
        return mask.to_bytes(size, "little")

    async def _deliver(self, stream: Stream, ask: int, cid: CID) -> None:
        if not self.store.has(cid):
            await stream.send_all(encode(Missing((ask,))))
            return
        data = bytes(self.store.read(cid).data)
        raw = cid.codec == RAW
        self.sent += raw
        if raw and self.sent > self.after:
            await self._misbehave(stream, ask, data)
        else:
            await _send(stream, ask, data)

    async def _misbehave(self, stream: Stream, ask: int, data: bytes) -> None:
        match self.fault:
            case "lies":
                await _send(stream, ask, bytes((data[0] ^ 1,)) + data[1:])
            case "stalls":
                await trio.sleep_forever()
            case "trickles":
                await stream.send_all(encode(Deliver(ask, data)))
                for byte in data:
                    await stream.send_all(bytes((byte,)))
                    await trio.sleep(1)
            case "dies" | "halts":
                await self._break_off(stream, ask, data)
            case "claims":
                await stream.send_all(encode(Missing((ask,))))
            case "floods":
                while True:
                    await stream.send_all(encode(Missing((ask + 1_000_000,))) * 100)
            case "garbage":
                await stream.send_all(self.rng.randbytes(100_000))
            case "wrong-length":
                await _send(stream, ask, data[:-1])
            case "oversize":
                body = dagcbor.encode({"block": {"ask": ask, "size": 3 << 20}})
                await stream.send_all(len(body).to_bytes(LENGTH_SIZE, "big") + body)
            case "unasked":
                await _send(stream, ask + 1_000_000, data)
            case _:
                for _ in range(2 if self.fault == "twice" else 1):
                    await _send(stream, ask, data)

    async def _break_off(self, stream: Stream, ask: int, data: bytes) -> None:
        """Half a block."""
        await stream.send_all(encode(Deliver(ask, data)) + data[: len(data) // 2])
        if self.fault == "halts":
            await trio.sleep_forever()
        await stream.reset()
        raise PeerUnreachable("died, as it was meant to")


async def _send(stream: Stream, ask: int, data: bytes) -> None:
    await stream.send_all(encode(Deliver(ask, data)))
    await stream.send_all(data)


# --- requesters -----------------------------------------------------------------------------

Annoyance = Literal["never-reads", "over-asks", "misnumbers", "cancels-nothing", "garbage", "huge", "mute"]
"""`never-reads`: asks for much and takes in nothing. `over-asks`: more than the hello allows.
`misnumbers`: asks that do not follow on. `huge`: announces a message of 4 GiB. `mute`: opens a
stream and says nothing."""
ANNOYANCES: Final = get_args(Annoyance)
ENDED: Final = frozenset({"over-asks", "misnumbers", "cancels-nothing", "garbage", "huge"})
"""Annoyances after which the server must end the stream at once."""


async def annoy(network: Network, server: Provider, annoyance: Annoyance, held: tuple[CID, ...]) -> None:
    """Be a requester of one bad kind, until the server ends it (or for ever).

    `held` are blocks that the server holds.
    """
    stream = await network.open_stream(server, PROTOCOL)
    try:
        await _ANNOY[annoyance](stream, held)
        while await stream.receive_some(64 << 10):
            pass
    except PeerUnreachable:
        pass
    finally:
        await stream.reset()


async def _never_reads(stream: Stream, held: tuple[CID, ...]) -> None:
    for round_ in range(1000 // len(held)):
        await stream.send_all(encode(Want(round_ * len(held), held)))
    await trio.sleep_forever()


async def _over_asks(stream: Stream, held: tuple[CID, ...]) -> None:
    for round_ in range(1 + 2000 // len(held)):
        await stream.send_all(encode(Want(round_ * len(held), held)))


async def _misnumbers(stream: Stream, held: tuple[CID, ...]) -> None:
    await stream.send_all(encode(Want(7, held)))


async def _cancels_nothing(stream: Stream, held: tuple[CID, ...]) -> None:
    await stream.send_all(encode(Cancel((5,))))


async def _garbage(stream: Stream, held: tuple[CID, ...]) -> None:
    await stream.send_all(b"\0\0\0\x10" + bytes(range(16)))


async def _huge(stream: Stream, held: tuple[CID, ...]) -> None:
    await stream.send_all(b"\xff" * LENGTH_SIZE + bytes(1000))


async def _mute(stream: Stream, held: tuple[CID, ...]) -> None:
    await trio.sleep_forever()


_ANNOY: Final[dict[str, Callable[[Stream, tuple[CID, ...]], Awaitable[None]]]] = {
    "never-reads": _never_reads,
    "over-asks": _over_asks,
    "misnumbers": _misnumbers,
    "cancels-nothing": _cancels_nothing,
    "garbage": _garbage,
    "huge": _huge,
    "mute": _mute,
}

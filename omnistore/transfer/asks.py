"""The requester's half of one stream: numbers its asks and checks every answer against them.

Pure: commands in, bytes out; bytes in, answers out. What to ask is `session`'s to decide; whether
a payload matches its CID is checked by whoever takes the answer. Implements spec/05-transfer,
section "A stream".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

from omnistore.cid import CID
from omnistore.errors import LocalProtocolError, RemoteProtocolError
from omnistore.transfer.buffers import Buffers
from omnistore.transfer.demand import Wanted
from omnistore.transfer.messages import (
    LIMITS,
    SERVER,
    Cancel,
    Decoder,
    Deliver,
    Error,
    Have,
    Hello,
    Holds,
    Missing,
    Want,
    encode,
)


@dataclass(frozen=True, slots=True)
class Arrived:
    """The answer to one ask: bytes of the right length, not verified."""

    wanted: Wanted
    data: memoryview


@dataclass(frozen=True, slots=True)
class Refused:
    """Asks answered by `missing`."""

    cids: tuple[CID, ...]


Answer: TypeAlias = Hello | Arrived | Refused | Holds | Error


class Asks:
    """What is asked and unanswered on one stream."""

    def __init__(self, buffers: Buffers | None = None) -> None:
        """`buffers`: where payloads are put; whoever is done with one gives it back there."""
        self._decoder = Decoder(SERVER, self._announced, buffers)
        self._next = 0
        self._wanted: dict[int, Wanted] = {}
        self._numbers: dict[CID, int] = {}
        self._parts: set[CID] = set()
        self._answers: list[Answer] = []
        """Whole, and not looked at."""
        self._filled = 0
        """Bytes taken in since `room`."""
        self._fault: RemoteProtocolError | None = None
        self.greeted = False
        """Whether the server's hello arrived."""

    def want(self, blocks: Sequence[Wanted]) -> bytes:
        """Ask for `blocks`, none of which is asked already."""
        out = bytearray()
        rest = iter(blocks)
        while batch := list(islice(rest, LIMITS.links)):
            out += encode(Want(self._next, tuple(block.cid for block in batch)))
            for number, block in enumerate(batch, self._next):
                if block.cid in self._numbers:
                    raise LocalProtocolError(f"block {block.cid} is asked already")
                self._wanted[number] = block
                self._numbers[block.cid] = number
            self._next += len(batch)
        return bytes(out)

    def cancel(self, cids: Sequence[CID]) -> bytes:
        """Cancel the asks for `cids`; those answered meanwhile are passed over."""
        numbers = iter([self._numbers[cid] for cid in cids if cid in self._numbers])
        out = bytearray()
        while batch := tuple(islice(numbers, LIMITS.links)):
            out += encode(Cancel(batch))
        return bytes(out)

    def have(self, parts: Sequence[CID]) -> bytes:
        """Ask what the peer holds of `parts`."""
        self._parts.update(parts)
        return encode(Have(tuple(parts)))

    def receive_untrusted(self, data: bytes) -> list[Answer]:
        """The answers that `data` completes. Raises `RemoteProtocolError`."""
        # One by one: a hello is looked at before the block that came in the same bytes.
        return [self._answer(message) for message in self._decoder.messages_untrusted(data)]

    def room(self) -> memoryview:
        """Where what comes next belongs, never empty; `next_room` and `answers_untrusted` follow.

        Raises `RemoteProtocolError` where the peer broke the protocol behind the last answers.
        """
        if self._fault is not None:
            raise self._fault
        self._filled = 0
        return self._decoder.room()

    def next_room(self) -> memoryview | None:
        """All of the last room is there: where more belongs. None where the peer broke the protocol.

        Never raises: whoever receives for us is not to blame, and `answers_untrusted` will.
        """
        size = len(self._decoder.room())
        self._filled += size
        try:
            self._take_in(size)
        except RemoteProtocolError as fault:
            self._fault = fault
        return self._decoder.room() if self._fault is None else None

    def answers_untrusted(self, count: int) -> list[Answer]:
        """What the `count` bytes complete that came since `room`. Raises `RemoteProtocolError`."""
        if self._fault is None and count > self._filled:
            self._take_in(count - self._filled)
        if self._fault is not None and not self._answers:
            raise self._fault
        found, self._answers = self._answers, []
        return found

    def _take_in(self, count: int) -> None:
        message = self._decoder.filled_untrusted(count)
        if message is not None:
            self._answers.append(self._answer(message))

    def _answer(self, message: object) -> Answer:
        if isinstance(message, Hello) == self.greeted and not isinstance(message, Error):
            raise RemoteProtocolError("greeted twice" if self.greeted else "answered before its hello")
        match message:
            case Deliver(ask, data):
                return Arrived(self._take(ask), memoryview(data))
            case Missing(asks):
                return Refused(tuple(self._take(ask).cid for ask in asks))
            case Holds(part, _):
                if part not in self._parts:
                    raise RemoteProtocolError(f"told what it holds of {part}, which it was not asked")
                self._parts.remove(part)
                return message
            case Hello():
                self.greeted = True
                return message
            case Error():
                return message
        raise LocalProtocolError(f"the decoder let a {message!r} through")

    def _announced(self, ask: int, size: int) -> None:
        """Check a `block` before a byte of its payload is taken in."""
        if not self.greeted:
            raise RemoteProtocolError("sent a block before its hello")
        wanted = self._wanted.get(ask)
        if wanted is None:
            raise RemoteProtocolError(f"sent a block for ask {ask}, which is not open")
        if wanted.exact and size != wanted.size:
            raise RemoteProtocolError(f"sent {size} bytes for block {wanted.cid}, which has {wanted.size}")

    def _take(self, ask: int) -> Wanted:
        wanted = self._wanted.pop(ask, None)
        if wanted is None:
            raise RemoteProtocolError(f"answered ask {ask}, which is not open")
        del self._numbers[wanted.cid]
        return wanted

"""The messages of `/omni/transfer/1.0.0` and their bytes (spec/05-transfer, section "Messages").

A message is a big-endian 32-bit length, then that many bytes of deterministic dag-cbor: a map whose
one key names the message. A `block` message is followed by its payload as raw bytes. Pure: bytes
in, messages out. Which message may come when is `asks` and `serve`'s to say; nothing here knows of
streams, stores or time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from omnistore import dagcbor
from omnistore.block import MAX_BLOCK_SIZE
from omnistore.cid import CID
from omnistore.errors import LocalProtocolError, RemoteProtocolError
from omnistore.transfer.buffers import Buffers
from omnistore.transfer.heads import decode_head, encode_head

PROTOCOL: Final = "/omni/transfer/1.0.0"
LENGTH_SIZE: Final = 4
"""Bytes of the length before every message."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one side may ask of the other. Both sides of version 1.0.0 know these numbers."""

    message: int = 64 << 10
    """Bytes of one message without length and payload: a full `want` takes 43 KiB."""
    payload: int = MAX_BLOCK_SIZE
    """Bytes behind a `block` message: the largest block that anybody accepts."""
    links: int = 1024
    """CIDs in one `want`: at 1 MiB each, sixteen times the largest window."""
    asks: int = 4096
    """Most asks unanswered on one stream that a server may offer: 64 MiB of 16 KiB norm tensors."""
    queries: int = 256
    """Parts asked about and unanswered on one stream: a 405B model has 130."""
    bitmap: int = 8 << 10
    """Bytes of a `holds` bitmap: a 2 MiB part node can hold some 51,000 links."""
    text: int = 256
    """Characters of an error's text: one line for a log."""
    number: int = 1 << 53
    """Ask numbers stay below: every language's integers reach it."""


LIMITS: Final = Limits()

ERROR_CODES: Final = frozenset({"busy", "over-asked", "malformed", "idle", "closing"})


@dataclass(frozen=True, slots=True)
class Hello:
    """Server: first message of a stream, what it will take from this requester."""

    asks: int
    """Most asks unanswered on this stream."""
    queries: int
    """Most parts queried and unanswered on this stream."""


@dataclass(frozen=True, slots=True)
class Want:
    """Requester: send me these, as asks `first`, `first` + 1, …; the count never restarts on a stream."""

    first: int
    links: tuple[CID, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Requester: these asks are no longer needed. Each is still answered, by `block` or `missing`."""

    asks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Have:
    """Requester: which blocks of these parts do you hold?"""

    parts: tuple[CID, ...]


@dataclass(frozen=True, slots=True)
class Deliver:
    """Server: answers one ask (`block` on the wire); the payload is unverified."""

    ask: int
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Missing:
    """Server: answers asks whose block is not held, or that were cancelled in time."""

    asks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Holds:
    """Server: answers one part of a `have`."""

    part: CID
    blocks: bytes | None
    """Bit i (byte i // 8, least significant bit first) is the part's i-th link; None: nothing known."""


@dataclass(frozen=True, slots=True)
class Error:
    """Server: the stream ends here, and why."""

    code: str
    text: str


FromRequester: TypeAlias = Want | Cancel | Have
FromServer: TypeAlias = Hello | Deliver | Missing | Holds | Error
Message: TypeAlias = FromRequester | FromServer

REQUESTER: Final = frozenset({"want", "cancel", "have"})
"""Names of what a requester sends."""
SERVER: Final = frozenset({"hello", "block", "missing", "holds", "error"})
"""Names of what a server sends."""


# --- encoding -------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """The bytes of a message; for a `Deliver`, everything before its payload."""
    if isinstance(message, Deliver):
        data = encode_head(message.ask, len(message.data))
        return len(data).to_bytes(LENGTH_SIZE, "big") + data
    name, body = _body(message)
    data = dagcbor.encode({name: body})
    if len(data) > LIMITS.message:
        raise LocalProtocolError(
            f"a {name!r} message of {len(data)} bytes; at most {LIMITS.message} are allowed"
        )
    return len(data).to_bytes(LENGTH_SIZE, "big") + data


def _body(message: FromRequester | Hello | Missing | Holds | Error) -> tuple[str, dict[str, dagcbor.Value]]:
    match message:
        case Want(first, links):
            return "want", {"first": first, "links": list(links)}
        case Missing(asks):
            return "missing", {"asks": list(asks)}
        case Cancel(asks):
            return "cancel", {"asks": list(asks)}
        case Have(parts):
            return "have", {"parts": list(parts)}
        case Holds(part, blocks):
            return "holds", {"part": part, "blocks": blocks}
        case Hello(asks, queries):
            return "hello", {"asks": asks, "queries": queries}
        case Error(code, text):
            return "error", {"code": code, "text": text}


# --- decoding -------------------------------------------------------------------------------

Announced: TypeAlias = Callable[[int, int], None]
"""Called with (ask, size) of a `block` before its payload is taken in; may raise `RemoteProtocolError`."""


class Decoder:
    """Turns what arrives on one stream into messages, however the bytes are split."""

    def __init__(
        self, accepts: frozenset[str], announced: Announced | None = None, buffers: Buffers | None = None
    ) -> None:
        """`accepts`: `SERVER` on a requester's side, `REQUESTER` on a server's.

        Payloads lie in memory of `buffers`; whoever gets one may give it back there.
        """
        self._accepts = accepts
        self._announced = announced
        self._buffers = buffers or Buffers(0)
        self._length = memoryview(bytearray(LENGTH_SIZE))
        self._item = self._length
        """What is being read: a length, a message, or a payload."""
        self._room = self._item
        """The rest of it, that is still to come."""
        self._ask: int | None = None
        """Of the payload being read."""
        self._dead = False

    @property
    def between_messages(self) -> bool:
        """Whether a stream may end cleanly here."""
        return self._item is self._length and len(self._room) == LENGTH_SIZE

    def room(self) -> memoryview:
        """Where what comes next belongs, never empty; `filled` says that some of it is there."""
        return self._room

    def filled_untrusted(self, count: int) -> Message | None:
        """The first `count` bytes of `room` are there; the message that they complete.

        Raises `RemoteProtocolError`, after which it is useless.
        """
        if self._dead:
            raise LocalProtocolError("fed after the stream was found broken")
        if not 0 <= count <= len(self._room):
            raise LocalProtocolError(f"{count} bytes are more than there was room for")
        self._room = self._room[count:]
        if self._room:
            return None
        try:
            return self._whole()
        except RemoteProtocolError:
            self._dead = True
            raise

    def feed_untrusted(self, data: bytes) -> list[Message]:
        """The messages that `data` completes. Raises `RemoteProtocolError`, after which it is useless."""
        return list(self.messages_untrusted(data))

    def messages_untrusted(self, data: bytes) -> Iterator[Message]:
        """The same, each before the next is looked at: whether that may come can depend on it."""
        view = memoryview(data)
        while view or self._dead:
            taken = min(len(self._room), len(view))
            self._room[:taken] = view[:taken]
            message = self.filled_untrusted(taken)
            if message is not None:
                yield message
            view = view[taken:]

    def _whole(self) -> Message | None:
        """What was being read is there: the message that it is, or is the end of."""
        if self._ask is not None:
            return self._delivered(self._ask)
        item = self._item
        if item is self._length:
            size = int.from_bytes(item, "big")
            if not 0 < size <= LIMITS.message:
                raise RemoteProtocolError(f"a message of {size} bytes; 1 to {LIMITS.message} are allowed")
            self._begin(memoryview(bytearray(size)))
            return None
        self._begin(self._length)
        return self._decoded(bytes(item))

    def _begin(self, item: memoryview) -> None:
        self._item = self._room = item

    def _decoded(self, body: bytes) -> Message | None:
        head = decode_head(body) if "block" in self._accepts else None
        if head is None:
            name, fields = _named(body, self._accepts)
            if name != "block":
                return _PARSERS[name](fields)
            head = fields["ask"], fields["size"]
        ask, size = _number(head[0], "an ask"), _integer(head[1], "a block's size", 1, LIMITS.payload)
        if self._announced is not None:
            self._announced(ask, size)
        self._ask = ask
        self._begin(self._buffers.lend(size))
        return None

    def _delivered(self, ask: int) -> Deliver:
        payload = self._item
        self._ask = None
        self._begin(self._length)
        return Deliver(ask, payload)


_FIELDS: Final[Mapping[str, frozenset[str]]] = {
    "hello": frozenset({"asks", "queries"}),
    "want": frozenset({"first", "links"}),
    "cancel": frozenset({"asks"}),
    "have": frozenset({"parts"}),
    "block": frozenset({"ask", "size"}),
    "missing": frozenset({"asks"}),
    "holds": frozenset({"part", "blocks"}),
    "error": frozenset({"code", "text"}),
}


def _named(body: bytes, accepts: frozenset[str]) -> tuple[str, Mapping[str, Any]]:
    value = dagcbor.decode_untrusted(body, limit=LIMITS.message)
    if not isinstance(value, dict) or len(value) != 1:
        raise RemoteProtocolError("a message that is not a map of one key")
    name, fields = next(iter(value.items()))
    if name not in accepts:
        raise RemoteProtocolError(f"a message {name[:32]!r}, which this side does not take")
    if not isinstance(fields, dict) or fields.keys() != _FIELDS[name]:
        raise RemoteProtocolError(f"a {name!r} message with other fields than its own")
    return name, fields


def _hello(fields: Mapping[str, Any]) -> Hello:
    return Hello(
        asks=_integer(fields["asks"], "the asks of a 'hello'", 1, LIMITS.asks),
        queries=_integer(fields["queries"], "the queries of a 'hello'", 1, LIMITS.queries),
    )


def _want(fields: Mapping[str, Any]) -> Want:
    links = _links(fields["links"], "a 'want'", LIMITS.links)
    first = _number(fields["first"], "the first ask of a 'want'")
    _number(first + len(links), "an ask")
    return Want(first, links)


def _holds(fields: Mapping[str, Any]) -> Holds:
    part, blocks = fields["part"], fields["blocks"]
    if not isinstance(part, CID):
        raise RemoteProtocolError("a 'holds' without a link")
    if blocks is not None and not (isinstance(blocks, bytes) and 0 < len(blocks) <= LIMITS.bitmap):
        raise RemoteProtocolError(f"a 'holds' whose bitmap is not 1 to {LIMITS.bitmap} bytes")
    return Holds(part, blocks)


def _error(fields: Mapping[str, Any]) -> Error:
    code, text = fields["code"], fields["text"]
    if not isinstance(code, str) or code not in ERROR_CODES:
        raise RemoteProtocolError("an 'error' of unknown code")
    if not isinstance(text, str) or len(text) > LIMITS.text:
        raise RemoteProtocolError(f"an 'error' without a text of at most {LIMITS.text} characters")
    return Error(code, text)


_PARSERS: Final[Mapping[str, Callable[[Mapping[str, Any]], Message]]] = {
    "hello": _hello,
    "want": _want,
    "cancel": lambda fields: Cancel(_asks(fields["asks"], "a 'cancel'")),
    "have": lambda fields: Have(_links(fields["parts"], "a 'have'", LIMITS.queries)),
    "missing": lambda fields: Missing(_asks(fields["asks"], "a 'missing'")),
    "holds": _holds,
    "error": _error,
}


def _items(value: Any, what: str, most: int) -> Sequence[Any]:
    if not isinstance(value, list) or not 0 < len(value) <= most:
        raise RemoteProtocolError(f"{what} without a list of 1 to {most} items")
    return value


def _links(value: Any, what: str, most: int) -> tuple[CID, ...]:
    links = tuple(_items(value, what, most))
    if not all(isinstance(link, CID) for link in links):
        raise RemoteProtocolError(f"{what} with something that is no link")
    if len(set(links)) != len(links):
        raise RemoteProtocolError(f"{what} with one link twice")
    return links


def _asks(value: Any, what: str) -> tuple[int, ...]:
    asks = tuple(_number(item, what) for item in _items(value, what, LIMITS.links))
    if len(set(asks)) != len(asks):
        raise RemoteProtocolError(f"{what} with one ask twice")
    return asks


def _number(value: Any, what: str) -> int:
    return _integer(value, what, 0, LIMITS.number)


def _integer(value: Any, what: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise RemoteProtocolError(f"{what} is not an integer from {least} to {most}")
    return value

"""Bitswap 1.2 as far as a server needs it: wantlists in, blocks and presences out (pure).

A message is a varint length, then protobuf; what is asked on one stream is answered on another that the
server opens. `Wants` is what one peer asked for and was not answered yet. We never ask over Bitswap,
so blocks and presences that others send are passed over. Implements spec/05-transfer, section
"Bitswap".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from omnistore import varint
from omnistore.block import Block
from omnistore.cid import CID
from omnistore.errors import MalformedCID, RemoteProtocolError

PROTOCOL: Final = "/ipfs/bitswap/1.2.0"
MAX_MESSAGE: Final = 1 << 20
"""Bytes of a message taken in: a wantlist of 1024 CIDs takes 50 KiB; blocks are nothing we asked for."""
MAX_WANTS: Final = 1024
"""CIDs wanted by one peer and unanswered; what is beyond is forgotten, as other implementations do."""
PRESENCES: Final = 256
"""Presences in one message."""
_HAVE, _DONT_HAVE = 0, 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a wantlist."""

    cid: bytes
    """As it came: also CIDs of profiles that we do not know."""
    cancel: bool = False
    have: bool = False
    """Only whether we hold it is asked, not the block."""
    dont_have: bool = False
    """To be told, too, that we do not hold it."""


@dataclass(frozen=True, slots=True)
class Wantlist:
    """What a message asks for."""

    entries: tuple[Entry, ...]
    full: bool
    """Everything wanted: whatever was wanted before is not."""


class Wants:
    """What one peer wants, in the order in which it asked."""

    def __init__(self) -> None:
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def receive(self, wantlist: Wantlist) -> None:
        """Take in a wantlist."""
        if wantlist.full:
            self._entries.clear()
        for entry in wantlist.entries:
            if entry.cancel:
                self._entries.pop(entry.cid, None)
            elif entry.cid in self._entries or len(self._entries) < MAX_WANTS:
                # A block that is wanted is not to be answered by a presence alone.
                before = self._entries.get(entry.cid)
                if before is None or before.have:
                    self._entries[entry.cid] = entry

    def presences(self) -> list[Entry]:
        """Those that ask only what is held; taken out."""
        asked = [entry for entry in self._entries.values() if entry.have][:PRESENCES]
        for entry in asked:
            del self._entries[entry.cid]
        return asked

    def block(self) -> Entry | None:
        """The first that asks for a block; taken out."""
        found = next((entry for entry in self._entries.values() if not entry.have), None)
        if found is not None:
            del self._entries[found.cid]
        return found


def known_cid(data: bytes) -> CID | None:
    """The CID, if it is of our profile; nothing else is held here."""
    try:
        return CID.from_bytes_untrusted(data)
    except MalformedCID:
        return None


# --- bytes ----------------------------------------------------------------------------------


class Messages:
    """Cuts what arrives on a stream into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed_untrusted(self, data: bytes) -> list[bytes]:
        """The messages that `data` completes. Raises `RemoteProtocolError`."""
        self._buffer += data
        found = []
        while self._buffer:
            try:
                head = varint.decode(self._buffer)
            except ValueError as error:
                raise RemoteProtocolError(f"Bitswap: {error}") from None
            if head is None:
                break
            size, start = head
            if size > MAX_MESSAGE:
                raise RemoteProtocolError(f"Bitswap: a message of {size} bytes; {MAX_MESSAGE} are allowed")
            if len(self._buffer) < start + size:
                break
            found.append(bytes(self._buffer[start : start + size]))
            del self._buffer[: start + size]
        return found


def wantlist_untrusted(data: bytes) -> Wantlist | None:
    """The wantlist of a message, if it has one. Raises `RemoteProtocolError`."""
    entries: list[Entry] = []
    full = seen = False
    for number, value in _fields_untrusted(data):
        if number != 1:
            continue
        seen = True
        for inner, content in _fields_untrusted(_bytes(value)):
            if inner == 1:
                entries.append(_entry_untrusted(_bytes(content)))
            elif inner == 2:
                full = bool(content)
    return Wantlist(tuple(entries), full) if seen else None


def _entry_untrusted(data: bytes) -> Entry:
    found = dict(_fields_untrusted(data))
    return Entry(_bytes(found.get(1, b"")), bool(found.get(3)), found.get(4) == 1, bool(found.get(5)))


def _bytes(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise RemoteProtocolError("Bitswap: a number where bytes belong")
    return value


def _fields_untrusted(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protobuf message: number, and value."""
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _number(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _number(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise RemoteProtocolError(f"Bitswap: wire type {kind}")
        if at + size > len(data):
            raise RemoteProtocolError("Bitswap: a field that is cut off")
        yield key >> 3, data[at : at + size]
        at += size


def _number(data: bytes, at: int) -> tuple[int, int]:
    # A negative int32, such as a priority, takes ten bytes in protobuf: its value is nothing to us.
    if data[at + 9 : at + 10] == b"\x01" and all(byte & 0x80 for byte in data[at : at + 9]):
        return 0, at + 10
    try:
        found = varint.decode(data, at)
    except ValueError as error:
        raise RemoteProtocolError(f"Bitswap: {error}") from None
    if found is None:
        raise RemoteProtocolError("Bitswap: a field that is cut off")
    return found


def block_message(block: Block) -> bytes:
    """A message, its length included, that brings one block."""
    payload = _field(1, block.cid.binary[:4]) + _field(2, bytes(block.data))
    return _framed(_field(3, payload))


def presence_message(held: Sequence[bytes], lacked: Sequence[bytes]) -> bytes:
    """A message that says of CIDs whether they are held; nothing when there is nothing to say."""
    found = [(cid, _HAVE) for cid in held] + [(cid, _DONT_HAVE) for cid in lacked]
    if not found:
        return b""
    return _framed(b"".join(_field(4, _field(1, cid) + bytes((2 << 3, kind))) for cid, kind in found))


def _field(number: int, data: bytes) -> bytes:
    return varint.encode(number << 3 | 2) + varint.encode(len(data)) + data


def _framed(message: bytes) -> bytes:
    return varint.encode(len(message)) + message

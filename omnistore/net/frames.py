"""Yamux frame headers (pure): the numbers of the protocol, packing, and strict unpacking.

The wire format is Yamux's of https://github.com/hashicorp/yamux/blob/master/spec.md, as every libp2p
speaks it. What a frame means for a stream is `muxing`'s.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from omnistore.errors import RemoteProtocolError

_HEADER: Final = struct.Struct("!BBHII")
HEADER_SIZE: Final = _HEADER.size
MAX_PAYLOAD: Final = 264 << 10
"""Bytes of a data frame of ours: a quarter of a block and the message before it. What is written meanwhile
waits until so much was sent; others take in frames as large as a window."""
INITIAL_WINDOW: Final = 256 << 10
"""Bytes that a stream may carry before its receiver said anything."""

DATA: Final = 0
WINDOW: Final = 1
PING: Final = 2
GO_AWAY: Final = 3

SYN: Final = 1
ACK: Final = 2
FIN: Final = 4
RST: Final = 8

NORMAL: Final = 0
PROTOCOL_ERROR: Final = 1


@dataclass(frozen=True, slots=True)
class Header:
    """The twelve bytes before everything."""

    kind: int
    flags: int
    stream: int
    value: int
    """Bytes of a data frame, of a window's opening; a ping's number; why somebody goes away."""


def pack(kind: int, flags: int, stream: int, value: int) -> bytes:
    """The header's bytes."""
    return _HEADER.pack(0, kind, flags, stream, value)


def unpack_untrusted(data: bytes | memoryview) -> Header:
    """The header that twelve bytes are. Raises `RemoteProtocolError`."""
    version, kind, flags, stream, value = _HEADER.unpack(data)
    if version != 0:
        raise RemoteProtocolError(f"a frame of version {version}; only 0 is known")
    if kind > GO_AWAY:
        raise RemoteProtocolError(f"a frame of unknown type {kind}")
    if flags > SYN | ACK | FIN | RST:
        raise RemoteProtocolError(f"a frame with unknown flags {flags:#x}")
    if (stream == 0) == (kind in (DATA, WINDOW)):
        raise RemoteProtocolError(f"a frame of type {kind} on stream {stream}")
    return Header(kind, flags, stream, value)

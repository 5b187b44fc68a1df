"""Protobuf messages behind their length, as libp2p's small protocols have them. Knows no message."""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.message import DecodeError

from omnistore.errors import RemoteProtocolError
from omnistore.net.interface import Stream
from omnistore.varint import encode

MAX_MESSAGE: Final = 8192
"""Bytes; a reservation with a signed voucher and eight addresses has under 1 KiB."""


async def send(stream: Stream, message: Any) -> None:
    """Send one message. Raises `PeerUnreachable`."""
    body = message.SerializeToString()
    await stream.send_all(encode(len(body)) + body)


async def receive_untrusted(stream: Stream, kind: Any, most: int = MAX_MESSAGE) -> Any:
    """One message of `kind`, at most `most` bytes long, and not a byte more.

    Raises `RemoteProtocolError`, or `PeerUnreachable` when the stream ends first.
    """
    length = 0
    for shift in (0, 7):
        byte = (await stream.receive_exactly(1))[0]
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    else:
        raise RemoteProtocolError(f"{stream.peer} announces an endless message")
    if length > most:
        raise RemoteProtocolError(f"{stream.peer} announces a message of {length} bytes")
    try:
        return kind.FromString(await stream.receive_exactly(length) if length else b"")
    except DecodeError as error:
        raise RemoteProtocolError(f"{stream.peer} sent a malformed message: {error}") from None

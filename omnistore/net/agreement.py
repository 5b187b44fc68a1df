"""What two sides say when they agree on one protocol, and the peer's half of it as it arrives (pure).

multistream-select 1.0.0 as libp2p uses it (spec/04-discovery §2). Asking is `negotiation`'s and `yamux`'s.
"""

from __future__ import annotations

from typing import Final

from omnistore import varint
from omnistore.errors import RemoteProtocolError

HEADER: Final = "/multistream/1.0.0"
_REFUSED: Final = b"\x03na\n"
"""What a peer says of a protocol that it lacks."""


def agreed(protocol: str) -> bytes:
    """What each side sends when both agree on `protocol`, and nothing else was asked for."""
    return _line(HEADER) + _line(protocol)


def _line(text: str) -> bytes:
    data = text.encode() + b"\n"
    return varint.encode(len(data)) + data


class Answer:
    """The peer's half of an agreement that was taken for granted, as it arrives."""

    __slots__ = ("_due", "_header", "_protocol", "_seen")

    def __init__(self, protocol: str) -> None:
        self._protocol = protocol
        self._due = agreed(protocol)
        self._seen = 0
        self._header = len(_line(HEADER))

    @property
    def lacking(self) -> int:
        """Bytes of it that did not arrive yet."""
        return len(self._due) - self._seen

    def take_untrusted(self, data: bytes | memoryview) -> memoryview:
        """Take in what arrived; what is behind the answer. Raises `RemoteProtocolError`."""
        view = memoryview(data)
        piece = bytes(view[: self.lacking])
        if piece != self._due[self._seen : self._seen + len(piece)]:
            said = self._due[: self._seen] + piece
            refused = said[self._header :].startswith(_REFUSED[:1])
            raise RemoteProtocolError(
                f"does not speak {self._protocol}" if refused else f"does not agree on {self._protocol}"
            )
        self._seen += len(piece)
        return view[len(piece) :]

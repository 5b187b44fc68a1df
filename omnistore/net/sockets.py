"""TCP connections from a port that was chosen, several at once: what hole punching needs of sockets.

A listener of the library shares its port (SO_REUSEPORT), so that connections can leave from it; a node
that does not listen takes any free port for a while.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import trio


@dataclass(frozen=True, slots=True)
class Source:
    """Where connections of one family leave from."""

    host: str
    port: int

    async def connect(self, host: str, port: int) -> trio.SocketStream:
        """Connect to `host`, which is of the same family. Raises `OSError`."""
        sock = trio.socket.socket(_family(self.host), socket.SOCK_STREAM)
        try:
            _share(sock)
            await sock.bind((self.host, self.port))
            await sock.connect((host, port))
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)


class FreePort:
    """A port that nobody else gets while this is open; nobody listens at it."""

    def __init__(self, kind: str) -> None:
        """`kind`: `ip4` or `ip6`. Raises `OSError`."""
        host = "0.0.0.0" if kind == "ip4" else "::"
        self._socket = socket.socket(_family(host), socket.SOCK_STREAM)
        try:
            _share(self._socket)
            self._socket.bind((host, 0))
        except BaseException:
            self._socket.close()
            raise
        self.source = Source(host, self._socket.getsockname()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _share(sock: socket.socket | trio.socket.SocketType) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

"""A small HTTP/1.1 server: h11 for the protocol, trio for the sockets, one `App` for the answers.

Bounded in every direction: connections, bytes of a request, seconds for a request to arrive and for
a piece of a response to be taken in. Knows nothing of what is served. No TLS and no proxies' headers:
it is for this machine, or for standing behind a server that does those.
"""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import h11
import trio

from omnistore.errors import BadConfig, OmniError
from omnistore.http.message import App, Request, Response, error_response, text_response

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HTTPLimits:
    """What the server gives to strangers."""

    connections: int = 128
    """Open at once; the next one is answered 503."""
    head: int = 16 << 10
    """Bytes of request line and headers together."""
    body: int = 1 << 20
    """Bytes of a request's body."""
    arrival: float = 20.0
    """Seconds for a whole request to arrive once it began."""
    idle: float = 60.0
    """Seconds a connection may wait for its next request."""
    sending: float = 30.0
    """Seconds to take in one piece of a response: below 9 kB/s a client is not reading."""
    linger: float = 1.0
    """Seconds that a refused client has to read why."""
    piece: int = 256 << 10
    """Bytes handed to the socket under one deadline."""


LIMITS: Final = HTTPLimits()


def parse_address(text: str) -> tuple[str, int]:
    """Where to listen: `HOST:PORT`, `[IPV6]:PORT`, or a port of this machine alone. Raises `BadConfig`."""
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if (
        not re.fullmatch("[0-9]{1,5}", port)
        or int(port) > 65535
        or not re.fullmatch(r"[\w.:%-]*", host, re.ASCII)
    ):
        raise BadConfig(
            f"{text[:80]!r} is not an address to answer HTTP at",
            remedy="Give HOST:PORT, such as 0.0.0.0:8080, or just a port for this machine alone.",
        )
    return host or "127.0.0.1", int(port)


async def open_tcp(host: str, port: int) -> list[trio.SocketListener]:
    """Listen on a port of this machine; 0 takes a free one. Raises `BadConfig`."""
    try:
        return list(await trio.open_tcp_listeners(port, host=host))
    except (OSError, UnicodeError, OverflowError) as error:
        raise BadConfig(
            f"can not listen for HTTP on {host} port {port}: {error}",
            remedy="Choose another port, or an address of this machine.",
        ) from None


async def open_unix(path: Path) -> trio.SocketListener:
    """Listen on a Unix socket that only its owner can reach; takes over from a process that died.

    Raises `BadConfig` when another process listens there, or something else is in the way.
    """
    try:
        if await _answers(path):
            raise BadConfig(f"another process listens on {path}", remedy="Stop it first.")
        return trio.SocketListener(trio.socket.from_stdlib_socket(_bind_unix(path)))
    except OSError as error:
        raise BadConfig(f"can not listen on {path}: {error.strerror or error}") from None


async def _answers(path: Path) -> bool:
    try:
        stream = await trio.open_unix_socket(str(path))
    except OSError:
        return False
    await stream.aclose()
    return True


def _bind_unix(path: Path) -> socket.socket:
    """Microseconds of file system: not worth a thread."""
    if path.exists():
        if not path.is_socket():
            raise BadConfig(f"{path} is in the way: it is not a socket", remedy="Move it away.")
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
        sock.listen(64)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


async def serve_http(
    app: App,
    listeners: Sequence[trio.SocketListener],
    limits: HTTPLimits = LIMITS,
    *,
    task_status: Any = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests with `app`, until cancelled."""
    site = _Site(app, limits)
    await trio.serve_listeners(site.connection, list(listeners), task_status=task_status)


def addresses(listeners: Sequence[trio.SocketListener]) -> list[str]:
    """`host:port` of every TCP listener."""
    found = []
    for listener in listeners:
        host, port, *_ = listener.socket.getsockname()
        found.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    return found


class _Gone(Exception):
    """The other side left, or was too slow."""


@dataclass(slots=True, eq=False)
class _Site:
    app: App
    limits: HTTPLimits
    open: int = 0

    async def connection(self, stream: trio.SocketStream) -> None:
        """Serve one connection to its end."""
        self.open += 1
        connection = _Connection(stream, self.limits)
        try:
            if self.open > self.limits.connections:
                await connection.refuse(503, "too many connections; come back later")
                return
            while (request := await connection.receive()) is not None:
                await connection.send(request, await self._answer(request))
                if not connection.next():
                    return
        except _Gone as gone:
            _log.debug("an HTTP connection ended: %s", gone)
        finally:
            self.open -= 1
            with trio.move_on_after(1) as scope:
                scope.shield = True
                await stream.aclose()

    async def _answer(self, request: Request) -> Response:
        try:
            return await self.app(request)
        except OmniError as error:
            return error_response(error)
        except Exception:  # noqa: BLE001  # a bug in one route costs its request, not the node
            _log.exception("%s %s failed", request.method, request.path)
            return text_response("a bug in this server; its log says more", 500)


@dataclass(slots=True, eq=False)
class _Connection:
    stream: trio.SocketStream
    limits: HTTPLimits
    h11: h11.Connection = field(init=False)

    def __post_init__(self) -> None:
        self.h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=self.limits.head)

    def next(self) -> bool:
        """Make ready for another request; False when the connection ends here."""
        if self.h11.our_state is not h11.DONE or self.h11.their_state is not h11.DONE:
            return False
        self.h11.start_next_cycle()
        return True

    # --- what arrives -----------------------------------------------------------------------

    async def receive(self) -> Request | None:
        """The next request, whole; None when there is none."""
        try:
            with trio.fail_after(self.limits.idle) as scope:
                event = await self._event(scope)
                if not isinstance(event, h11.Request):
                    return None
                scope.deadline = trio.current_time() + self.limits.arrival
                body = await self._body()
            return _request_untrusted(event, body)
        except trio.TooSlowError:
            raise _Gone("it sent nothing") from None
        except h11.RemoteProtocolError as error:
            await self.refuse(error.error_status_hint, str(error))
        except ValueError as error:
            await self.refuse(400, str(error))
        return None

    async def _event(self, scope: trio.CancelScope | None = None) -> Any:
        while True:
            event = self.h11.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self.h11.they_are_waiting_for_100_continue:
                await self._write(self.h11.send(h11.InformationalResponse(status_code=100, headers=[])))
            try:
                data = await self.stream.receive_some(64 << 10)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise _Gone(str(error)) from None
            if scope is not None and data:
                # A request has begun: from here on it must hurry.
                scope.deadline = min(scope.deadline, trio.current_time() + self.limits.arrival)
            self.h11.receive_data(data)

    async def _body(self) -> bytes:
        taken = bytearray()
        while True:
            event = await self._event()
            if isinstance(event, h11.Data):
                taken += event.data
                if len(taken) > self.limits.body:
                    raise h11.RemoteProtocolError(f"a body of over {self.limits.body} bytes", 413)
            elif isinstance(event, h11.EndOfMessage):
                return bytes(taken)
            else:
                raise _Gone("it left in the middle of a request")

    # --- what leaves ------------------------------------------------------------------------

    async def send(self, request: Request, response: Response) -> None:
        """One response; its body only when it was asked for."""
        body = response.body
        whole = isinstance(body, bytes | memoryview)
        headers = [("Content-Type", response.content_type), *response.headers]
        if isinstance(body, bytes | memoryview) and response.status not in (204, 304):
            headers.append(("Content-Length", str(len(body))))
        if not whole and request.method == "HEAD":
            headers.append(("Transfer-Encoding", "chunked"))
        await self._write(self.h11.send(h11.Response(status_code=response.status, headers=headers)))
        try:
            if request.method != "HEAD" and response.status not in (204, 304):
                await self._send_body(body)
        finally:
            if not isinstance(body, bytes | memoryview):
                close = getattr(body, "aclose", None)
                if close is not None:
                    await close()
        await self._write(self.h11.send(h11.EndOfMessage()))

    async def _send_body(self, body: bytes | memoryview | AsyncIterator[bytes | memoryview]) -> None:
        if isinstance(body, bytes | memoryview):
            await self._send_data(body)
            return
        try:
            async for data in body:
                await self._send_data(data)
        except OmniError as error:
            # The status has left already: a body cut short is all that can be said.
            raise _Gone(f"its response broke off: {error}") from None

    async def _send_data(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), self.limits.piece):
            piece = bytes(view[start : start + self.limits.piece])
            await self._write(self.h11.send(h11.Data(data=piece)))

    async def refuse(self, status: int, text: str) -> None:
        """Say why there is no answer, if that can still be said, and end the connection."""
        if self.h11.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = text.encode() + b"\n"
            headers = [("Content-Length", str(len(body))), ("Connection", "close")]
            await self._write(self.h11.send(h11.Response(status_code=status, headers=headers)))
            await self._write(self.h11.send(h11.Data(data=body)))
            await self._write(self.h11.send(h11.EndOfMessage()))
            await self._linger()

    async def _linger(self) -> None:
        """Take in what is under way: closed with something unread, TCP would take our answer back."""
        with trio.move_on_after(self.limits.linger):
            try:
                await self.stream.send_eof()
                while await self.stream.receive_some(64 << 10):
                    pass
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise _Gone(str(error)) from None

    async def _write(self, data: bytes | memoryview | None) -> None:
        if not data:
            return
        try:
            with trio.fail_after(self.limits.sending):
                await self.stream.send_all(data)
        except trio.TooSlowError:
            raise _Gone("it takes nothing in") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise _Gone(str(error)) from None


def _request_untrusted(event: h11.Request, body: bytes) -> Request:
    """An h11 request as routes see it. Raises `ValueError`."""
    parts = urlsplit(event.target.decode("ascii"))
    path = unquote(parts.path, errors="strict")
    if not path.startswith("/"):
        raise ValueError("a request target that is no path")
    query: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True, max_num_fields=64):
        query.setdefault(name, value)
    headers: dict[str, str] = {}
    for raw_name, raw_value in event.headers:
        name, text = raw_name.decode("ascii"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {text}" if name in headers else text
    return Request(event.method.decode("ascii").upper(), path, query, headers, body)

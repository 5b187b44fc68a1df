"""The HTTP server over real sockets: what it answers, and what it refuses."""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from omnistore.errors import BadConfig, BlockMissing
from omnistore.http.message import Request, Response, json_response
from omnistore.http.server import HTTPLimits, addresses, open_tcp, open_unix, parse_address, serve_http

Talk = Callable[..., Awaitable[bytes]]


async def pieces() -> AsyncIterator[bytes]:
    yield b"one"
    yield b"two"


async def broken() -> AsyncIterator[bytes]:
    yield b"one"
    raise BlockMissing("gone meanwhile")


async def app(request: Request) -> Response:
    match request.path:
        case "/echo":
            return json_response(
                {"method": request.method, "query": dict(request.query), "body": request.body.decode()}
            )
        case "/stream":
            return Response(body=pieces())
        case "/broken":
            return Response(body=broken())
        case "/bug":
            raise RuntimeError("a bug in a route")
        case "/big":
            return Response(body=bytes(5 << 20))
    raise BlockMissing(f"{request.path} is not here", remedy="Look elsewhere.")


def serving(test: Callable[[Talk], Awaitable[None]], limits: HTTPLimits | None = None) -> None:
    async def main() -> None:
        listeners = await open_tcp("127.0.0.1", 0)
        host, _, port = addresses(listeners)[0].rpartition(":")

        async def talk(data: bytes, *, until: bytes | None = None) -> bytes:
            with trio.fail_after(10):
                stream = await trio.open_tcp_stream(host, int(port))
                async with stream:
                    await stream.send_all(data)
                    got = b""
                    while until is None or until not in got:
                        more = await stream.receive_some(1 << 20)
                        if not more:
                            break
                        got += more
                    return got

        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(serve_http, app, listeners, limits or HTTPLimits()))
            await test(talk)
            nursery.cancel_scope.cancel()

    trio.run(main)


def get(path: str, *headers: str, method: str = "GET", close: bool = True) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *headers, *(["Connection: close"] if close else [])]
    return "\r\n".join([*lines, "", ""]).encode()


def test_requests_and_their_answers() -> None:
    async def test(talk: Talk) -> None:
        got = await talk(get("/echo?a=1&b=%20x&a=2", "Content-Length: 2", method="POST") + b"hi")
        assert got.startswith(b"HTTP/1.1 200 ")
        assert got.endswith(b'{"method": "POST", "query": {"a": "1", "b": " x"}, "body": "hi"}\n')
        got = await talk(get("/nothing"))
        assert got.startswith(b"HTTP/1.1 404 ") and b"Look elsewhere." in got
        assert (await talk(get("/bug"))).startswith(b"HTTP/1.1 500 ")
        got = await talk(get("/stream"))
        assert b"Transfer-Encoding: chunked" in got and got.endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
        assert len(await talk(get("/big"))) > 5 << 20

    serving(test)


def test_two_requests_on_one_connection() -> None:
    async def test(talk: Talk) -> None:
        got = await talk(get("/echo", close=False) + get("/echo"))
        assert got.count(b"HTTP/1.1 200 ") == 2

    serving(test)


@pytest.mark.parametrize("path", ["/echo", "/stream"])
def test_head_has_no_body(path: str) -> None:
    async def test(talk: Talk) -> None:
        got = await talk(get(path, method="HEAD"))
        assert got.startswith(b"HTTP/1.1 200 ") and got.endswith(b"\r\n\r\n")

    serving(test)


def test_a_response_that_breaks_off_is_cut_short() -> None:
    async def test(talk: Talk) -> None:
        got = await talk(get("/broken"))
        assert got.endswith(b"3\r\none\r\n")

    serving(test)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (get("/echo", "X: " + "y" * 70_000), 431),
        (get("/echo", "Content-Length: 3000000", method="POST") + bytes(2_000_000), 413),
        (get("/%ff"), 400),
        (b"GET http://[/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (get("/echo?" + "&".join(f"a{n}=1" for n in range(100))), 400),
    ],
    ids=["no-http", "long-head", "large-body", "no-utf8", "no-url", "many-fields"],
)
def test_what_is_refused(request_: bytes, status: int) -> None:
    async def test(talk: Talk) -> None:
        got = await talk(request_, until=b"\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 %d " % status)

    serving(test)


def test_silence_ends_a_connection() -> None:
    async def test(talk: Talk) -> None:
        assert await talk(b"GET / HT") == b""
        assert await talk(b"") == b""

    serving(test, HTTPLimits(idle=0.2, arrival=0.1))


def test_connections_are_bounded() -> None:
    async def test(talk: Talk) -> None:
        assert (await talk(get("/echo"))).startswith(b"HTTP/1.1 503 ")

    serving(test, HTTPLimits(connections=0))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("8080", ("127.0.0.1", 8080)),
        (":0", ("127.0.0.1", 0)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:80", ("::1", 80)),
        ("my-host.lan:80", ("my-host.lan", 80)),
    ],
)
def test_where_to_listen(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:", "70000", "1:2:x", "http://x:80", "a b:80", "²"])
def test_where_not_to_listen(text: str) -> None:
    with pytest.raises(BadConfig, match="not an address"):
        parse_address(text)


def test_a_port_in_use_is_named() -> None:
    async def main() -> None:
        (listener,) = await open_tcp("127.0.0.1", 0)
        port = listener.socket.getsockname()[1]
        with pytest.raises(BadConfig, match=str(port)):
            await open_tcp("127.0.0.1", port)
        await listener.aclose()

    trio.run(main)


def test_a_unix_socket_is_the_owners_and_outlives_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "socket"

    async def main() -> None:
        listener = await open_unix(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(BadConfig, match="another process"):
            await open_unix(path)
        await listener.aclose()
        listener = await open_unix(path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(serve_http, app, [listener]))
            async with await trio.open_unix_socket(str(path)) as stream:
                await stream.send_all(get("/echo"))
                assert (await stream.receive_some(1 << 16)).startswith(b"HTTP/1.1 200 ")
            nursery.cancel_scope.cancel()
        path.unlink()
        path.write_text("something else")
        with pytest.raises(BadConfig, match="not a socket"):
            await open_unix(path)

    trio.run(main)

"""HTTP to addresses that strangers named goes to the public network only, whatever a name stands for."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from omnistore.transfer import outside
from omnistore.transfer.web import open_client
from tests.unit.transfer.web_server import WebServer, serving


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    (tmp_path / "x").write_bytes(b"GGUF")
    with serving(tmp_path) as server:
        yield server


def get(url: str, *, resolves: Callable[[str], list[str]] | None = None, public_only: bool = True) -> bytes:
    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
            assert resolves is not None
            name = host.decode() if isinstance(host, bytes) else host
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in resolves(name)]

        async def getnameinfo(self, *args: Any) -> Any:
            raise NotImplementedError

    async def main() -> bytes:
        if resolves is not None:
            trio.socket.set_custom_hostname_resolver(Resolver())
        async with open_client(public_only=public_only) as client:
            answer = await client.get(url, headers={"Range": "bytes=0-3"}, follow_redirects=True)
            return answer.content

    return trio.run(main)


def test_this_machine_is_not_the_public_network(web: WebServer) -> None:
    assert get(f"{web.url}/x", public_only=False) == b"GGUF"
    for url in (web.url, web.url.replace("127.0.0.1", "localhost"), web.url.replace("127.0.0.1", "127.1")):
        with pytest.raises(httpx.ConnectError, match="no public address"):
            get(f"{url}/x")
    assert len(web.requests) == 1


def test_what_a_name_stands_for_counts(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://model.example:{web.url.rpartition(':')[2]}/x"
    with pytest.raises(httpx.ConnectError, match="no public address"):
        get(url, resolves=lambda name: ["10.0.0.1", "127.0.0.1", "169.254.169.254"])
    assert not web.requests
    # Of several addresses only those that are public are tried: here, one that this test declares to be.
    monkeypatch.setattr(outside, "is_public_address", lambda address: address == "127.0.0.1")
    assert get(url, resolves=lambda name: ["127.0.0.2", "127.0.0.1"]) == b"GGUF"


def test_redirects_are_held_to_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "is_public_address", lambda address: address == "127.0.0.1")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"GGUF")
    with serving(tmp_path, "redirect") as web:
        assert get(f"{web.url}/x") == b"GGUF"
    with serving(tmp_path, host="127.0.0.3") as inside, serving(tmp_path, to=f"{inside.url}/real/x") as web:
        with pytest.raises(httpx.ConnectError, match="no public address"):
            get(f"{web.url}/x")
        assert web.requests and not inside.requests


def test_no_proxy_looks_names_up_for_us(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", web.url)
    monkeypatch.setenv("ALL_PROXY", web.url)
    with pytest.raises(httpx.ConnectError):
        get("http://10.0.0.1/x")
    assert not web.requests

"""HTTP to the public network only: for addresses that strangers named.

Whoever names a URL could mean a machine that only we reach: our own, a router, a cloud's metadata service. A
host's name is therefore looked up here, and only public addresses of it are connected to; the same goes
for every redirect, and no proxy is used, which would look names up by itself. Certificates are held
against the name as ever. Implements spec/05-transfer, section "Mirror hints".
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx
import trio

from omnistore.transfer.hints import is_public_address


class PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects to public addresses; any other is `httpcore.ConnectError`."""

    def __init__(self) -> None:
        self._inner: httpcore.AsyncNetworkBackend = httpcore.TrioBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        fault: httpcore.ConnectError = httpcore.ConnectError(f"{host} has no public address")
        for address in await _addresses(host, port):
            if not is_public_address(address):
                continue
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.ConnectError as error:
                fault = error
        raise fault

    async def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError("a socket of this machine is not the public network")

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


async def _addresses(host: str, port: int) -> list[str]:
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpcore.ConnectError(f"{host} can not be looked up: {error}") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class PublicTransport(httpx.AsyncHTTPTransport):
    """A transport of httpx over `PublicNetwork`."""

    def __init__(self, trust: ssl.SSLContext) -> None:
        """`trust`: whose certificates count."""
        super().__init__(verify=trust, trust_env=False)
        # httpx takes no network of ours; its pool does. `test_outside` fails where this stops to work.
        self._pool = httpcore.AsyncConnectionPool(ssl_context=trust, network_backend=PublicNetwork())

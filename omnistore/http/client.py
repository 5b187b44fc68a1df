"""Talks to the seed that runs on a home, over its socket; knows whether there is one.

A plain HTTP/1.1 client for one machine's own service: h11 on a Unix socket, one request at a time. Not
for servers elsewhere: those are `omnistore.transfer.web`'s.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h11
import trio

from omnistore.errors import PeerUnreachable
from omnistore.http.agreement import error_untrusted, socket_path

if TYPE_CHECKING:
    from omnistore.pinning import Document, PinRequest


async def running_seed(home: Path) -> LocalSeed | None:
    """The seed that runs on this home; None when none does."""
    path = socket_path(home)
    try:
        stream = await trio.open_unix_socket(str(path))
    except OSError:
        return None
    await stream.aclose()
    return LocalSeed(path)


async def ask_seed(home: Path, target: str) -> Any:
    """What the seed of this home answers at `target`. Raises `PeerUnreachable` when none runs."""
    seed = await running_seed(home)
    if seed is None:
        raise PeerUnreachable(f"no seed runs on {home}", remedy="Start one with `omni seed`.")
    return await seed.get(target)


class LocalSeed:
    """A seed that answered a moment ago."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def get(self, target: str) -> Any:
        """The JSON document at `target`."""
        return json.loads(await self.text(target))

    async def text(self, target: str) -> str:
        """What is at `target`."""
        async with aclosing(self._ask("GET", target, b"")) as lines:
            return b"\n".join([line async for line in lines]).decode()

    async def pin(self, request: PinRequest, tell: Callable[[Document], None]) -> None:
        """As `run_pin`, but in the seed, which stops when this is cancelled."""
        body = json.dumps(request.document()).encode()
        async with aclosing(self._ask("POST", "/v1/pin", body)) as lines:
            async for line in lines:
                if not line.strip():
                    continue
                event = json.loads(line)
                if event["event"] == "error":
                    raise error_untrusted(event)
                tell(event)
                if event["event"] == "done":
                    return
        raise PeerUnreachable(
            "the seed of this home went away", remedy="Run the same command again: it resumes by block."
        )

    async def _ask(self, method: str, target: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """The lines of an answer. Raises the error that an answer is."""
        connection = h11.Connection(h11.CLIENT)
        headers = [("Host", "local"), ("Content-Length", str(len(body))), ("Connection", "close")]
        asked = h11.Request(method=method, target=target, headers=headers)
        sent = [connection.send(event) or b"" for event in (asked, h11.Data(data=body), h11.EndOfMessage())]
        status, kept = 200, bytearray()
        try:
            async with await trio.open_unix_socket(str(self._path)) as stream:
                await stream.send_all(b"".join(sent))
                while True:
                    event = connection.next_event()
                    if event is h11.NEED_DATA:
                        connection.receive_data(await stream.receive_some(64 << 10))
                    elif isinstance(event, h11.Response):
                        status = event.status_code
                    elif isinstance(event, h11.Data):
                        kept += event.data
                        *lines, rest = kept.split(b"\n")
                        kept = bytearray(rest)
                        for line in lines:
                            if status != 200:
                                raise error_untrusted(json.loads(line))
                            yield bytes(line)
                    else:
                        break
        except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError) as error:
            raise PeerUnreachable(
                f"the seed of this home went away: {error}",
                remedy="Run the same command again: it resumes by block.",
            ) from None
        if kept:
            yield bytes(kept)

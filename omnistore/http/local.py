"""The API that a running seed offers to this machine's user, over a Unix socket in the home.

`GET /v1/status`, `/v1/peers`, `/v1/models`, `/metrics`; `POST /v1/pin` fetches a model and answers with
its events as JSON Lines, and stops when whoever asked goes away. Only the owner of the home can open the
socket; there is no other access control. Specified in spec/service/README.md.
"""

from __future__ import annotations

import json
import logging
import math
from types import MappingProxyType
from typing import Final

import trio

from omnistore.errors import InputError, OmniError, PeerUnreachable
from omnistore.http.agreement import error_document
from omnistore.http.daemon import Daemon
from omnistore.http.message import App, Request, Response, json_response
from omnistore.http.metrics import CONTENT_TYPE, render
from omnistore.http.process import give_memory_back
from omnistore.pinning import Document, PinRequest, request_untrusted, run_pin

_log = logging.getLogger(__name__)

LOCK: Final = "seed.lock"
"""In the home; held by the one seed that runs there."""
JSON_LINES: Final = "application/jsonl"
KEEP_ALIVE: Final = 1.0
"""Seconds without an event after which an empty line is sent: a client that left shows itself so."""
_METHODS: Final = MappingProxyType(
    {
        "/v1/status": "GET",
        "/v1/peers": "GET",
        "/v1/models": "GET",
        "/metrics": "GET",
        "/v1/pin": "POST",
    }
)


def local_app(daemon: Daemon) -> App:
    """The site of the socket."""

    async def answer(request: Request) -> Response:
        try:
            return await _answer(daemon, request)
        except OmniError as error:
            return json_response(error_document(error), error.http_status)

    return answer


async def _answer(daemon: Daemon, request: Request) -> Response:
    allowed = _METHODS.get(request.path)
    if allowed is None:
        return json_response({"error": f"nothing is at {request.path[:200]}"}, 404)
    if request.method != allowed and (request.method, allowed) != ("HEAD", "GET"):
        return json_response({"error": f"{request.path} takes {allowed}"}, 405, (("Allow", allowed),))
    match request.path:
        case "/v1/status":
            return json_response(await daemon.status())
        case "/v1/peers":
            return json_response(daemon.peers())
        case "/v1/models":
            return json_response(await daemon.models())
        case "/metrics":
            return await metrics_response(daemon)
    try:
        document = json.loads(request.body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}") from None
    return Response(200, PinEvents(daemon, request_untrusted(document)), JSON_LINES)


async def metrics_response(daemon: Daemon) -> Response:
    """What Prometheus scrapes."""
    return Response(200, render(await daemon.metrics()).encode(), CONTENT_TYPE)


def public_app(daemon: Daemon, gateway: App) -> App:
    """The site of the HTTP port: the gateway, and `/metrics`."""

    async def answer(request: Request) -> Response:
        if request.path == "/metrics" and request.method in ("GET", "HEAD"):
            return await metrics_response(daemon)
        return await gateway(request)

    return answer


class PinEvents:
    """The events of one pin as lines; it begins when the first is asked for, and ends with `aclose`."""

    def __init__(self, daemon: Daemon, request: PinRequest) -> None:
        self._daemon = daemon
        self._request = request
        # Without bound: five events a second, and a client that does not read is gone within a minute.
        self._send, self._receive = trio.open_memory_channel[Document](math.inf)
        self._scope = trio.CancelScope()
        self._begun = False

    def __aiter__(self) -> PinEvents:
        return self

    async def __anext__(self) -> bytes:
        if not self._begun:
            self._begun = True
            self._daemon.node.nursery.start_soon(self._run)
        event: Document | None = None
        try:
            with trio.move_on_after(KEEP_ALIVE):
                event = await self._receive.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None
        return b"\n" if event is None else json.dumps(event).encode() + b"\n"

    async def aclose(self) -> None:
        """End the pin, if it still runs."""
        self._scope.cancel()

    async def _run(self) -> None:
        counted, outcome = self._daemon.statistics, "cancelled"
        counted.pins_running += 1
        try:
            with self._scope, self._send:
                outcome = await self._pin()
        finally:
            counted.pins_running -= 1
            counted.pins[outcome] += 1
            give_memory_back()

    async def _pin(self) -> str:
        try:
            await self._join()
            await run_pin(self._daemon.site, self._request, self._tell)
        except OmniError as error:
            self._send.send_nowait(error_document(error))
            return "failed"
        except Exception as error:  # noqa: BLE001  # a bug in one pin costs that pin, not the seed
            _log.exception("a pin of %s failed", self._request.cid)
            self._send.send_nowait({"event": "error", "error": type(error).__name__, "message": str(error)})
            return "failed"
        return "done"

    async def _join(self) -> None:
        """Connect to the nodes that the request names; one of them is enough, as for `omni pin` alone."""
        request, failures = self._request, list[PeerUnreachable]()
        for addr in request.bootstrap:
            try:
                await self._daemon.node.network.connect(addr)
            except PeerUnreachable as error:
                failures.append(error)
        others = request.peers or request.mirrors or request.gateways
        if failures and len(failures) == len(request.bootstrap) and not others:
            raise failures[0]

    def _tell(self, event: Document) -> None:
        if event["event"] == "done":
            self._daemon.statistics.bytes_pinned += event["bytes_fetched"]
        self._send.send_nowait(event)

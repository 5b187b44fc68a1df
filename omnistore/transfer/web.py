"""Sources that are not ours: web servers that hold the files, and IPFS trustless gateways.

A source joins a fetch as one more untrusted peer (`bridge`): here is how what is asked of it becomes
HTTP requests, and every failure of one becomes one of two errors. Decides nothing about ranges and
URLs: `ranges` does. Implements spec/05-transfer, section "Web servers as sources".
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import httpx
import trio

from omnistore.block import MAX_BLOCK_SIZE
from omnistore.chunker.layout import Placement
from omnistore.cid import CID
from omnistore.errors import BadConfig, LocalProtocolError, PeerUnreachable, RemoteProtocolError
from omnistore.manifest import Manifest, Part
from omnistore.net.interface import Network, Provider, Stream, StreamServer
from omnistore.transfer.bridge import Delivery, Knowledge, Origin, OriginStream
from omnistore.transfer.hints import Mirror
from omnistore.transfer.outside import PublicTransport
from omnistore.transfer.ranges import (
    RANGE_MOST,
    Place,
    Range,
    Whereabouts,
    check_answer_untrusted,
    file_urls,
    retry_after_untrusted,
    shown_url,
)

_log = logging.getLogger(__name__)

CONNECTIONS: Final = 4
"""To one source at once: many servers limit each connection, few like more."""
GATEWAY_CONNECTIONS: Final = 8
"""A gateway is asked block by block: more requests under way hide its round trips."""
REDIRECTS: Final = 5
CONNECT_PATIENCE: Final = 10.0
READ_PATIENCE: Final = 20.0
"""Seconds without a byte; the session's own patience ends most stalls before."""
ASK_LATER: Final = 2.0
"""Seconds to leave a server alone that is overloaded and does not say for how long."""
PROBE: Final = "bafkqaaa"
"""The CID of nothing at all, which every trustless gateway has."""
SHORT: Final = 4 << 10
"""Bytes of an error's text that are worth reading for the sake of a connection."""
_LACKING: Final = frozenset({404, 410, 412, 451})
"""What a gateway says of a CID that it does not have, or may not give."""
_OVERLOADED: Final = frozenset({429, 503})
_BROKEN: Final = frozenset({408, 425, 500, 502, 504})
"""Statuses that say nothing about the file: worth another try."""


# --- trust ----------------------------------------------------------------------------------


def _trust() -> ssl.SSLContext:
    """Whose certificates count: of `SSL_CERT_FILE` or `SSL_CERT_DIR`, else the well-known authorities'.

    Raises `BadConfig` when the file named there is not one of certificates.
    """
    try:
        return httpx.create_ssl_context()
    except OSError as error:  # `ssl.SSLError` is one.
        named = os.environ.get("SSL_CERT_FILE", "")[:200]
        raise BadConfig(
            f"SSL_CERT_FILE is {named!r}, of which no certificates can be read: {error.strerror or error}",
            remedy="Name a file of certificates in PEM form, or unset it.",
        ) from None


@asynccontextmanager
async def open_client(*, public_only: bool = False) -> AsyncIterator[httpx.AsyncClient]:
    """A client, of the public network only or of whatever a person names. Raises `BadConfig`."""
    patience = httpx.Timeout(READ_PATIENCE, connect=CONNECT_PATIENCE, pool=None)
    # Encodings other than none would save nothing on weights, and could hide any number of bytes.
    headers = {"User-Agent": "omni", "Accept": "*/*", "Accept-Encoding": "identity"}
    trust = _trust()
    transport = PublicTransport(trust) if public_only else None
    async with httpx.AsyncClient(
        timeout=patience, headers=headers, verify=trust, transport=transport, trust_env=not public_only
    ) as client:
        yield client


def _check_trust(error: Exception) -> None:
    """Raise `RemoteProtocolError` for what TLS has against a server; httpx's own text may be empty."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise RemoteProtocolError(
                f"its certificate is not trusted: {cause.verify_message}. "
                "If you trust who issued it, name a file with that authority's certificate in SSL_CERT_FILE"
            ) from None
        if isinstance(cause, ssl.SSLError) and cause.reason == "WRONG_VERSION_NUMBER":
            raise RemoteProtocolError("does not speak TLS there: is it an http:// address?") from None
        cause = cause.__cause__ or cause.__context__


# --- the two kinds --------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Web:
    """What both kinds do: requests whose every failure is one of two errors."""

    url: str
    peer: str
    client: httpx.AsyncClient
    where: Whereabouts
    connections: int
    not_before: float = 0.0

    @asynccontextmanager
    async def get(self, url: str, headers: Mapping[str, str]) -> AsyncIterator[httpx.Response]:
        """The answer to a GET, redirects followed, body not read.

        Raises `PeerUnreachable` for what may be over soon, `RemoteProtocolError` for what will not be.
        """
        try:
            response = await self._send(self.client.build_request("GET", url, headers=headers))
            try:
                self._check_status(response)
                yield response
            finally:
                await response.aclose()
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise RemoteProtocolError(f"its address leads nowhere: {error}") from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            _check_trust(error)
            raise PeerUnreachable(f"{self.peer}: {str(error) or type(error).__name__}") from None

    async def _send(self, request: httpx.Request) -> httpx.Response:
        secure = request.url.scheme == "https"
        for _ in range(REDIRECTS + 1):
            response = await self.client.send(request, stream=True)
            if not response.has_redirect_location:
                return response
            await response.aclose()
            following = response.next_request
            if following is None or following.url.scheme not in ("http", "https"):
                raise RemoteProtocolError("redirects to something that is no web server")
            if secure and following.url.scheme != "https":
                raise RemoteProtocolError("redirects from https to http")
            request = following
        raise RemoteProtocolError(f"redirects more than {REDIRECTS} times")

    def _check_status(self, response: httpx.Response) -> None:
        status = response.status_code
        if status in _OVERLOADED:
            wait = retry_after_untrusted(response.headers.get("retry-after"), time.time(), ASK_LATER)
            self.not_before = trio.current_time() + wait
            # It is asked again, by fewer at once.
            self.connections = max(1, self.connections // 2)
            raise PeerUnreachable(f"{self.peer} answered {status} and is left alone for {wait:.0f} s")
        if status in _BROKEN:
            raise PeerUnreachable(f"{self.peer} answered {status}")


@dataclass(slots=True, eq=False)
class WebFiles(_Web):
    """A server that has the model's files."""

    urls: Sequence[str | None] = ()
    """Where each file is."""

    def place(self, cid: CID) -> Place | None:
        place = self.where.places.get(cid)
        return place if place is not None and self.urls[place.file] else None

    def bitmap(self, part: CID) -> bytes | None:
        links = self.where.links.get(part)
        if links is None or not (self.where.resolved or links[0] in self.where.places):
            return None
        return _mask(tuple(self.place(cid) is not None for cid in links))

    def most(self, queued: int) -> int:
        # What is queued is spread over the connections.
        return min(RANGE_MOST, max(1, queued // self.connections))

    async def probe(self) -> None:
        """Ask for the magic number of the first file that it has."""
        for number, url in enumerate(self.urls):
            if url is not None:
                async with self.range(url, Range(number, 0, 3, ())) as response:
                    async for data in response.aiter_raw(4):
                        if data and not b"GGUF".startswith(data[:4]):
                            raise RemoteProtocolError("has something else there than a GGUF file")
                        return
                raise PeerUnreachable(f"{self.peer} sent nothing")

    @asynccontextmanager
    async def range(self, url: str, job: Range) -> AsyncIterator[httpx.Response]:
        """The answer to a request of one range, found to be about it; body not read. Raises as `get`."""
        headers = {"Range": f"bytes={job.first}-{job.last}"}
        async with self.get(url, headers) as response:
            size = self.where.files[job.file].size
            check_answer_untrusted(response.status_code, response.headers, job, size)
            yield response

    async def take(self, job: Range, cids: Mapping[int, CID], stream: OriginStream) -> None:
        url = self.urls[job.file]
        if url is None:
            raise LocalProtocolError(f"{self.peer} was asked for file {job.file}, which it does not have")
        reading = _Reading(job, stream)
        while not reading.done():
            before = reading.at
            try:
                async with self.range(url, reading.rest()) as response:
                    async for data in response.aiter_raw():
                        await reading.feed(data)
                        if reading.done() and response.status_code == 200:
                            return  # The rest of the file follows: it is not read.
                        if reading.excess:
                            raise RemoteProtocolError("sent more than the range it was asked for")
                # A body read to its end leaves the connection for the next request.
                if reading.done():
                    return
                raise PeerUnreachable(f"{self.peer} ended at byte {reading.at}, before {job.last}")
            except PeerUnreachable:
                # A connection that was cut after some bytes is taken up where it ended.
                if reading.at == before:
                    raise


@dataclass(slots=True)
class _Reading:
    """The blocks of one range, from its bytes."""

    job: Range
    stream: OriginStream
    at: int = field(init=False)
    """Offset of the next byte in the file."""
    number: int = 0
    """Of the block being read."""
    delivery: Delivery | None = None
    excess: bool = False
    """Bytes came after the last of the range."""

    def __post_init__(self) -> None:
        self.at = self.job.first

    def done(self) -> bool:
        return self.number == len(self.job.asks)

    def rest(self) -> Range:
        """What was not read yet."""
        return Range(self.job.file, self.at, self.job.last, self.job.asks[self.number :])

    async def feed(self, data: bytes) -> None:
        """Take in what follows."""
        view = memoryview(data)
        while view and not self.done():
            ask, place = self.job.asks[self.number]
            skipped = min(len(view), max(0, place.offset - self.at)) if self.delivery is None else 0
            self.at, view = self.at + skipped, view[skipped:]
            if not view:
                return
            if self.delivery is None:
                self.delivery = self.stream.begin(ask, place.size)
            taken = bytes(view[: self.delivery.lacking])
            await self.stream.deliver(self.delivery, taken)
            self.at, view = self.at + len(taken), view[len(taken) :]
            if not self.delivery.lacking:
                self.delivery = None
                self.number += 1
        self.excess = bool(view)


async def _drain(response: httpx.Response) -> None:
    """Take in a short body, so that its connection can be used again."""
    taken = 0
    async for piece in response.aiter_raw():
        taken += len(piece)
        if taken > SHORT:
            return


@dataclass(slots=True, eq=False)
class Gateway(_Web):
    """An IPFS trustless gateway."""

    def place(self, cid: CID) -> Place | None:
        return Place(0, 0, 1)  # Never beside another: each block is a request of its own.

    def bitmap(self, part: CID) -> bytes | None:
        links = self.where.links.get(part)
        return None if links is None else _mask((True,) * len(links))

    def most(self, queued: int) -> int:
        return 0

    async def probe(self) -> None:
        async with self.get(self._url_of(PROBE), {}):
            return

    def _url_of(self, cid: CID | str) -> str:
        return f"{self.url.rstrip('/')}/ipfs/{cid}?format=raw"

    async def take(self, job: Range, cids: Mapping[int, CID], stream: OriginStream) -> None:
        for ask, _ in job.asks:
            accept = {"Accept": "application/vnd.ipld.raw"}
            async with self.get(self._url_of(cids[ask]), accept) as response:
                if response.status_code in _LACKING:
                    await _drain(response)
                    stream.lack(ask)
                    continue
                if response.status_code != 200:
                    raise RemoteProtocolError(f"answered {response.status_code} when asked for a raw block")
                data = bytearray()
                async for piece in response.aiter_raw():
                    data += piece
                    if len(data) > MAX_BLOCK_SIZE:
                        raise RemoteProtocolError(f"sends more than {MAX_BLOCK_SIZE} bytes for a block")
            if not data:
                raise RemoteProtocolError("sent an empty block")
            await stream.deliver(stream.begin(ask, len(data)), bytes(data))


def _mask(held: Sequence[bool]) -> bytes | None:
    mask = sum(1 << index for index, one in enumerate(held) if one)
    return mask.to_bytes(-(-len(held) // 8), "little") or None


# --- a fetch's sources ----------------------------------------------------------------------


class WebSources:
    """The sources of one fetch, and the network that they and the peers make together.

    `run` it in a nursery. Gateways can be asked from the start; mirrors only once `learn` said what the
    model's files are.
    """

    def __init__(self, network: Network, mirrors: Sequence[str], gateways: Sequence[str]) -> None:
        """`mirrors` and `gateways` are URLs that `ranges.check_url` let through."""
        self.where = Whereabouts()
        self._network = network
        self._mirrors = _named(mirrors, "")
        self._gateways = _named(gateways, " (gateway)")
        self._hinted: dict[str, Mirror] = {}
        """Mirrors that peers named."""
        self._sources: dict[str, Origin] = {}
        self._knowledge = Knowledge()
        self._ready = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._client: httpx.AsyncClient | None = None
        self._public: httpx.AsyncClient | None = None
        """For what strangers named."""

    @property
    def gateways(self) -> list[Provider]:
        """The gateways, as candidates."""
        return [Provider(peer) for peer in self._gateways]

    @property
    def mirrors(self) -> list[Provider]:
        """The servers that have the files, as candidates."""
        return [Provider(peer) for peer in self._mirrors]

    async def run(self) -> None:
        """Keep the connections, until cancelled. Raises `BadConfig` when `SSL_CERT_FILE` is of no use."""
        async with (
            open_client() as self._client,
            open_client(public_only=True) as self._public,
            trio.open_nursery() as self._nursery,
        ):
            self._ready.set()
            await trio.sleep_forever()

    def learn(self, manifest: Manifest, parts: Mapping[CID, Part]) -> None:
        """Take in what the model consists of; `parts` by CID. Raises `BadConfig` for a URL of no file."""
        self.where.files = manifest.files
        for ref, part in parts.items():
            self.where.learn_part(ref, part)
        for url in self._mirrors.values():
            file_urls(url, [entry.name for entry in manifest.files])
        # Parts are asked about as soon as they are named, and a gateway has them once their links are known.
        self._knowledge.grew()

    def has(self, peer: str) -> bool:
        """Whether a name among the peers is one of these sources."""
        return peer in self._mirrors or peer in self._gateways or peer in self._hinted

    def hinted(self, mirror: Mirror) -> Provider:
        """A server that peers named, as a candidate; for after `learn`."""
        peer = f"{mirror.url} (named by a peer)"
        self._hinted[peer] = mirror
        return Provider(peer)

    def resolve(self, placements: Sequence[Placement]) -> None:
        """Take in where every block lies."""
        self.where.resolve(placements)
        self._knowledge.grew(resolved=True)

    # --- the network ------------------------------------------------------------------------

    @property
    def peer_id(self) -> str:
        return self._network.peer_id

    def addrs(self) -> Sequence[str]:
        return self._network.addrs()

    async def connect(self, addr: str) -> str:
        return await self._network.connect(addr)

    def serve(self, protocol: str, server: StreamServer) -> None:
        self._network.serve(protocol, server)

    async def open_stream(self, provider: Provider, protocol: str) -> Stream:
        """A stream to a source, once it takes requests again; or to a peer."""
        if not self.has(provider.peer):
            return await self._network.open_stream(provider, protocol)
        await self._ready.wait()
        source = self._source(provider.peer)
        await trio.sleep_until(max(source.not_before, trio.current_time()))
        stream = OriginStream(source, self._knowledge)
        if self._nursery is None:
            raise LocalProtocolError("a source was asked before it was run")
        self._nursery.start_soon(stream.run)
        return stream

    def _source(self, peer: str) -> Origin:
        """One source, kept over its streams: it remembers when it may be asked again."""
        found = self._sources.get(peer)
        if found is None:
            if self._client is None or self._public is None:
                raise LocalProtocolError("a source was asked before it was run")
            if peer in self._hinted:
                mirror = self._hinted[peer]
                found = WebFiles(mirror.url, peer, self._public, self.where, CONNECTIONS, urls=mirror.urls)
            elif peer in self._gateways:
                found = Gateway(self._gateways[peer], peer, self._client, self.where, GATEWAY_CONNECTIONS)
            else:
                url = self._mirrors[peer]
                urls = file_urls(url, [entry.name for entry in self.where.files])
                found = WebFiles(url, peer, self._client, self.where, CONNECTIONS, urls=urls)
            self._sources[peer] = found
        return found


def _named(urls: Sequence[str], suffix: str) -> dict[str, str]:
    """URLs by the names that their sources have among the peers; two that look alike get numbers."""
    found: dict[str, str] = {}
    for url in dict.fromkeys(urls):
        name = shown_url(url) + suffix
        count = sum(shown_url(other) == shown_url(url) for other in found.values())
        found[f"{name} #{count + 1}" if count else name] = url
    return found

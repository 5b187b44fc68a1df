"""The trustless gateway: held blocks and nodes over HTTP, for IPFS programs and for our own `--gateway`.

`/ipfs/CID` as one raw block, or as a CAR of everything under it. Whoever asks verifies; nothing is
interpreted here, no path below a CID is resolved, nothing is fetched on anybody's behalf and nothing
can be written. Implements spec/05-transfer, section "The trustless gateway", a subset of the IPFS
Trustless Gateway specification.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import trio

from omnistore import dagcbor, varint
from omnistore.block import Block
from omnistore.cid import CID, DAG_CBOR
from omnistore.errors import BlockMissing, InputError
from omnistore.http.message import App, Headers, Request, Response, text_response
from omnistore.manifest import MAX_NODE_SIZE
from omnistore.store.interface import Store
from omnistore.transfer.pacing import Pacer

RAW_TYPE: Final = "application/vnd.ipld.raw"
CAR_TYPE: Final = "application/vnd.ipld.car"
NOTHING: Final = "bafkqaaa"
"""The CID of no bytes at all (multihash `identity`): clients ask for it to see whether this is a gateway."""
READERS: Final = 2
"""Threads that read and hash for all requests together: one core's worth each."""
CAR_STREAMS: Final = 16
"""CARs under way at once; each may last as long as a model takes."""
CAR_MOST: Final = 1 << 20
"""Blocks in one CAR: a terabyte."""
BATCH: Final = 4
"""Blocks of a CAR read in one hop to a thread."""
LINE: Final = "http"
"""All HTTP clients together have one peer's place where an upload cap makes them wait."""
PREFIX: Final = "/ipfs/"

Scope: TypeAlias = Literal["all", "entity", "block"]
_FOREVER: Final = ("Cache-Control", "public, max-age=29030400, immutable")
_COMMON: Final = (
    ("X-Content-Type-Options", "nosniff"),
    ("Access-Control-Allow-Origin", "*"),
    ("Vary", "Accept"),
)


def gateway(store: Store, pacer: Pacer) -> App:
    """The site that serves what `store` holds, within the cap that `pacer` keeps."""
    return _Gateway(store, pacer).answer


@dataclass(slots=True, eq=False)
class _Gateway:
    store: Store
    pacer: Pacer
    threads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(READERS))
    cars: int = 0
    """Under way."""

    async def answer(self, request: Request) -> Response:
        """One request."""
        if request.method not in ("GET", "HEAD"):
            return text_response("only GET and HEAD", 405, (("Allow", "GET, HEAD"),))
        if not request.path.startswith(PREFIX):
            return text_response(f"nothing here; ask for {PREFIX}CID", 404)
        name = request.path.removeprefix(PREFIX).removesuffix("/")
        wanted = chosen_format(request)
        if wanted is None:
            return text_response(f"a trustless gateway: ask for {RAW_TYPE} or {CAR_TYPE}", 406)
        if name == NOTHING and wanted == "raw":
            return Response(200, b"", RAW_TYPE, _headers(name, "raw", strong=True))
        cid = CID.parse_untrusted(name)
        headers = _headers(str(cid), wanted, strong=wanted == "raw")
        if _is_known(request, dict(headers)["Etag"]):
            return Response(304, b"", headers=headers)
        if wanted == "raw":
            block = await trio.to_thread.run_sync(self.store.read, cid, limiter=self.threads)
            if request.method == "GET":
                await self.pacer.passes(LINE, len(block))
            return Response(200, block.data, RAW_TYPE, headers)
        return await self._car(cid, _scope(request), headers)

    async def _car(self, cid: CID, scope: Scope, headers: Headers) -> Response:
        if self.cars >= CAR_STREAMS:
            return text_response("too many CARs under way", 503, (("Retry-After", "5"),))
        # Planned whole before the first byte: what lacks a block is a 404, not a stream that breaks off.
        order = await trio.to_thread.run_sync(car_order, self.store, cid, scope, limiter=self.threads)
        kind = f"{CAR_TYPE}; version=1; order=dfs; dups=n"
        return Response(200, self._stream(cid, order), kind, headers)

    async def _stream(self, root: CID, order: Sequence[CID]) -> AsyncIterator[bytes | memoryview]:
        self.cars += 1
        try:
            yield car_header(root)
            for start in range(0, len(order), BATCH):
                batch = order[start : start + BATCH]
                blocks = await trio.to_thread.run_sync(self._read, batch, limiter=self.threads)
                for block in blocks:
                    await self.pacer.passes(LINE, len(block))
                    yield section_head(block)
                    yield block.data
        finally:
            self.cars -= 1

    def _read(self, cids: Sequence[CID]) -> list[Block]:
        return [self.store.read(cid) for cid in cids]


# --- what is asked for ----------------------------------------------------------------------


def chosen_format(request: Request) -> Literal["raw", "car"] | None:
    """The format that a request asks for: the query's word, else the first type that we have."""
    asked = request.query.get("format")
    if asked is not None:
        return "raw" if asked == "raw" else "car" if asked == "car" else None
    for entry in request.headers.get("accept", "").split(","):
        kind, *options = (word.strip().lower() for word in entry.split(";"))
        if kind == RAW_TYPE:
            return "raw"
        if kind == CAR_TYPE and not {word for word in options if word.startswith("version=")} - {"version=1"}:
            return "car"
    return None


def _scope(request: Request) -> Scope:
    match request.query.get("dag-scope", "all"):
        case "all":
            return "all"
        case "entity":
            return "entity"
        case "block":
            return "block"
        case other:
            raise InputError(f"dag-scope={other[:40]!r} is none of all, entity and block")


def _headers(name: str, kind: str, *, strong: bool) -> Headers:
    # A CAR's ETag is weak: another version of this program may order its blocks otherwise.
    etag = f'"{name}.{kind}"' if strong else f'W/"{name}.{kind}"'
    suffix = "bin" if kind == "raw" else kind
    return (
        ("Etag", etag),
        _FOREVER,
        ("Content-Disposition", f'attachment; filename="{name}.{suffix}"'),
        ("X-Ipfs-Path", f"{PREFIX}{name}"),
        ("X-Ipfs-Roots", name),
        *_COMMON,
    )


def _is_known(request: Request, etag: str) -> bool:
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    return etag.removeprefix("W/") in known or "*" in known


# --- CARs -----------------------------------------------------------------------------------


def car_order(store: Store, root: CID, scope: Scope) -> list[CID]:
    """The blocks of a CAR, depth first, each once. Raises `BlockMissing` unless all are held."""
    if scope != "all":
        # Neither a node of ours nor a raw block is more than one block to whoever reads it as an entity.
        store.read(root)
        return [root]
    found: dict[CID, None] = {}
    stack = [root]
    while stack:
        cid = stack.pop()
        if cid in found:
            continue
        found[cid] = None
        if len(found) > CAR_MOST:
            raise InputError(f"more than {CAR_MOST} blocks under {root}", remedy="Ask for its parts.")
        if cid.codec == DAG_CBOR:
            node = dagcbor.decode_untrusted(bytes(store.read(cid).data), limit=MAX_NODE_SIZE)
            stack.extend(reversed(list(_links(node))))
    lacking = len(found.keys() - store.held(found))
    if lacking:
        raise BlockMissing(f"{lacking} of the {len(found)} blocks under {root} are not held here")
    return list(found)


def _links(value: dagcbor.Value) -> Iterator[CID]:
    if isinstance(value, CID):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _links(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _links(inner)


def car_header(root: CID) -> bytes:
    """The beginning of a CARv1."""
    header = dagcbor.encode({"roots": [root], "version": 1})
    return varint.encode(len(header)) + header


def section_head(block: Block) -> bytes:
    """What precedes a block's bytes in a CARv1."""
    return varint.encode(len(block.cid.binary) + len(block)) + block.cid.binary

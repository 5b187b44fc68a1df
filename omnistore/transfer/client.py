"""Fetching a model: from a CID to verified files.

Walks signed manifest, manifest, part nodes and headers, each verified before the next is asked
for; then opens the store's assembly and has the missing blocks written to it. What is held already
is not asked for. Which peer sends which block is `session`'s to decide, streams are `swarm`'s.
Implements spec/05-transfer, section "Fetching a model".
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from omnistore.block import Block
from omnistore.chunker import gguf
from omnistore.chunker.layout import Placement, resolve_untrusted
from omnistore.cid import CID
from omnistore.errors import (
    BadConfig,
    BlockMissing,
    IntegrityError,
    LocalProtocolError,
    MalformedManifest,
    NetworkError,
    NoProviders,
    OmniError,
    PeerUnreachable,
    StoreError,
    UnknownSigner,
)
from omnistore.keys import PublicKey
from omnistore.manifest import (
    HeaderPart,
    Manifest,
    Part,
    PartKey,
    PartRef,
    SignedManifest,
    manifest_untrusted,
    open_untrusted,
    part_untrusted,
)
from omnistore.net.interface import ContentRouting, Network, Provider, Stream, StreamServer
from omnistore.store.interface import Assembly, Model, Store
from omnistore.store.models import by_file
from omnistore.transfer.demand import Wanted
from omnistore.transfer.events import WantsAdded
from omnistore.transfer.hinting import Hinting, advised
from omnistore.transfer.hints import Hint
from omnistore.transfer.rate import TokenBucket
from omnistore.transfer.session import Session
from omnistore.transfer.swarm import Swarm, Tally
from omnistore.transfer.window import LIMITS, SessionLimits

if TYPE_CHECKING:
    from omnistore.transfer.web import WebSources

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

NODE_ESTIMATE: Final = 64 << 10
"""Bytes assumed of a node before it arrives; a layer of a 70B model takes 25 KiB."""
MAX_HEADER_BYTES: Final = 512 << 20
"""Header bytes of all files of one model, held in memory until its assembly is open."""
DISCOVERY_SOON: Final = 3.0
"""Seconds between look-ups while something wanted is held by nobody joined."""
DISCOVERY_LATER: Final = 30.0
"""Seconds between look-ups while all is well, at most: newcomers make a fetch faster, not possible."""
DISCOVERY_PARTS: Final = 4
"""Parts looked up in one round, beside the model itself."""


def every_part(manifest: Manifest) -> frozenset[PartKey]:
    """Select the whole model."""
    return frozenset(ref.key for ref in manifest.parts)


def no_part(manifest: Manifest) -> frozenset[PartKey]:
    """Select nothing."""
    return frozenset()


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """What to fetch, and from whom."""

    select: Callable[[Manifest], Collection[PartKey]] = every_part
    """Which parts; the headers are fetched in any case. May raise `InputError`."""
    peers: Sequence[str] = ()
    """Multiaddrs ending in `/p2p/…` to ask; discovery goes on beside them when there is a routing."""
    output: Path | None = None
    """As `Assembly.finish` takes it."""
    limits: SessionLimits = LIMITS
    urgent: Callable[[Manifest], Collection[PartKey]] = no_part
    """Which of these parts are to come before all others."""
    download: TokenBucket | None = None
    """The node's cap on what is fetched, if it has one; all its fetches share it."""
    mirrors: Sequence[str] = ()
    """URLs of web servers that have the model's files; they can not tell what the model is."""
    gateways: Sequence[str] = ()
    """URLs of IPFS trustless gateways."""
    signer: str | None = None
    """Peer ID of the one publisher whose signature is accepted; None for whoever."""
    hints: bool = False
    """Whether mirrors are asked that peers name. If not, they are only reported."""


@dataclass(frozen=True, slots=True)
class FileProgress:
    """How far one file of the model is, in bytes of the selected parts."""

    name: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """How far a fetch is."""

    model: str
    done: int
    """Bytes of the selected parts that are held."""
    total: int
    """Bytes of the selected parts; 0 until the part nodes are known."""
    peers: int
    """Joined now."""
    bytes_fetched: int
    by_peer: Mapping[str, int] = field(default_factory=dict)
    """Verified payload bytes by sender."""
    files: Sequence[FileProgress] = ()
    """In the manifest's order; without those of which nothing is wanted."""


@dataclass(frozen=True, slots=True)
class FetchReport:
    """What a fetch did."""

    model: Model
    paths: tuple[Path, ...]
    bytes_fetched: int
    """Verified payload of raw blocks; nodes not counted."""
    blocks_fetched: int
    blocks_local: int
    """Distinct blocks that were held before."""
    node_bytes: int
    duplicate_bytes: int
    peers: Mapping[str, int]
    """Verified payload bytes by sender."""
    dropped: Mapping[str, str]
    """Peers dropped, and why."""
    seconds: float
    mirrors: tuple[Hint, ...] = ()
    """What peers named, whether it was asked or not."""


class Offline:
    """The network of a fetch that needs none: everything is held already."""

    peer_id = ""

    def addrs(self) -> Sequence[str]:
        return ()

    async def connect(self, addr: str) -> str:
        raise PeerUnreachable(f"{addr}: there is no network")

    async def open_stream(self, provider: Provider, protocol: str) -> Stream:
        raise PeerUnreachable(f"{provider.peer}: there is no network")

    def serve(self, protocol: str, server: StreamServer) -> None:
        """Nobody will call."""


async def fetch_model(
    network: Network,
    routing: ContentRouting | None,
    store: Store,
    cid: CID,
    options: FetchOptions | None = None,
    progress: Callable[[FetchProgress], None] = lambda progress: None,
) -> FetchReport:
    """Have the selected parts of the model `cid` in `store`, and its files if it is whole.

    Raises `NoProviders`, `FetchTimedOut`, `TrustError`, `StoreError` or `InputError`. Interrupted at any
    point, the next call asks only for what was not yet written.
    """
    options = options or FetchOptions()
    session = Session(random.random, options.limits, options.download)
    web = _web_sources(network, options)
    # Mirrors are asked only when the model is known: until then there is more to come.
    swarm = Swarm(web or network, session, finite=routing is None and not options.mirrors)
    for provider in [provider_at(addr) for addr in options.peers] + (web.gateways if web else []):
        swarm.add(provider)
    hinting = Hinting(network, cid, swarm, web if options.hints else None)
    fetch = _Fetch(
        swarm, store, cid, options, progress, web, hinting, discovers=routing is not None, names=[cid]
    )
    failure: OmniError | None = None
    report: FetchReport | None = None
    # A nursery would wrap what its body raises into a group: callers get the plain error instead.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(swarm.run)
        if web is not None:
            nursery.start_soon(web.run)
        if routing is not None:
            nursery.start_soon(_discover, swarm, routing, fetch.names)
        nursery.start_soon(hinting.run)
        try:
            report = await fetch.run()
        except OmniError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if report is None:
        raise advised(failure, hinting.hints()) or LocalProtocolError("a fetch ended without a result")
    return report


def _web_sources(network: Network, options: FetchOptions) -> WebSources | None:
    if not (options.mirrors or options.gateways or options.hints):
        return None
    # An HTTP client takes a tenth of a second to import: only for those who need it.
    from omnistore.transfer.web import WebSources

    return WebSources(network, options.mirrors, options.gateways)


def provider_at(addr: str) -> Provider:
    """The peer that a multiaddr ending in `/p2p/…` names. Raises `BadConfig`."""
    where, found, peer = addr.rpartition("/p2p/")
    if not found or not peer or "/" in peer:
        raise BadConfig(
            f"{addr!r} does not say which peer to expect there",
            remedy="A peer's address ends in /p2p/ and its ID; `omni seed` prints it.",
        )
    # Nothing but the ID: a peer that is connected already.
    return Provider(peer, (where,) if where else ())


async def _discover(swarm: Swarm, routing: ContentRouting, names: Sequence[CID]) -> None:
    """Look for newcomers: by the model's CIDs, and by the parts that nobody joined holds."""
    pause = DISCOVERY_SOON
    while True:
        lacking = swarm.session.unheld()
        for cid in (*names, *lacking[:DISCOVERY_PARTS]):
            try:
                for provider in await routing.find_providers(cid, skip=swarm.settled()):
                    swarm.add(provider)
            except NetworkError as error:
                _log.info("looking for providers of %s: %s", cid, error)
        # Ever more rarely while all is well: those who came when we did announce themselves only by and by.
        pause = DISCOVERY_SOON if lacking or not swarm.peers else min(2 * pause, DISCOVERY_LATER)
        await trio.sleep(pause)


@dataclass(slots=True)
class _Fetch:
    """One fetch, step by step."""

    swarm: Swarm
    store: Store
    cid: CID
    options: FetchOptions
    progress: Callable[[FetchProgress], None]
    web: WebSources | None
    hinting: Hinting
    discovers: bool
    """Whether more peers may be found."""
    threads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(2))
    nodes: dict[CID, Block] = field(default_factory=dict)
    """Every node of the model, until its assembly is open."""
    links: dict[CID, tuple[Wanted, ...]] = field(default_factory=dict)
    """The blocks of each part, by its node."""
    names: list[CID] = field(default_factory=list)
    """CIDs that the model's providers announce: the one asked for, then the manifest's."""

    async def run(self) -> FetchReport:
        """Fetch everything; the report."""
        started = trio.current_time()
        manifest, manifest_cid, publisher = await self._manifest()
        _check_signer(self.cid, publisher, self.options.signer)
        if manifest_cid not in self.names:
            self.names.append(manifest_cid)
        chosen = set(self.options.select(manifest))
        refs = [ref for ref in manifest.parts if ref.key in chosen or ref.key.kind == "header"]
        parts = await self._parts(manifest, refs)
        headers, blocks = await self._headers(manifest, parts)
        placements = await self._thread(partial(resolve_untrusted, manifest, parts, headers))
        if self.web is not None:
            self.web.resolve(placements)
        model = Model(self.cid, manifest_cid, manifest, publisher, parts)
        assembly = await self._thread(partial(self._assemble, model, placements))
        try:
            await self._thread(partial(_write_held, assembly, blocks))
            blocks.clear()
            missing = await self._thread(assembly.missing)
            await self._blocks(model, placements, missing, assembly)
            paths = await self._thread(partial(assembly.finish, self.options.output))
            local = assembly.local_blocks
        finally:
            assembly.close()
        return self._report(model, tuple(paths), local, trio.current_time() - started)

    def _assemble(self, model: Model, placements: Sequence[Placement]) -> Assembly:
        """Open the assembly, in a thread."""
        try:
            return self.store.assemble(model, placements, list(model.parts))
        except BlockMissing:
            # Held since before this fetch, by a model without pins that was swept or evicted just now.
            for block in self.nodes.values():
                self.store.put_node(block)
            return self.store.assemble(model, placements, list(model.parts))
        finally:
            self.nodes.clear()

    def _report(self, model: Model, paths: tuple[Path, ...], local: int, seconds: float) -> FetchReport:
        tally: Tally = self.swarm.tally
        return FetchReport(
            model=model,
            paths=paths,
            bytes_fetched=tally.bytes,
            blocks_fetched=tally.blocks,
            blocks_local=local,
            node_bytes=tally.node_bytes,
            duplicate_bytes=self.swarm.session.duplicate_bytes,
            peers=dict(tally.peers),
            dropped=dict(tally.dropped),
            seconds=seconds,
            mirrors=self.hinting.hints(),
        )

    # --- nodes ------------------------------------------------------------------------------

    async def _manifest(self) -> tuple[Manifest, CID, PublicKey | None]:
        root = (await self._nodes([self.cid]))[self.cid]
        opened = open_untrusted(root)
        if not isinstance(opened, SignedManifest):
            return opened, self.cid, None
        block = (await self._nodes([opened.manifest]))[opened.manifest]
        return manifest_untrusted(block), opened.manifest, opened.publisher

    async def _parts(self, manifest: Manifest, refs: Sequence[PartRef]) -> dict[PartKey, Part]:
        # What peers hold of them is told while the nodes are on their way.
        self.swarm.name([ref.cid for ref in refs])
        nodes = await self._nodes([ref.cid for ref in refs])
        parts = await self._thread(partial(_decode, refs, nodes))
        if self.web is not None:
            self.web.learn(manifest, {ref.cid: parts[ref.key] for ref in refs})
            for provider in self.web.mirrors:
                self.swarm.add(provider)
            self.swarm.finite = not self.discovers
        self.hinting.learn([entry.name for entry in manifest.files])
        # Ask every peer what it holds of everything now: the answers come in while headers are fetched.
        await self.swarm.fetch((self._want(ref.cid, parts[ref.key], frozenset()) for ref in refs), _nowhere)
        return parts

    async def _nodes(self, cids: Sequence[CID]) -> dict[CID, Block]:
        """Nodes from the store, or from peers into the store."""
        found = await self._thread(partial(_read_held, self.store, cids))
        lacking = [Wanted(cid, NODE_ESTIMATE, exact=False) for cid in dict.fromkeys(cids) if cid not in found]
        if lacking and not (self.discovers or self.options.peers or self.options.gateways):
            raise NoProviders(
                f"nobody to ask what {self.cid} is: a web server has the model's files, not its manifest",
                remedy="Add a --peer, --bootstrap or --gateway; it is needed for the first megabyte only.",
            )
        if lacking:

            def keep(blocks: Sequence[Block]) -> None:
                for block in blocks:
                    self.store.put_node(block)
                    found[block.cid] = block.kept()

            await self.swarm.fetch([WantsAdded(None, tuple(lacking), (1 << len(lacking)) - 1)], keep)
        self.nodes |= found
        return found

    # --- headers ----------------------------------------------------------------------------

    async def _headers(
        self, manifest: Manifest, parts: Mapping[PartKey, Part]
    ) -> tuple[list[gguf.GGUFHeader], dict[CID, Block]]:
        """The headers of all files, and the blocks they were read from."""
        by_file = sorted((p for p in parts.values() if isinstance(p, HeaderPart)), key=lambda p: p.key.index)
        total = sum(part.header_size for part in by_file)
        if total > MAX_HEADER_BYTES or any(p.header_size > gguf.LIMITS.header_bytes for p in by_file):
            raise MalformedManifest(f"{manifest.name}: its headers take {total} bytes, more than any model's")
        blocks = await self._thread(partial(_read_held, self.store, [c for p in by_file for c in p.blocks]))

        def keep(arrived: Sequence[Block]) -> None:
            blocks.update((block.cid, block.kept()) for block in arrived)

        wants = []
        for part in by_file:
            ref = manifest.part(part.key)
            lacking = frozenset(part.blocks) - blocks.keys()
            if ref is not None and lacking:
                wants.append(self._want(ref.cid, part, lacking))
        await self.swarm.fetch(wants, keep)
        headers = []
        for part, entry in zip(by_file, manifest.files, strict=True):
            data = b"".join(blocks[cid].data for cid in part.blocks)
            read = partial(gguf.read_header_untrusted, data, file_size=entry.size, name=entry.name)
            headers.append(await self._thread(read))
        return headers, blocks

    # --- the rest ---------------------------------------------------------------------------

    async def _blocks(
        self, model: Model, placements: Sequence[Placement], missing: Sequence[Placement], assembly: Assembly
    ) -> None:
        refs = {ref.key: ref.cid for ref in model.manifest.parts}
        lacking = await self._thread(partial(_by_part, missing))
        sizes = await self._thread(partial(by_file, placements))
        total = sum(sizes.values())

        def tell() -> None:
            fetched = self.swarm.tally.bytes
            lacking_now = assembly.lacking()
            done = total - min(total, sum(lacking_now.values()))
            self.progress(
                FetchProgress(
                    model.manifest.name, done, total, self.swarm.peers, fetched,
                    dict(self.swarm.tally.peers), _by_file(model.manifest, sizes, lacking_now),
                )
            )  # fmt: skip

        tell()
        self.swarm.progressed = tell
        urgent = frozenset(self.options.urgent(model.manifest))
        wants = (
            self._want(refs[key], model.parts[key], lacking[key], urgent=key in urgent)
            for key in sorted(lacking, key=lambda k: k.rank)
        )
        await self.swarm.fetch(wants, assembly.write)
        tell()

    def _want(self, ref: CID, part: Part, lacking: Collection[CID], *, urgent: bool = False) -> WantsAdded:
        """Want those blocks of `part` (whose node is `ref`) that are in `lacking`."""
        if (blocks := self.links.get(ref)) is None:
            blocks = self.links[ref] = tuple(Wanted(cid, size) for cid, size in part.links())
        mask = sum(1 << index for index, block in enumerate(blocks) if block.cid in lacking)
        return WantsAdded(ref, blocks, mask, urgent)

    async def _thread(self, work: Callable[[], _T]) -> _T:
        result: _T = await trio.to_thread.run_sync(work, limiter=self.threads)
        return result


def _check_signer(cid: CID, publisher: PublicKey | None, signer: str | None) -> None:
    """Refuse what another publisher signed, or nobody. Raises `UnknownSigner`."""
    found = None if publisher is None else publisher.peer_id
    if signer is not None and found != signer:
        raise UnknownSigner(
            f"{cid} is signed by {found or 'nobody'}, not by {signer}",
            remedy="Ask the publisher for the right CID, or do without --signer.",
        )


def _by_file(
    manifest: Manifest, sizes: Mapping[int, int], lacking: Mapping[int, int]
) -> tuple[FileProgress, ...]:
    return tuple(
        FileProgress(manifest.files[number].name, size - min(size, lacking.get(number, 0)), size)
        for number, size in sorted(sizes.items())
    )


def _decode(refs: Sequence[PartRef], nodes: Mapping[CID, Block]) -> dict[PartKey, Part]:
    return {ref.key: part_untrusted(nodes[ref.cid], ref) for ref in refs}


def _by_part(placements: Iterable[Placement]) -> dict[PartKey, set[CID]]:
    """The blocks that lie there, by the part they belong to."""
    found: dict[PartKey, set[CID]] = {}
    for placement in placements:
        found.setdefault(placement.part, set()).add(placement.cid)
    return found


def _read_held(store: Store, cids: Sequence[CID]) -> dict[CID, Block]:
    """Those of `cids` that can be read here."""
    found = {}
    for cid in store.held(cids):
        try:
            found[cid] = store.read(cid)
        except (StoreError, IntegrityError) as error:
            _log.warning("block %s is held but can not be read, fetching it: %s", cid, error)
    return found


def _write_held(assembly: Assembly, blocks: Mapping[CID, Block]) -> None:
    """Write the header blocks that arrived before there was an assembly."""
    lacking = dict.fromkeys(placement.cid for placement in assembly.missing())
    assembly.write([blocks[cid] for cid in lacking if cid in blocks])


def _nowhere(blocks: Sequence[Block]) -> None:
    """The sink of a fetch that wants nothing."""

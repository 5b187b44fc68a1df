"""Asking peers what they really hold of a model, without fetching any of it (spec/05-transfer, `have`).

A provider record is a claim. `Probe` learns from anyone what the model consists of, then asks each
provider over the transfer protocol which blocks it holds. Fetches nodes, never weights; keeps nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from omnistore.block import Block
from omnistore.cid import CID
from omnistore.errors import (
    NetworkError,
    NoProviders,
    OmniError,
    PeerUnreachable,
    RemoteProtocolError,
)
from omnistore.manifest import (
    Manifest,
    Part,
    SignedManifest,
    manifest_untrusted,
    open_untrusted,
    part_untrusted,
)
from omnistore.net.interface import Network, Provider
from omnistore.store.interface import Store
from omnistore.transfer.asks import Answer, Arrived, Asks, Refused
from omnistore.transfer.demand import Wanted
from omnistore.transfer.messages import LIMITS, PROTOCOL, Error, Hello, Holds

PATIENCE: Final = 10.0
"""Seconds that one peer has to say what it holds, and to send a node."""
NODE_ESTIMATE: Final = 64 << 10
READ: Final = 256 << 10


@dataclass(frozen=True, slots=True)
class Description:
    """What a model consists of."""

    manifest_cid: CID
    manifest: Manifest
    parts: dict[CID, Part]


@dataclass(frozen=True, slots=True)
class Found:
    """What one provider turned out to hold."""

    provider: Provider
    error: str | None
    """Why it could not be asked; None if it answered."""
    parts: int = 0
    """Parts that it holds whole."""
    bytes_held: int = 0


@dataclass(slots=True)
class Probe:
    """Looks at one model from one node."""

    network: Network
    store: Store
    _nodes: dict[CID, Block] = field(default_factory=dict)

    async def describe(self, cid: CID, providers: Sequence[Provider]) -> Description:
        """What the model under `cid` consists of. Raises `NoProviders` when nobody can tell."""
        root = (await self._fetch([cid], providers))[cid]
        opened = open_untrusted(root)
        manifest_cid = cid
        if isinstance(opened, SignedManifest):
            manifest_cid = opened.manifest
            manifest = manifest_untrusted((await self._fetch([manifest_cid], providers))[manifest_cid])
        else:
            manifest = opened
        refs = {ref.cid: ref for ref in manifest.parts}
        nodes = await self._fetch(list(refs), providers)
        return Description(
            manifest_cid, manifest, {cid: part_untrusted(nodes[cid], ref) for cid, ref in refs.items()}
        )

    async def ask(self, provider: Provider, description: Description) -> Found:
        """What a provider holds of it; never raises for what the provider does."""
        parts = list(description.parts)
        whole = held = 0
        try:
            with trio.fail_after(PATIENCE):
                async with _Conversation(self.network, provider) as talk:
                    for start in range(0, len(parts), talk.queries):
                        for part, bitmap in (await talk.holds(parts[start : start + talk.queries])).items():
                            sizes = [size for _, size in description.parts[part].links()]
                            count = sum(size for i, size in enumerate(sizes) if _bit(bitmap, i))
                            held += count
                            whole += count == sum(sizes)
        except trio.TooSlowError:
            return Found(provider, "no answer in time")
        except (NetworkError, RemoteProtocolError) as error:
            return Found(provider, error.message)
        return Found(provider, None, whole, held)

    async def _fetch(self, cids: Sequence[CID], providers: Sequence[Provider]) -> dict[CID, Block]:
        """Nodes from the store, or from the first provider that has them."""
        for cid in await trio.to_thread.run_sync(self.store.held, cids):
            if cid not in self._nodes:
                self._nodes[cid] = await trio.to_thread.run_sync(self.store.read, cid)
        for provider in providers:
            lacking = [cid for cid in cids if cid not in self._nodes]
            if not lacking:
                break
            try:
                with trio.fail_after(PATIENCE):
                    async with _Conversation(self.network, provider) as talk:
                        for block in await talk.nodes(lacking):
                            self._nodes[block.cid] = block
            except (OmniError, trio.TooSlowError):
                continue
        lacking = [cid for cid in cids if cid not in self._nodes]
        if lacking:
            raise NoProviders(
                f"nobody reachable tells what {lacking[0]} is",
                remedy="Name a node that holds it with --peer.",
            )
        return {cid: self._nodes[cid] for cid in cids}


class _Conversation:
    """One stream of the transfer protocol, asked one thing after another."""

    def __init__(self, network: Network, provider: Provider) -> None:
        self._network = network
        self._provider = provider
        self._asks = Asks()
        self._answers: list[Answer] = []
        self._limits = Hello(1, 1)

    @property
    def queries(self) -> int:
        """Parts that may be asked about at once."""
        return min(self._limits.queries, LIMITS.queries)

    async def __aenter__(self) -> _Conversation:
        self._stream = await self._network.open_stream(self._provider, PROTOCOL)
        try:
            hello = await self._next()
            if not isinstance(hello, Hello):
                raise RemoteProtocolError(f"{self._provider.peer} did not say hello")
        except BaseException:
            await self._stream.reset()
            raise
        self._limits = hello
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stream.aclose()

    async def nodes(self, cids: Sequence[CID]) -> list[Block]:
        """Those of some nodes that the peer has. Raises `IntegrityError` for bytes that are not theirs."""
        found = []
        batch = min(self._limits.asks, LIMITS.links)
        for start in range(0, len(cids), batch):
            wanted = cids[start : start + batch]
            await self._stream.send_all(
                self._asks.want([Wanted(cid, NODE_ESTIMATE, exact=False) for cid in wanted])
            )
            due = len(wanted)
            while due:
                match await self._next():
                    case Arrived(want, data):
                        found.append(Block.verify_untrusted(want.cid, bytes(data)))
                        due -= 1
                    case Refused(refused):
                        due -= len(refused)
        return found

    async def holds(self, parts: Sequence[CID]) -> dict[CID, bytes]:
        """The bitmap of each part that the peer knows."""
        await self._stream.send_all(self._asks.have(parts))
        found: dict[CID, bytes] = {}
        due = set(parts)
        while due:
            match await self._next():
                case Holds(part, blocks) if part in due:
                    due.discard(part)
                    if blocks is not None:
                        found[part] = blocks
        return found

    async def _next(self) -> Answer:
        while not self._answers:
            data = await self._stream.receive_some(READ)
            if not data:
                raise PeerUnreachable(f"{self._provider.peer} ended the stream")
            self._answers = self._asks.receive_untrusted(data)
        answer = self._answers.pop(0)
        if isinstance(answer, Error):
            raise PeerUnreachable(f"{self._provider.peer} refuses: {answer.code} ({answer.text})")
        return answer


def _bit(bitmap: bytes, index: int) -> bool:
    return index >> 3 < len(bitmap) and bool(bitmap[index >> 3] >> (index & 7) & 1)

"""`NetworkWeights`: parts of models out of the store, or into it from peers first.

The one place where inference asks for transfer. What is held is never asked for; what comes is verified by
the transfer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

import trio

from omnistore.cid import CID
from omnistore.errors import BlockMissing
from omnistore.manifest import Manifest, PartKey
from omnistore.net.interface import ContentRouting, Network, Provider
from omnistore.store.interface import Store
from omnistore.transfer.client import FetchOptions, FetchProgress, fetch_model
from omnistore.transfer.rate import TokenBucket
from omnistore.transfer.window import LIMITS, SessionLimits

Progressed: TypeAlias = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""
Choose: TypeAlias = Callable[[Manifest], Collection[PartKey]]


class NetworkWeights:
    """Fetches through one node."""

    def __init__(
        self,
        network: Network,
        routing: ContentRouting | None,
        store: Store,
        download: TokenBucket | None = None,
        limits: SessionLimits = LIMITS,
        *,
        hints: bool = False,
    ) -> None:
        """`download`, `limits`: the node's cap on what it fetches, and what each fetch keeps to.

        `hints`: whether mirrors are asked that peers name.
        """
        self._network = network
        self._download = download
        self._limits = limits
        self._hints = hints
        self._routing = routing
        self._store = store
        self._assembling = trio.Lock()
        """A store assembles one model once at a time."""

    async def fetch(
        self,
        model: CID,
        choose: Choose,
        providers: Sequence[Provider] = (),
        progress: Progressed = lambda done, total: None,
    ) -> int:
        """Have the chosen parts in the store; the bytes that came over the network for it.

        Raises `NetworkError`, `TrustError` or `StoreError`.
        """
        async with self._assembling:
            if await trio.to_thread.run_sync(self._held, model, choose):
                return 0
            peers = [f"{addr}/p2p/{one.peer}" for one in providers for addr in one.addrs or ("",)]

            def told(state: FetchProgress) -> None:
                progress(state.done, state.total)

            options = FetchOptions(
                choose, peers, limits=self._limits, download=self._download, hints=self._hints
            )
            report = await fetch_model(self._network, self._routing, self._store, model, options, told)
            return report.bytes_fetched

    def _held(self, cid: CID, choose: Choose) -> bool:
        try:
            status = self._store.status(cid)
        except BlockMissing:
            return False
        return status.complete.issuperset(choose(status.model.manifest))

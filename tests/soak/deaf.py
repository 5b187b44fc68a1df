"""A crowd of bad requesters: `deaf.py ADDR HOME CID [PEERS] [KIND]` besets ADDR until stdin ends.

As many peers, each with as many streams as one may have, ask for all that HOME's model CID has and take in
nothing; ended, they come again. Together they ask for several times what a server may have in memory. KIND is
another of `omnistore.testing.faulty.ANNOYANCES`. Prints `{"peer_id", "addrs"}` first, and then
`{"event": "beset"}` when all have come. Not a test.
"""

from __future__ import annotations

import json
import secrets
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from omnistore.cid import CID
from omnistore.config import Config
from omnistore.errors import PeerUnreachable
from omnistore.keys import PrivateKey
from omnistore.net.interface import Network, Provider
from omnistore.net.libp2p import open_network
from omnistore.store.files import FileStore
from omnistore.testing.faulty import Annoyance, annoy
from omnistore.transfer.client import provider_at

STREAMS: Final = 4
"""Streams that a server takes from one peer."""


@dataclass
class Crowd:
    """What all of them know."""

    target: Provider
    held: tuple[CID, ...]
    kind: Annoyance
    ended: int = 0

    async def beset(self, network: Network) -> None:
        """One stream, again and again."""
        while True:
            with suppress(PeerUnreachable):
                await annoy(network, self.target, self.kind, self.held)
            self.ended += 1
            await trio.sleep(1)

    async def one_peer(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, then beset."""
        key = PrivateKey(secrets.token_bytes(32))
        async with open_network(key, []) as network, trio.open_nursery() as nursery:
            await network.connect(f"{self.target.addrs[0]}/p2p/{self.target.peer}")
            for _ in range(STREAMS):
                nursery.start_soon(self.beset, network)
            task_status.started()


async def main(addr: str, home: Path, cid: str, peers: int, kind: Annoyance) -> None:
    """Until stdin ends."""
    store = FileStore(Config(home))
    parts = store.model(CID.parse_untrusted(cid)).parts.values()
    held = tuple(dict.fromkeys(link for part in parts for link, _ in part.links()))[:40]
    store.close()
    crowd = Crowd(provider_at(addr), held, kind)
    async with trio.open_nursery() as nursery:
        print(json.dumps({"event": "ready", "peer_id": "", "addrs": ["/p2p/"]}), flush=True)
        for _ in range(peers):
            await nursery.start(crowd.one_peer)
        print(json.dumps({"event": "beset", "streams": peers * STREAMS}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()
    print(json.dumps({"event": "left", "ended": crowd.ended}), flush=True)


if __name__ == "__main__":
    count = int(sys.argv[4]) if len(sys.argv) > 4 else 6
    how: Any = sys.argv[5] if len(sys.argv) > 5 else "never-reads"
    trio.run(partial(main, sys.argv[1], Path(sys.argv[2]), sys.argv[3], count, how))

"""A peer that nobody wants: `stranger.py ADDR HOME CID` troubles the seed at ADDR until stdin ends.

Each kind of bad requester of `omnistore.testing.faulty` in turn, several streams at once; connections
under ever new identities that ask a little and leave; and streams opened by the hundred. Prints
`{"peer_id", "addrs"}` first, then an `annoyed` event for each round. HOME holds the model CID: that is
where it knows from what to ask for. Not a test.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import trio

from omnistore.cid import CID
from omnistore.config import Config
from omnistore.errors import PeerUnreachable
from omnistore.keys import PrivateKey
from omnistore.net.interface import Provider, Stream
from omnistore.net.libp2p import Libp2pNetwork, open_network
from omnistore.store.files import FileStore
from omnistore.testing.faulty import ANNOYANCES, annoy
from omnistore.transfer.client import provider_at
from omnistore.transfer.messages import PROTOCOL

AT_ONCE: Final = 3
"""Streams of one kind of annoyance: one peer may have four served."""
ROUND: Final = 8.0
"""Seconds that one kind lasts."""
VISIT_EVERY: Final = 1.5
"""Seconds between two new identities: each costs both sides a handshake."""
BURST: Final = 200
"""Streams opened at once, now and then."""
DEAF: Final = 150.0
"""Seconds that one stream asks and does not read: longer than a server may wait for it."""


def tell(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


async def trouble(network: Libp2pNetwork, target: Provider, held: Sequence[CID]) -> None:
    """Every annoyance in turn, for ever."""
    rounds = 0
    while True:
        kind = ANNOYANCES[rounds % len(ANNOYANCES)]
        rounds += 1
        with trio.move_on_after(ROUND):
            async with trio.open_nursery() as nursery:
                for _ in range(AT_ONCE):
                    nursery.start_soon(_annoy, network, target, kind, tuple(held))
        if rounds % 5 == 0:
            await burst(network, target)
        tell("annoyed", how=kind, rounds=rounds)
        # Those that are ended at once would otherwise make this a busy loop.
        await trio.sleep(1)


async def _annoy(network: Libp2pNetwork, target: Provider, kind: str, held: tuple[CID, ...]) -> None:
    try:
        await annoy(network, target, kind, held)  # type: ignore[arg-type]
    except PeerUnreachable:
        # Refused already while opening: as good.
        return


async def burst(network: Libp2pNetwork, target: Provider) -> None:
    """Streams that say nothing, by the hundred, then all reset."""
    opened: list[Stream] = []

    async def one() -> None:
        try:
            opened.append(await network.open_stream(target, PROTOCOL))
        except PeerUnreachable:
            return

    with trio.move_on_after(ROUND):
        async with trio.open_nursery() as nursery:
            for _ in range(BURST):
                nursery.start_soon(one)
    for stream in opened:
        await stream.reset()


async def be_deaf(network: Libp2pNetwork, target: Provider, held: Sequence[CID]) -> None:
    """Ask for much and read nothing until the server has had enough, again and again."""
    while True:
        with trio.move_on_after(DEAF):
            await _annoy(network, target, "never-reads", tuple(held))
        tell("annoyed", how="never-reads, for long")
        await trio.sleep(1)


async def visit(target: Provider, visits: list[int]) -> None:
    """Somebody new: says who it is, looks at the greeting, leaves; every third without a farewell."""
    while True:
        with trio.move_on_after(10):
            async with open_network(PrivateKey(secrets.token_bytes(32)), []) as network:
                try:
                    stream = await network.open_stream(target, PROTOCOL)
                    await stream.receive_some(1000)
                    visits[0] += 1
                    if visits[0] % 3:
                        await stream.aclose()
                except PeerUnreachable:
                    pass
        await trio.sleep(VISIT_EVERY)


async def main(addr: str, home: Path, cid: str) -> None:
    """Until stdin ends."""
    store = FileStore(Config(home))
    parts = store.model(CID.parse_untrusted(cid)).parts.values()
    # Twice the same in one message would be refused before it could annoy.
    held = list(dict.fromkeys(link for part in parts for link, _ in part.links()))[:40]
    store.close()
    target = provider_at(addr)
    visits = [0]
    async with (
        open_network(PrivateKey(secrets.token_bytes(32)), []) as network,
        trio.open_nursery() as nursery,
    ):
        tell("ready", peer_id=network.peer_id, addrs=[f"/p2p/{network.peer_id}"])
        nursery.start_soon(trouble, network, target, held)
        nursery.start_soon(be_deaf, network, target, held)
        nursery.start_soon(visit, target, visits)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()
    tell("left", visits=visits[0])


if __name__ == "__main__":
    trio.run(partial(main, sys.argv[1], Path(sys.argv[2]), sys.argv[3]))

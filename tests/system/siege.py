"""Requesters that nobody wants: `siege.py KIND ADDR HOME CID` besets the seed at ADDR until stdin ends.

    sockets       hundreds of TCP connections on which nobody speaks, opened again as they are cut
    connections   as many peers as the seed has places for, and more, each by a whole handshake, then silence
    streams       streams by the hundred on one connection, nothing said on them, reset, and again
    requests      everything HOME has of CID, and what is held of each part, asked for and read, over and over
    frames        Yamux frames of 4 GiB, of unknown kinds, and over a stream's window, one connection each
    bad           each of `omnistore.testing.faulty.ANNOYANCES`, again and again

Prints `{"event": "beset", "peers": […]}` once it is at full strength. Not a test.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from omnistore.cid import CID
from omnistore.config import Config
from omnistore.errors import PeerUnreachable
from omnistore.keys import PrivateKey
from omnistore.net import frames
from omnistore.net.interface import Provider
from omnistore.net.libp2p import Libp2pNetwork, open_network
from omnistore.store.files import FileStore
from omnistore.testing.faulty import ANNOYANCES, annoy
from omnistore.transfer.asks import Asks
from omnistore.transfer.client import provider_at
from omnistore.transfer.demand import Wanted
from omnistore.transfer.messages import PROTOCOL, Holds

SOCKETS: Final = 600
PEERS: Final = 40
STREAMS: Final = 300
PER_PEER: Final = 4
"""Streams of the transfer protocol that one peer is served on."""


@dataclass
class Siege:
    """What it is about."""

    target: Provider
    blocks: tuple[Wanted, ...]
    parts: tuple[CID, ...]
    nursery: trio.Nursery
    networks: AsyncExitStack
    peers: list[str] = field(default_factory=list)

    async def somebody(self) -> Libp2pNetwork:
        """A new identity."""
        key = PrivateKey(secrets.token_bytes(32))
        network = await self.networks.enter_async_context(open_network(key, []))
        self.peers.append(network.peer_id)
        return network

    async def connected(self) -> Libp2pNetwork:
        network = await self.somebody()
        await network.connect(f"{self.target.addrs[0]}/p2p/{self.target.peer}")
        return network

    async def sockets(self) -> None:
        """From another address of this machine, as another machine would be."""
        port = int(self.target.addrs[0].split("/")[4])

        async def hold() -> None:
            while True:
                with suppress(OSError):
                    async with await trio.open_tcp_stream(
                        "127.0.0.1", port, local_address="127.0.0.2"
                    ) as one:
                        await one.receive_some(100)
                        while await one.receive_some(100):
                            pass
                await trio.sleep(0.1)

        for _ in range(SOCKETS):
            self.nursery.start_soon(hold)
        await trio.sleep(1)

    async def connections(self) -> None:
        """All hold on to what they have, and try again where they have nothing."""

        async def hold(network: Libp2pNetwork) -> None:
            while True:
                with suppress(PeerUnreachable):
                    await network.connect(f"{self.target.addrs[0]}/p2p/{self.target.peer}")
                await trio.sleep(1)

        for _ in range(PEERS):
            self.nursery.start_soon(hold, await self.somebody())
        await trio.sleep(4)

    async def streams(self) -> None:
        """In bursts."""
        network = await self.connected()

        async def burst() -> None:
            while True:
                opened = []
                with trio.move_on_after(3):
                    for _ in range(STREAMS):
                        with suppress(PeerUnreachable):
                            opened.append(await network.open_stream(self.target, PROTOCOL))
                for stream in opened:
                    await stream.reset()

        self.nursery.start_soon(burst)
        await trio.sleep(1)

    async def requests(self) -> None:
        """As fast as it goes."""
        for number in range(4):
            network = await self.connected()
            for _ in range(PER_PEER):
                what = ((), self.parts) if number % 2 else (self.blocks, ())
                self.nursery.start_soon(self._again_and_again, network, *what)
        await trio.sleep(1)

    async def _again_and_again(
        self, network: Libp2pNetwork, blocks: Sequence[Wanted], parts: Sequence[CID]
    ) -> None:
        while True:
            with suppress(PeerUnreachable):
                stream = await network.open_stream(self.target, PROTOCOL)
                asks, owed = Asks(), 0
                while True:
                    if not owed:
                        await stream.send_all(asks.want(blocks) if blocks else asks.have(parts))
                        owed = len(blocks or parts)
                    data = await stream.receive_some(1 << 20)
                    if not data:
                        break
                    answers = asks.receive_untrusted(data)
                    owed -= sum(isinstance(answer, Holds) or hasattr(answer, "wanted") for answer in answers)
            await trio.sleep(0.1)

    async def frames(self) -> None:
        """Each on a connection of its own."""
        giant, window = (
            frames.pack(frames.DATA, 0, 1, 0xFFFFFFFF),
            frames.pack(frames.WINDOW, 0, 1, 0xFFFFFFFF),
        )
        bad = (
            giant,
            window,
            frames.pack(9, 0, 0, 0),
            frames.pack(frames.DATA, 0, 7, 10),
            secrets.token_bytes(5000),
        )

        async def send(network: Libp2pNetwork, data: bytes) -> None:
            while True:
                with suppress(PeerUnreachable):
                    stream = await network.open_stream(self.target, PROTOCOL)
                    muxed = network.host.get_network().get_connections()[0].muxed_conn
                    muxed._core._control += data
                    await stream.send_all(b"!")
                    await stream.receive_exactly(1000)
                await trio.sleep(0.2)

        for data in bad:
            self.nursery.start_soon(send, await self.connected(), data)
        await trio.sleep(1)

    async def bad(self) -> None:
        """Every kind at once, as often as one may."""
        held = tuple(block.cid for block in self.blocks)[:40]
        for kind in ANNOYANCES:
            network = await self.connected()

            async def again(network: Libp2pNetwork = network, kind: str = kind) -> None:
                while True:
                    with suppress(PeerUnreachable):
                        await annoy(network, self.target, kind, held)  # type: ignore[arg-type]
                    await trio.sleep(0.2)

            for _ in range(PER_PEER):
                self.nursery.start_soon(again)
        await trio.sleep(2)


async def main(kind: str, addr: str, home: Path, cid: str) -> None:
    """Until stdin ends."""
    store = FileStore(Config(home))
    parts = store.model(CID.parse_untrusted(cid)).parts.values()
    sizes = {link: size for part in parts for link, size in part.links()}
    nodes = tuple(part.cid for part in store.model(CID.parse_untrusted(cid)).manifest.parts)
    store.close()
    blocks = tuple(Wanted(link, size) for link, size in sizes.items())
    async with AsyncExitStack() as networks, trio.open_nursery() as nursery:
        siege = Siege(provider_at(addr), blocks, nodes, nursery, networks)
        await getattr(siege, kind)()
        print(json.dumps({"event": "beset", "peers": siege.peers}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])

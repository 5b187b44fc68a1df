"""Nodes of this process that echo, each with circuits of its own."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from omnistore.keys import PrivateKey
from omnistore.net.circuit_transport import Circuits
from omnistore.net.interface import Stream
from omnistore.net.libp2p import Libp2pNetwork, open_network


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(1 << 20):
        await stream.send_all(data)


@asynccontextmanager
async def node(*listen: str) -> AsyncIterator[tuple[Libp2pNetwork, Circuits]]:
    async with open_network(PrivateKey(secrets.token_bytes(32)), listen) as network:
        network.serve("/test/echo", echo)
        circuits = Circuits(network)
        circuits.install()
        yield network, circuits

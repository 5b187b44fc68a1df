"""A peer in a process of its own, for the tests beside it: serves a few protocols until killed.

Prints one line of JSON, `{"peer_id", "addrs"}`, when it listens. Not a test.
"""

from __future__ import annotations

import json
import secrets
import sys

import trio

from omnistore.errors import PeerUnreachable
from omnistore.keys import PrivateKey
from omnistore.net.interface import Stream
from omnistore.net.libp2p import open_network


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some(1 << 20):
        await stream.send_all(data)


async def broken(stream: Stream) -> None:
    await stream.receive_some(1)
    raise RuntimeError("a bug in a stream's server")


async def deaf(stream: Stream) -> None:
    """Reads nothing, so that the other side's window stays shut."""
    await trio.sleep_forever()


async def sink(stream: Stream) -> None:
    """Takes in everything."""
    while await stream.receive_some(1 << 20):
        pass


async def source(stream: Stream) -> None:
    """Sends for ever."""
    data = bytes(1 << 20)
    try:
        while True:
            await stream.send_all(data)
    except PeerUnreachable:
        return


async def main(listen: str) -> None:
    async with open_network(PrivateKey(secrets.token_bytes(32)), [listen]) as network:
        for server in (echo, broken, deaf, sink, source):
            network.serve(f"/test/{server.__name__}", server)
        print(json.dumps({"peer_id": network.peer_id, "addrs": list(network.addrs())}), flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, sys.argv[1] if len(sys.argv) > 1 else "/ip4/127.0.0.1/tcp/0")

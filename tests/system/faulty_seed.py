"""Seeds with one fault each: `faulty_seed.py HOME FAULT[,FAULT…] [AFTER]` serves HOME's blocks, badly.

Prints a line of JSON for each, `{"peer_id", "addrs", "fault"}`, when all listen; ends when its stdin does.
Not a test.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import trio

from omnistore.config import Config
from omnistore.keys import PrivateKey
from omnistore.net.libp2p import open_network
from omnistore.store.files import FileStore
from omnistore.testing.faulty import FaultyPeer
from omnistore.transfer.messages import PROTOCOL


async def main(home: Path, faults: Sequence[Any], after: int) -> None:
    """Serve until stdin ends."""
    store = FileStore(Config(home))
    async with AsyncExitStack() as stack:
        for fault in faults:
            key = PrivateKey(secrets.token_bytes(32))
            network = await stack.enter_async_context(open_network(key, ["/ip4/127.0.0.1/tcp/0"]))
            network.serve(PROTOCOL, FaultyPeer(store, fault, after).stream)
            told = {"peer_id": network.peer_id, "addrs": list(network.addrs()), "fault": fault}
            print(json.dumps(told), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
    store.close()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3]) if len(sys.argv) > 3 else 3)

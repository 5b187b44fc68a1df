"""A seed with one fault: `faulty_seed.py HOME FAULT [AFTER]` serves HOME's blocks through a `FaultyPeer`.

Prints one line of JSON, `{"peer_id", "addrs"}`, when it listens; ends when its stdin does. Not a test.
"""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Any

import trio

from omnistore.config import Config
from omnistore.keys import PrivateKey
from omnistore.net.libp2p import open_network
from omnistore.store.files import FileStore
from omnistore.testing.faulty import FaultyPeer
from omnistore.transfer.messages import PROTOCOL


async def main(home: Path, fault: Any, after: int) -> None:
    """Serve until stdin ends."""
    store = FileStore(Config(home))
    async with open_network(PrivateKey(secrets.token_bytes(32)), ["/ip4/127.0.0.1/tcp/0"]) as network:
        network.serve(PROTOCOL, FaultyPeer(store, fault, after).stream)
        print(json.dumps({"peer_id": network.peer_id, "addrs": list(network.addrs())}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
    store.close()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 3)

"""A node of iroh 0.35, for `bench_peers`; run by the Python of `.peers` in a network namespace with only lo.

    python iroh_peer.py add FILE STORE             {"seconds": …}
    python iroh_peer.py seed FILE STORE            {"addrs": ["PID HASH NODE IP:PORT"]}, then serves
                                                  until stdin ends
    python iroh_peer.py get HASH NODE IP:PORT STORE OUT
                                                  {"seconds": …}

PID is for whoever joins the namespace, which keeps it from the relays that its bindings always ask for;
discovery is off. `seconds` of a fetch count from the first
progress that it tells of.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import iroh


class Adding:
    """Takes the progress of an add: the hash in the end."""

    hash: Any = None

    async def progress(self, progress: Any) -> None:
        if progress.type() == iroh.AddProgressType.ALL_DONE:
            self.hash = progress.as_all_done().hash
        if progress.type() == iroh.AddProgressType.ABORT:
            raise RuntimeError(progress.as_abort().error)


class Fetching:
    """Takes the progress of a fetch: when the first came."""

    started: float | None = None

    async def progress(self, progress: Any) -> None:
        if self.started is None and progress.type() in (
            iroh.DownloadProgressType.CONNECTED,
            iroh.DownloadProgressType.FOUND,
            iroh.DownloadProgressType.PROGRESS,
        ):
            self.started = time.perf_counter()
        if progress.type() == iroh.DownloadProgressType.ABORT:
            raise RuntimeError(progress.as_abort().error)


async def node(store: str) -> Any:
    options = iroh.NodeOptions(
        node_discovery=iroh.NodeDiscoveryConfig.NONE, ipv4_addr="127.0.0.1:0", gc_interval_millis=0
    )
    return await iroh.Iroh.persistent_with_options(store, options)


async def add(peer: Any, file: str) -> Any:
    adding = Adding()
    await peer.blobs().add_from_path(file, True, iroh.SetTagOption.auto(), iroh.WrapOption.no_wrap(), adding)
    return adding.hash


async def get(peer: Any, words: list[str], out: str) -> float:
    """The file at `out`: when the fetch began, by what it said."""
    digest, key, address = words
    at = iroh.NodeAddr(iroh.PublicKey.from_string(key), None, [address])
    options = iroh.BlobDownloadOptions(iroh.BlobFormat.RAW, [at], iroh.SetTagOption.auto())
    named = iroh.Hash.from_string(digest)
    fetching = Fetching()
    await peer.blobs().download(named, options, fetching)
    # A rename where the store has it as a file of its own: nothing is copied.
    await peer.blobs().export(named, out, iroh.BlobExportFormat.BLOB, iroh.BlobExportMode.TRY_REFERENCE)
    if fetching.started is None:
        raise RuntimeError("iroh told of no progress")
    return fetching.started


async def main(verb: str, *words: str) -> None:
    iroh.iroh_ffi.uniffi_set_event_loop(asyncio.get_running_loop())
    peer = await node(words[3] if verb == "get" else words[1])
    started = time.perf_counter()
    if verb == "get":
        started = await get(peer, list(words[:3]), words[4])
    else:
        digest = await add(peer, words[0])
    seconds = time.perf_counter() - started
    if verb == "seed":
        found = await peer.net().node_addr()
        local = next(at for at in found.direct_addresses() if at.startswith("127.0.0.1:"))
        key = await peer.net().node_id()
        print(json.dumps({"addrs": [f"{os.getpid()} {digest} {key} {local}"]}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
    else:
        print(json.dumps({"seconds": seconds}), flush=True)
    await peer.node().shutdown()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

"""`omni` on py-libp2p's own muxer, as it comes: what our connections are measured against.

    python -m tests.bench.stock ARGUMENTS OF OMNI…

For benches only. Upstream's streams are given the methods that ours have; all else is theirs.
"""

from __future__ import annotations

import sys
from typing import Any

from libp2p.custom_types import TProtocol
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.exceptions import MuxedStreamEOF
from libp2p.stream_muxer.yamux.yamux import YamuxStream

from omnistore.net import negotiation
from omnistore.net.interface import AT_ONCE, NextRoom, spread


def use_stock_muxer() -> None:
    """From now on, connections of this process are upstream's."""

    async def receive_some(stream: Any, most: int) -> bytes:
        try:
            data: bytes = await stream.read(most)
        except MuxedStreamEOF:
            return b""
        return data

    async def receive_exactly(stream: Any, count: int) -> bytes:
        parts = []
        while count and (part := await receive_some(stream, count)):
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    async def ask(stream: Any, protocol: str) -> None:
        await MultiselectClient().select_one_of([TProtocol(protocol)], MultiselectCommunicator(stream))

    async def receive_into(stream: Any, room: memoryview, more: NextRoom | None = None) -> int:
        data = await receive_some(stream, len(room) if more is None else max(len(room), AT_ONCE))
        spread(data, room, more)
        return len(data)

    write_one = YamuxStream.write

    async def write(stream: Any, *data: Any) -> None:
        await write_one(stream, data[0] if len(data) == 1 else b"".join(data))

    YamuxStream.write = write
    YamuxStream.receive_into = receive_into
    YamuxStream.receive_some = receive_some
    YamuxStream.receive_exactly = receive_exactly
    YamuxStream.ask = ask
    negotiation.install = lambda upgrader, liveness: None


if __name__ == "__main__":
    from omnistore.cli.main import main

    use_stock_muxer()
    main(sys.argv[1:])

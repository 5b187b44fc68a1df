"""What one peer does stays with that peer: three faults of py-libp2p 0.8.1 mended.

- An exception in a stream's server, upstream's own included, tears down the whole host: here it
  ends that stream alone.
- Nothing bounds the streams that a peer opens at once: here the rest are reset.
- The slot of an inbound connection is kept until the node stops, so that a node takes only some
  hundred connections in its life: here it is freed when the connection closes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from omnistore.errors import OmniError

logger = logging.getLogger(__name__)

MAX_INBOUND_STREAMS: Final = 256
"""Streams one peer may have open at us: what its own side would open at most."""


class ConnectionEnded(Exception):
    """Lets upstream's inbound task end, and with it the slot it holds."""


def isolate_streams(swarm: Any) -> None:
    """Guard every inbound stream of `swarm`, before and after its protocol is known."""
    inner: Callable[[Any], Awaitable[None]] = swarm.common_stream_handler
    open_streams: Counter[str] = Counter()

    async def guarded(stream: Any) -> None:
        peer = str(stream.muxed_conn.peer_id)
        if open_streams[peer] >= MAX_INBOUND_STREAMS:
            await abort(stream)
            return
        open_streams[peer] += 1
        try:
            await inner(stream)
        except OmniError as error:
            logger.info("stream of %s ended: %s", peer, error)
            await abort(stream)
        except Exception as error:  # a fault in one stream must never reach the host
            # Upstream's own servers raise on every disconnect; of ours `Libp2pNetwork.serve` has warned.
            logger.debug("stream of %s failed", peer, exc_info=error)
            await abort(stream)
        finally:
            open_streams[peer] -= 1
            if not open_streams[peer]:
                del open_streams[peer]

    swarm.set_stream_handler(guarded)


def free_inbound_slots(swarm: Any) -> None:
    """Make the task of each inbound connection, and its slot, end with the connection."""
    upgrade: Callable[[Any, Any], Awaitable[Any]] = swarm.upgrade_inbound_raw_conn

    async def upgrade_and_wait(raw_conn: Any, maddr: Any) -> None:
        conn = await upgrade(raw_conn, maddr)
        await conn.event_closed.wait()
        raise ConnectionEnded

    swarm.upgrade_inbound_raw_conn = upgrade_and_wait


async def abort(stream: Any, patience: float = 2.0) -> None:
    """Reset a stream; never raises (cancellation aside)."""
    with trio.move_on_after(patience):
        try:
            await stream.reset()
        except Exception as error:  # noqa: BLE001  # resetting what is broken already fails in any way
            logger.debug("resetting a stream failed: %r", error)

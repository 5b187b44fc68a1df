"""What one peer does stays with that peer: four faults of py-libp2p 0.8.1 mended.

- An exception in a stream's server, upstream's own included, tears down the whole host: here it
  ends that stream alone.
- Nothing bounds the streams that a peer opens at once: here the rest are reset.
- The slot of an inbound connection is kept until the node stops, so that a node takes only some
  hundred connections in its life: here it is freed when the connection closes.
- Sockets on which nobody speaks take those slots for as long as a handshake may last, and connections
  on which nothing runs for ever: here `admission` says who makes room.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Container
from typing import Any, Final

import trio

from omnistore.errors import OmniError
from omnistore.net.admission import PENDING, Doorway, Guest, crowds, to_let_go

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


def guard_inbound(swarm: Any, most: int, needed: Container[str]) -> None:
    """Make the task of each inbound connection, and its slot, end with it, and newcomers find room.

    `most`: connections of the node. The library's own bound is to be `PENDING` above it. `needed`: peers
    whose connections are in use though nothing runs on them.
    """
    upgrade: Callable[[Any, Any], Awaitable[Any]] = swarm.upgrade_inbound_raw_conn
    doorway: Doorway[Any] = Doorway()
    since: dict[Any, tuple[str, float]] = {}
    leaving: set[Any] = set()
    # Its bound counts those in the doorway too; ours are in `doorway` and `make_room`.
    places = swarm._inbound_limiter = trio.CapacityLimiter(most + 2 * PENDING)
    handle: Callable[[Any, Any], Awaitable[None]] = swarm._handle_inbound_connection
    taken: Counter[str] = Counter()

    async def handle_unless_crowded(socket: Any, maddr: Any) -> None:
        host = _host(socket)
        if crowds(taken[host], int(places.available_tokens)):
            await hang_up(socket)
            return
        taken[host] += 1
        try:
            await handle(socket, maddr)
        finally:
            taken[host] -= 1
            if not taken[host]:
                del taken[host]

    async def make_room(newest: Any) -> None:
        connections = {
            conn.muxed_conn: conn for conn in swarm.get_connections() if conn.muxed_conn not in leaving
        }
        if len(connections) <= most or newest not in connections:
            return
        guests = [
            Guest(muxed, *since[muxed], busy=bool(conn.get_streams()) or str(muxed.peer_id) in needed)
            for muxed, conn in connections.items()
            if muxed in since
        ]
        found = to_let_go(guests, newest, trio.current_time())
        logger.info("a connection from %s makes room for others", since[found][0])
        leaving.add(found)
        await hang_up(connections[found])

    async def upgrade_and_wait(raw_conn: Any, maddr: Any) -> None:
        host = _host(raw_conn)
        turned = doorway.came(raw_conn, host)
        try:
            if turned is not None:
                await hang_up(turned)
            conn = await upgrade(raw_conn, maddr)
        finally:
            doorway.left(raw_conn)
        since[conn] = (host, trio.current_time())
        try:
            await make_room(conn)
            await conn.event_closed.wait()
        finally:
            del since[conn]
            leaving.discard(conn)
        raise ConnectionEnded

    swarm.upgrade_inbound_raw_conn = upgrade_and_wait
    swarm._handle_inbound_connection = handle_unless_crowded


def _host(socket: Any) -> str:
    """The IP address at the other end; empty for what has none."""
    address = socket.get_remote_address()
    return str(address[0]) if address else ""


async def hang_up(conn: Any, patience: float = 1.0) -> None:
    """Close a connection; never raises (cancellation aside)."""
    with trio.move_on_after(patience):
        try:
            await conn.close()
        except Exception as error:  # noqa: BLE001  # closing what is broken already fails in any way
            logger.debug("closing a connection failed: %r", error)


async def abort(stream: Any, patience: float = 2.0) -> None:
    """Reset a stream; never raises (cancellation aside)."""
    with trio.move_on_after(patience):
        try:
            await stream.reset()
        except Exception as error:  # noqa: BLE001  # resetting what is broken already fails in any way
            logger.debug("resetting a stream failed: %r", error)

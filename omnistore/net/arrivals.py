"""Being told of new connections: all that is wanted of py-libp2p's interface for what happens in a swarm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from libp2p.abc import INotifee


class _Arrivals(INotifee):  # type: ignore[misc]  # libp2p is untyped to us
    def __init__(self, tell: Callable[[Any], None]) -> None:
        self._tell = tell

    async def connected(self, network: Any, conn: Any) -> None:
        self._tell(conn)

    async def disconnected(self, network: Any, conn: Any) -> None:
        pass

    async def opened_stream(self, network: Any, stream: Any) -> None:
        pass

    async def closed_stream(self, network: Any, stream: Any) -> None:
        pass

    async def listen(self, network: Any, multiaddr: Any) -> None:
        pass

    async def listen_close(self, network: Any, multiaddr: Any) -> None:
        pass


@contextmanager
def watching_arrivals(swarm: Any, tell: Callable[[Any], None]) -> Iterator[None]:
    """Call `tell` with each connection that is made, by either side, until the block ends."""
    watch = _Arrivals(tell)
    swarm.register_notifee(watch)
    try:
        yield
    finally:
        swarm.remove_notifee(watch)

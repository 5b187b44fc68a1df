"""Serves blocks and nodes over Bitswap 1.2: the trio shell around `bitswap`.

One task per asking peer, for as long as it wants something: it opens a stream to the peer and sends one
block after another, so a peer that does not read costs one block of memory. A server only: this
implementation asks over its own protocol. Implements spec/05-transfer, section "Bitswap".
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from omnistore.block import Block
from omnistore.cid import CID
from omnistore.errors import IntegrityError, PeerUnreachable, RemoteProtocolError, StoreError
from omnistore.net.interface import Network, Provider, Stream
from omnistore.store.interface import Store
from omnistore.transfer.bitswap import (
    PROTOCOL,
    Entry,
    Messages,
    Wants,
    block_message,
    known_cid,
    presence_message,
    wantlist_untrusted,
)
from omnistore.transfer.pacing import Pacer
from omnistore.transfer.server import Served

_log = logging.getLogger(__name__)

PEERS: Final = 32
"""Peers answered at once: at most 64 MiB of blocks on their way to those that do not read."""
STREAMS: Final = 4
"""Streams that one peer may have open for asking."""
READERS: Final = 1
"""Threads that read and hash for Bitswap: our own protocol goes first."""
PIECE: Final = 256 << 10
SEND_PATIENCE: Final = 30.0
"""Seconds for a peer to take in one piece."""
IDLE_PATIENCE: Final = 120.0
"""Seconds for the next bytes on a stream that asks."""


@dataclass(slots=True, eq=False)
class _Peer:
    wants: Wants = field(default_factory=Wants)
    streams: int = 0
    sending: bool = False


async def serve_bitswap(
    network: Network,
    store: Store,
    pacer: Pacer,
    *,
    events: Callable[[Served], None] = lambda event: None,
    task_status: Any = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer Bitswap with what `store` holds, until cancelled."""
    async with trio.open_nursery() as nursery:
        server = _Server(network, store, pacer, events, nursery)
        network.serve(PROTOCOL, server.stream)
        task_status.started()
        await trio.sleep_forever()


@dataclass(slots=True, eq=False)
class _Server:
    network: Network
    store: Store
    pacer: Pacer
    events: Callable[[Served], None]
    nursery: trio.Nursery
    threads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(READERS))
    peers: dict[str, _Peer] = field(default_factory=dict)

    async def stream(self, stream: Stream) -> None:
        """Take in what one stream asks for."""
        peer = self.peers.get(stream.peer)
        if peer is None:
            if len(self.peers) >= PEERS:
                await stream.reset()
                return
            peer = self.peers[stream.peer] = _Peer()
        if peer.streams >= STREAMS:
            await stream.reset()
            return
        peer.streams += 1
        try:
            await self._receive(stream, peer)
            await stream.aclose()
        except RemoteProtocolError as error:
            _log.info("ending a stream of %s: %s", stream.peer, error)
            await stream.reset()
        except (PeerUnreachable, trio.TooSlowError) as error:
            _log.debug("a Bitswap stream of %s ended: %s", stream.peer, error)
            await stream.reset()
        finally:
            peer.streams -= 1
            self._forget(stream.peer, peer)

    async def _receive(self, stream: Stream, peer: _Peer) -> None:
        messages = Messages()
        while True:
            with trio.fail_after(IDLE_PATIENCE):
                data = await stream.receive_some(64 << 10)
            if not data:
                return
            for message in messages.feed_untrusted(data):
                wantlist = wantlist_untrusted(message)
                if wantlist is not None:
                    peer.wants.receive(wantlist)
            if peer.wants and not peer.sending:
                peer.sending = True
                self.nursery.start_soon(self._answer, stream.peer, peer)

    def _forget(self, name: str, peer: _Peer) -> None:
        if not (peer.streams or peer.sending or peer.wants):
            self.peers.pop(name, None)

    # --- answering --------------------------------------------------------------------------

    async def _answer(self, name: str, peer: _Peer) -> None:
        """Answer everything that a peer wants, on a stream of ours."""
        blocks = sent = 0
        try:
            with trio.fail_after(SEND_PATIENCE):
                stream = await self.network.open_stream(Provider(name), PROTOCOL)
            finished = False
            try:
                while peer.wants:
                    message, size = await self._next(peer.wants)
                    await self._send(stream, name, message)
                    blocks += bool(size)
                    sent += size
                finished = True
            finally:
                # A reset could overtake what was sent.
                await (stream.aclose() if finished else stream.reset())
        except (PeerUnreachable, trio.TooSlowError) as error:
            _log.debug("answering %s over Bitswap: %s", name, error)
            peer.wants = Wants()
        finally:
            peer.sending = False
            if blocks:
                self.events(Served(name, blocks, sent, None))
            self._forget(name, peer)
        if peer.wants and not peer.sending:
            # Asked while the stream was being closed.
            peer.sending = True
            self.peers[name] = peer
            self.nursery.start_soon(self._answer, name, peer)

    async def _next(self, wants: Wants) -> tuple[bytes, int]:
        """The next message, and the bytes of the block in it."""
        asked = wants.presences()
        if not asked:
            entry = wants.block()
            cid = known_cid(entry.cid) if entry else None
            found = await trio.to_thread.run_sync(self._read, cid, limiter=self.threads) if cid else None
            if found is not None:
                return block_message(found), len(found)
            asked = [entry] if entry else []
            return presence_message([], [entry.cid for entry in asked if entry.dont_have]), 0
        held = await trio.to_thread.run_sync(self._held, asked, limiter=self.threads)
        lacked = [entry.cid for entry in asked if entry.dont_have and entry.cid not in held]
        return presence_message([entry.cid for entry in asked if entry.cid in held], lacked), 0

    async def _send(self, stream: Stream, name: str, message: bytes) -> None:
        view = memoryview(message)
        piece = self.pacer.piece(PIECE)
        for start in range(0, len(view), piece):
            part = view[start : start + piece]
            await self.pacer.passes(name, len(part))
            with trio.fail_after(SEND_PATIENCE):
                await stream.send_all(part)

    def _read(self, cid: CID) -> Block | None:
        try:
            return self.store.read(cid)
        except (StoreError, IntegrityError) as error:
            _log.debug("asked over Bitswap for %s: %s", cid, error)
            return None

    def _held(self, asked: list[Entry]) -> set[bytes]:
        known = [cid for entry in asked if (cid := known_cid(entry.cid)) is not None]
        return {cid.binary for cid in self.store.held(known)}

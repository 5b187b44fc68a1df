"""Agreeing on protocols without waiting for it (multistream-select 1.0.0, spec/04-discovery §2).

Who dials knows what it wants: Noise, Yamux, one protocol of ours. It need not wait for the peer to repeat
each of these: it says what it wants and goes on as if that were granted, and looks at the answers when they
come, before anything behind them. The bytes are those of py-libp2p 0.8.1 and of everybody else, which wait
five round trips in all where this waits for none. A peer that answers otherwise has not understood what
followed, so the stream or connection ends there.

Only for the side that dials. Whoever is dialled answers as ever.
"""

from __future__ import annotations

from typing import Any

from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.security.security_multistream import SecurityMultistream
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX

from omnistore.errors import RemoteProtocolError
from omnistore.net.agreement import Answer, agreed
from omnistore.net.yamux import Connection, Liveness


class _Ahead:
    """A raw connection on which a protocol is taken for granted: as the library's layers use one."""

    def __init__(self, conn: Any, protocol: str) -> None:
        self._conn = conn
        self._unsent = agreed(protocol)
        self._answer = Answer(protocol)

    async def write(self, data: bytes) -> None:
        """Send `data`, behind what is asked for."""
        unsent, self._unsent = self._unsent, b""
        await self._conn.write(unsent + bytes(data))

    async def read(self, n: int | None = None) -> bytes:
        """What comes behind the answer."""
        while self._answer.lacking:
            data = await self._conn.read(self._answer.lacking)
            if not data:
                raise MultiselectClientError("the connection ended before a protocol was agreed on")
            try:
                self._answer.take_untrusted(data)
            except RemoteProtocolError as error:
                raise MultiselectClientError(
                    f"the peer {error.message}: it may be in a private swarm"
                ) from None
        data = await self._conn.read(n)
        return bytes(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conn, name)


class OwnSecurity(SecurityMultistream):  # type: ignore[misc]  # libp2p is untyped to us
    """Secures connections as upstream does, without waiting for an agreement when it dials."""

    async def secure_outbound(self, conn: Any, peer_id: Any) -> Any:
        """Begin the handshake at once. Raises `MultiselectClientError`, `HandshakeFailure`."""
        # There is one: a peer that lacks it can not be spoken to.
        ((protocol, transport),) = self.transports.items()
        secure = await transport.secure_outbound(_Ahead(conn, str(protocol)), peer_id)
        secure.negotiated_security_protocol = str(protocol)
        # The handshake is over, and with it the answer: from here on the layers below are seen as they are.
        secure.conn.read_writer.read_write_closer = conn
        return secure


class OwnMuxer(MuxerMultistream):  # type: ignore[misc]  # libp2p is untyped to us
    """Negotiates in upstream's place, which names its own Yamux class, and answers with ours."""

    def __init__(self, liveness: Liveness, muxers: Any, negotiate_timeout: int) -> None:
        super().__init__(muxers, negotiate_timeout)
        self._liveness = liveness

    async def new_conn(self, conn: Any, peer_id: Any) -> Any:
        """Agree on Yamux on a secured connection; without waiting for it where we dialled."""
        if conn.is_initiator:
            await conn.write(agreed(YAMUX))
            return self._annotate_connection(
                Connection(conn, peer_id, self._liveness, Answer(YAMUX)), conn, YAMUX
            )
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        return self._annotate_connection(Connection(conn, peer_id, self._liveness), conn, protocol)


def install(upgrader: Any, liveness: Liveness) -> None:
    """Have a host make its connections so; each is one of ours."""
    old = upgrader.muxer_multistream
    upgrader.security_multistream = OwnSecurity(upgrader.security_multistream.transports)
    upgrader.muxer_multistream = OwnMuxer(liveness, old.transports, old.negotiate_timeout)

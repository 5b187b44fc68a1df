"""The DHT under a protocol ID of our own: remedies a fault of py-libp2p 0.8.1.

`KadDHT` takes a `protocol_prefix` and ignores it: five of its modules hold the public IPFS
network's `/ipfs/kad/1.0.0`. A DHT whose nodes keep records of models only, under other bounds, must
not mix with that one. Nothing of the library is patched: the DHT is given a view of the host that
speaks `PROTOCOL` (spec/04-discovery §3) where the DHT says upstream's, and a routing table told the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from libp2p.peer.peerstore import PeerStoreError

PROTOCOL: Final = "/omni/kad/1.0.0"
UPSTREAM: Final = "/ipfs/kad/1.0.0"


class OwnProtocolHost:
    """A host as the DHT sees it: every stream of `UPSTREAM` is one of `PROTOCOL`."""

    def __init__(self, host: Any) -> None:
        self._host = host
        self.set_stream_handler = self._serve
        self.remove_stream_handler = self._stop_serving

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    async def new_stream(self, peer_id: Any, protocol_ids: Sequence[str]) -> Any:
        """Open a stream, of our protocol where upstream's is asked for."""
        return await self._host.new_stream(peer_id, [_ours(protocol) for protocol in protocol_ids])

    def _serve(self, protocol_id: str, server: Any) -> None:
        self._host.set_stream_handler(_ours(protocol_id), server)

    def _stop_serving(self, protocol_id: str) -> None:
        self._host.remove_stream_handler(_ours(protocol_id))


def admit_own(table: Any, host: Any) -> None:
    """Let peers into a routing table that speak `PROTOCOL`, or have not said yet what they speak."""
    add: Any = table.add_peer

    async def add_peer(peer: Any, skip_server_mode_check: bool = False) -> bool:
        spoken = protocols(host, getattr(peer, "peer_id", peer))
        if spoken and PROTOCOL not in spoken:
            return False
        return bool(await add(peer, skip_server_mode_check=True))

    table.add_peer = add_peer


def protocols(host: Any, peer: Any) -> Sequence[str]:
    """What a peer said it speaks; empty before it has."""
    try:
        return [str(protocol) for protocol in host.get_peerstore().get_protocols(peer)]
    except PeerStoreError:
        return []


def _ours(protocol: str) -> str:
    return PROTOCOL if protocol == UPSTREAM else protocol

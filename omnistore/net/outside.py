"""Under which address a router shows one of our ports to the outside (spec/04-discovery §11).

A connection of its own to a peer, from the port in question; that peer says in identify from where it
came. Most routers show a port everywhere under the same outside port (then a third party can aim at it);
one that takes another for every connection can not be punched through, and two peers show which it is.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Final

import trio
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator

from omnistore.errors import PeerUnreachable
from omnistore.net.libp2p import Libp2pNetwork, Libp2pStream
from omnistore.net.observed import PROTOCOL, observed_untrusted
from omnistore.net.reachability import scope
from omnistore.net.sockets import FreePort, Source

logger = logging.getLogger(__name__)

SECONDS: Final = 4.0
"""For the connection and the answer."""


async def outside_address(network: Libp2pNetwork, peer: str, source: Source) -> str | None:
    """The multiaddr under which `peer` sees a connection from `source`; None if that can not be told.

    Only a peer that we dialled is asked, where we dialled it.
    """
    where = next(iter(network.remote_addresses(peer, dialled=True)), None)
    if where is None or (":" in where[0]) != (":" in source.host):
        return None
    swarm, peer_id, conn = network.host.get_network(), ID.from_base58(peer), None
    try:
        with trio.move_on_after(SECONDS):
            raw = RawConnection(TrioTCPStream(await source.connect(*where)), True)
            conn = await swarm.upgrade_outbound_raw_conn(raw, peer_id)
            # On this very connection; the library would choose among those there are.
            stream = await conn.new_stream()
            await network.host.multiselect_client.select_one_of([PROTOCOL], MultiselectCommunicator(stream))
            address = await observed_untrusted(Libp2pStream(stream, peer, swarm), network.peer_id)
            return address.transport if address is not None else None
    except Exception as error:  # noqa: BLE001  # upstream raises anything; then it can not be told
        logger.debug("%s does not say how it sees our port %d: %r", peer, source.port, error)
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(1), suppress(PeerUnreachable):
            if conn is not None:
                await conn.close()
    return None


async def one_port_for_all(network: Libp2pNetwork) -> bool | None:
    """Whether our router shows a port of ours to all under one outside port, as hole punching needs it.

    None where fewer than two public peers at different addresses say how they see one. Never raises.
    """
    seen: dict[str, str] = {}
    try:
        with FreePort("ip4") as free:
            for peer in network.peers():
                at = network.remote_addresses(peer, dialled=True)
                if not at or at[0][0] in seen or scope(at[0][0]) != "public":
                    continue
                address = await outside_address(network, peer, free.source)
                if address is not None:
                    seen[at[0][0]] = address
                if len(seen) == 2:
                    break
    except OSError as error:
        logger.info("no port can be taken to see how it is seen: %s", error)
    return len(set(seen.values())) == 1 if len(seen) == 2 else None

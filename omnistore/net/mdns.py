"""Finding other nodes on the local network by multicast DNS (spec/04-discovery §7).

The messages are those of libp2p's mDNS specification under a service name of our own, so that only
nodes of this network answer: we dial nobody else because he is near. Speaks IPv4 multicast on
interfaces with a private address, and believes private addresses only, so that a stranger on the
LAN can not send us anywhere else. Who answers is no more trusted than any other peer.

`zeroconf` runs an event loop in a thread of its own; what it finds is handed over to trio's.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from omnistore.dht.records import peer_id_bytes_untrusted
from omnistore.errors import BadConfig, RemoteProtocolError
from omnistore.net.addresses import Address, interface_addresses, parse_untrusted
from omnistore.net.interface import Provider

logger = logging.getLogger(__name__)

SERVICE: Final = "_omni._udp.local."
"""libp2p's own is `_p2p._udp`: there, every IPFS node of the LAN would answer."""
MAX_ADDRS: Final = 8
"""Addresses announced, and believed, of one node: what one record holds in a packet's worth."""
MAX_FOUND: Final = 256
"""Nodes waiting to be looked at; more are a flood."""
ASK_DEADLINE: Final = 3.0
"""Seconds for a node's record after its name."""
LOOK_EVERY: Final = 30.0
"""Seconds between looks whether this machine moved to another network."""
_PREFIX: Final = b"dnsaddr="


def lan_addresses(listening: Iterable[str], interfaces: Iterable[str]) -> list[str]:
    """The private IPv4 addresses of this machine that mDNS may use.

    A node that listens at some addresses only uses no other interface, so one that listens at
    loopback uses none; one that does not listen asks everywhere.
    """
    hosts = {parse_untrusted(addr).host for addr in listening}
    return [
        text
        for text in interfaces
        if ":" not in text and _is_lan(text) and (not hosts or "0.0.0.0" in hosts or text in hosts)
    ]


def encode_record(peer: str, addrs: Iterable[str]) -> bytes:
    """The TXT record of a node: `dnsaddr=<multiaddr>/p2p/<peer>` for each of its LAN addresses."""
    kept = []
    for text in addrs:
        address = parse_untrusted(text)
        if address.kind in ("ip4", "ip6") and _is_lan(address.host):
            kept.append(_PREFIX + f"{address.transport}/p2p/{peer}".encode())
    return b"".join(bytes((len(entry),)) + entry for entry in kept[:MAX_ADDRS])


def parse_record_untrusted(record: bytes) -> Provider | None:
    """The node that a TXT record describes, if it is one of ours at LAN addresses. Raises nothing."""
    peer: str | None = None
    addrs: dict[str, None] = {}
    while record and len(addrs) < MAX_ADDRS:
        size, entry, record = record[0], record[1 : 1 + record[0]], record[1 + record[0] :]
        if len(entry) < size or not entry.startswith(_PREFIX):
            continue
        address = _address_untrusted(entry[len(_PREFIX) :])
        if address is None or (peer is not None and address.peer != peer):
            continue
        peer = address.peer
        addrs[address.transport] = None
    return Provider(peer, tuple(addrs)) if peer is not None else None


def _address_untrusted(entry: bytes) -> Address | None:
    try:
        address = parse_untrusted(entry.decode("ascii"))
        peer_id_bytes_untrusted(address.peer or "")
    except (BadConfig, RemoteProtocolError, UnicodeDecodeError):
        return None
    usable = address.kind in ("ip4", "ip6") and _is_lan(address.host) and address.port and address.peer
    return address if usable else None


def _is_lan(host: str) -> bool:
    ip = ipaddress.ip_address(host)
    # IPv6's link-local addresses need the name of an interface, which a multiaddr has no place for.
    if ip.is_loopback or ip.is_unspecified or ip.is_multicast or (ip.version == 6 and ip.is_link_local):
        return False
    return ip.is_private


@dataclass(slots=True)
class Lan:
    """What is found while `open_mdns` is open."""

    _send: trio.MemorySendChannel[Provider]
    found: trio.MemoryReceiveChannel[Provider]
    """Nodes that announced themselves, again when they announce something new; not ourselves."""
    interfaces: Sequence[str] = field(default_factory=tuple)
    """The addresses multicast is sent from; empty where there is no local network."""

    def hear(self, peer: str, record: bytes) -> None:
        """Take in a record; in trio's thread."""
        provider = parse_record_untrusted(record)
        if provider is None or provider.peer == peer:
            return
        try:
            self._send.send_nowait(provider)
        except (trio.WouldBlock, trio.ClosedResourceError, trio.BrokenResourceError):
            logger.debug("%s was found on the LAN, and nobody looks", provider.peer)


@asynccontextmanager
async def open_mdns(
    peer: str, addrs: Callable[[], Sequence[str]], listening: Sequence[str] | None
) -> AsyncIterator[Lan]:
    """Look for other nodes until the block ends; one that is `listening` also announces itself.

    `addrs` gives the addresses others can dial at the time. Follows this machine from one network to the
    next; where there is none it waits for one.
    """
    send, receive = trio.open_memory_channel[Provider](MAX_FOUND)
    lan = Lan(send, receive)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_follow, lan, peer, addrs, listening)
        try:
            yield lan
        finally:
            nursery.cancel_scope.cancel()


async def _follow(
    lan: Lan, peer: str, addrs: Callable[[], Sequence[str]], listening: Sequence[str] | None
) -> None:
    while True:
        here = await _lan_now(listening)
        lan.interfaces = here
        if not here:
            await trio.sleep(LOOK_EVERY)
            continue
        record = encode_record(peer, addrs()) if listening is not None else b""
        try:
            await _use(lan, peer, here, record, listening)
        except OSError as error:
            logger.warning("mDNS can not use %s: %s", ", ".join(here), error)
            await trio.sleep(LOOK_EVERY)


async def _lan_now(listening: Sequence[str] | None) -> list[str]:
    return lan_addresses(listening or (), await trio.to_thread.run_sync(interface_addresses))


async def _use(
    lan: Lan, peer: str, here: Sequence[str], record: bytes, listening: Sequence[str] | None
) -> None:
    """Announce and look on these interfaces, for as long as they are the same."""
    token = trio.lowlevel.current_trio_token()

    def heard(text: bytes) -> None:
        token.run_sync_soon(lan.hear, peer, text)

    stop = await trio.to_thread.run_sync(_start, here, record, heard)
    try:
        while await _lan_now(listening) == here:  # noqa: ASYNC110  # nothing tells when an interface comes
            await trio.sleep(LOOK_EVERY)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(stop)


def _start(here: Sequence[str], record: bytes, heard: Callable[[bytes], None]) -> Callable[[], None]:
    """Look, and announce `record` if there is one; what ends it. In a thread: it takes about a second."""
    from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

    daemon = Zeroconf(interfaces=list(here), ip_version=IPVersion.V4Only)
    # As libp2p has it: a name that says nothing about the peer.
    name = secrets.token_hex(16)
    own = f"{name}.{SERVICE}"

    def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if name == own or state_change is ServiceStateChange.Removed:
            return
        info = zeroconf.get_service_info(service_type, name, timeout=int(ASK_DEADLINE * 1000))
        if info is not None and info.text:
            heard(info.text)

    ServiceBrowser(daemon, SERVICE, handlers=[changed])
    own_record = parse_record_untrusted(record)
    if own_record is not None:
        info = ServiceInfo(
            SERVICE,
            own,
            port=parse_untrusted(own_record.addrs[0]).port,
            properties=record,
            server=f"{name}.local.",
            addresses=[ipaddress.ip_address(text).packed for text in here],
        )
        daemon.register_service(info)
    stop: Callable[[], None] = daemon.close
    return stop

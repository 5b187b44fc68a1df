"""Multiaddrs: what we can listen on, what others can dial (spec/04-discovery §1).

Remedies a fault of py-libp2p 0.8.1: its TCP transport sets SO_REUSEPORT, so a second process on
the same port silently takes every other connection; and an address like `/ip4/0.0.0.0` is given to
others as it stands. Does no input or output but the trial bind; knows TCP over IP and DNS only.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from omnistore.errors import BadConfig

_HOST_PROTOCOLS: Final = ("ip4", "ip6", "dns", "dns4", "dns6")
_BASE58: Final = frozenset("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz")
CIRCUIT: Final = "/p2p-circuit"
"""What stands between a relay and the peer reached through it."""
DEFAULT_PORT: Final = 4141
"""TCP; unassigned by IANA, and none of the ports other IPFS programs use."""
_MAX_TEXT: Final = 512
"""Longest address looked at, in characters; a DNS name has at most 253."""


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP multiaddr taken apart: `/<kind>/<host>/tcp/<port>[/p2p/<relay>/p2p-circuit][/p2p/<peer>]`."""

    kind: str
    """`ip4`, `ip6`, `dns`, `dns4` or `dns6`."""
    host: str
    port: int
    peer: str | None = None
    relay: str | None = None
    """The peer that listens there and relays, for an address through a relay."""

    @property
    def transport(self) -> str:
        """The multiaddr without its peer ID."""
        where = f"/{self.kind}/{self.host}/tcp/{self.port}"
        return where if self.relay is None else f"{where}/p2p/{self.relay}{CIRCUIT}"

    @property
    def is_wildcard(self) -> bool:
        """Whether it stands for every interface."""
        return self.host in ("0.0.0.0", "::")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.kind in ("ip4", "ip6") and ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        return self.transport if self.peer is None else f"{self.transport}/p2p/{self.peer}"


def parse_untrusted(text: str) -> Address:
    """Take a TCP multiaddr apart. Raises `BadConfig` naming it."""
    fields = text.split("/")
    remedy = "Give /ip4/<address>/tcp/<port>/p2p/<peer ID>; `omni seed` prints its own."
    if len(text) > _MAX_TEXT or len(fields) not in (5, 7) or fields[0] or fields[3] != "tcp":
        raise BadConfig(f"{text[:80]!r} is not a TCP multiaddr", remedy=remedy)
    kind, host, port = fields[1], fields[2], fields[4]
    if kind not in _HOST_PROTOCOLS or not host:
        raise BadConfig(f"{text!r}: {kind!r} is not one of {', '.join(_HOST_PROTOCOLS)}", remedy=remedy)
    if not (port.isascii() and port.isdecimal() and int(port) < 65536):
        raise BadConfig(f"{text!r}: {port!r} is not a TCP port", remedy=remedy)
    if kind in ("ip4", "ip6"):
        try:
            host = str((ipaddress.IPv4Address if kind == "ip4" else ipaddress.IPv6Address)(host))
        except ValueError:
            raise BadConfig(f"{text!r}: {host!r} is not an {kind} address", remedy=remedy) from None
    peer = None
    if len(fields) == 7:
        peer = fields[6]
        if fields[5] != "p2p" or not is_peer_id(peer):
            raise BadConfig(f"{text!r}: {peer!r} is not a peer ID", remedy=remedy)
    return Address(kind, host, int(port), peer)


def parse_any_untrusted(text: str) -> Address:
    """Take a TCP multiaddr apart, be it one through a relay. Raises `BadConfig` naming it."""
    where, circuit, rest = text.partition(CIRCUIT)
    through = parse_untrusted(where)
    if not circuit:
        return through
    peer = rest.removeprefix("/p2p/") if rest else None
    if through.peer is None or (peer is not None and not (rest.startswith("/p2p/") and is_peer_id(peer))):
        raise BadConfig(
            f"{text[:200]!r} is not an address through a relay",
            remedy="Give /ip4/<address>/tcp/<port>/p2p/<relay>/p2p-circuit/p2p/<peer ID>.",
        )
    return Address(through.kind, through.host, through.port, peer, through.peer)


def is_peer_id(text: str) -> bool:
    """Whether a text looks like a peer ID: base58btc of a likely length."""
    return 32 <= len(text) <= 64 and _BASE58.issuperset(text)


def parse_dialable_untrusted(text: str) -> tuple[Address, str]:
    """An address that names its peer, and that peer. Raises `BadConfig`."""
    address = parse_any_untrusted(text)
    if address.peer is None:
        raise BadConfig(
            f"{text!r} does not say which peer to expect there",
            remedy="A peer's address ends in /p2p/ and its ID; `omni seed` prints it.",
        )
    if address.port == 0:
        raise BadConfig(
            f"{text!r}: nobody listens on port 0", remedy="Give the address that `omni seed` printed there."
        )
    return address, address.peer


def check_listenable(addresses: Iterable[Address]) -> None:
    """Refuse addresses that another process listens on, or that are not this machine's (`BadConfig`)."""
    for address in addresses:
        if address.kind not in ("ip4", "ip6"):
            raise BadConfig(f"can not listen on {address}: give an IP address, not a name")
        family = socket.AF_INET if address.kind == "ip4" else socket.AF_INET6
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # Without SO_REUSEPORT on this side, the bind fails where somebody listens already.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address.host, address.port))
                if address.port:
                    probe.listen(1)
        except OSError as error:
            raise _not_listenable(address, error) from None


def _not_listenable(address: Address, error: OSError) -> BadConfig:
    if error.errno == errno.EADDRINUSE:
        return BadConfig(
            f"can not listen on {address}: port {address.port} is in use",
            remedy="Stop the other program, or choose another port with --listen.",
        )
    if error.errno == errno.EACCES:
        return BadConfig(
            f"can not listen on {address}: ports below 1024 need privileges",
            remedy="Choose a higher port with --listen.",
        )
    return BadConfig(
        f"can not listen on {address}: {error.strerror}",
        remedy="Give --listen an address of this machine, for example /ip4/0.0.0.0/tcp/0.",
    )


def expand(bound: Iterable[Address], interfaces: Iterable[str]) -> list[Address]:
    """Replace wildcards by the addresses of `interfaces` (IP texts): what others can dial, each once.

    Loopback comes last, IPv6 after IPv4.
    """
    found: dict[Address, None] = {}
    for address in bound:
        if not address.is_wildcard:
            found[address] = None
            continue
        for text in interfaces:
            kind = "ip6" if ":" in text else "ip4"
            # A link-local address means nothing without the interface's name.
            if kind == address.kind and not ipaddress.ip_address(text).is_link_local:
                found[Address(kind, text, address.port)] = None
    return sorted(found, key=lambda address: (address.is_loopback, address.kind))


def interface_addresses() -> Sequence[str]:
    """The IP addresses of this machine's interfaces that are up."""
    import psutil  # 20 ms; only a node that listens needs it

    stats = psutil.net_if_stats()
    return [
        entry.address.partition("%")[0]
        for name, entries in psutil.net_if_addrs().items()
        if name in stats and stats[name].isup
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    ]


def default_listen() -> tuple[str, ...]:
    """Where a seed listens unless told otherwise: everywhere, IPv6 where this machine has it."""
    everywhere = (f"/ip4/0.0.0.0/tcp/{DEFAULT_PORT}", f"/ip6/::/tcp/{DEFAULT_PORT}")
    return everywhere if has_ipv6() else everywhere[:1]


def has_ipv6() -> bool:
    """Whether this machine can bind IPv6 addresses at all."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True

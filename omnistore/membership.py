"""Which private swarm a home is in: `swarm.json` (spec/08-private-swarms §4).

The file holds the swarm's secret, for its owner's eyes only. A home is in one swarm or in none; a node
reads this once, when it starts.
"""

from __future__ import annotations

import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from omnistore.documents import Document, read_document, remove_document, update
from omnistore.errors import BadConfig
from omnistore.invite import PSK_SIZE, Invitation
from omnistore.net.addresses import parse_dialable_untrusted

FILE_NAME: Final = "swarm.json"


@dataclass(frozen=True, slots=True)
class Membership:
    """A private swarm, as one of its members knows it."""

    psk: bytes = field(repr=False)
    """The pre-shared key, 32 bytes: a secret."""
    bootstrap: tuple[str, ...] = ()
    """Nodes of the swarm to join through, as multiaddrs ending in `/p2p/…`."""
    inviter: str | None = None
    """Peer ID of who invited this home; None where the swarm was made."""


def membership(home: Path) -> Membership | None:
    """The swarm that this home is in. Raises `BadConfig`, also for a file that others can read."""
    path = home / FILE_NAME
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadConfig(f"{path} can not be read: {error.strerror}") from None
    if mode & 0o077:
        raise BadConfig(
            f"{path} can be read or written by others (mode {mode:04o})",
            remedy=f"Run `chmod 600 {path}`; if its secret may have leaked, make a new swarm.",
        )
    return _member_of(read_document(path), path)


def found(home: Path) -> Membership:
    """Make a new swarm of which this home is the first member, unless it is in one. Raises `BadConfig`."""
    member = membership(home)
    return member if member is not None else _enter(home, Membership(secrets.token_bytes(PSK_SIZE)))


def join(home: Path, invitation: Invitation) -> Membership:
    """Enter the swarm of an invitation. Raises `BadConfig` when the home is in another one."""
    for addr in invitation.bootstrap:
        parse_dialable_untrusted(addr)
    return _enter(home, Membership(invitation.psk, invitation.bootstrap, invitation.inviter.peer_id))


def leave(home: Path) -> bool:
    """Go back to the public network; whether the home was in a swarm. Raises `BadConfig`."""
    return remove_document(home / FILE_NAME)


def _enter(home: Path, member: Membership) -> Membership:
    def change(document: Document) -> Document:
        if document and _member_of(document, home / FILE_NAME).psk != member.psk:
            raise BadConfig(
                "this home is in another private swarm already",
                remedy="Run `omni leave` first, or use another home (OMNI_HOME).",
            )
        return {
            "psk": member.psk.hex(),
            "bootstrap": list(dict.fromkeys([*document.get("bootstrap", ()), *member.bootstrap])),
            "inviter": document.get("inviter", member.inviter),
        }

    return _member_of(update(home / FILE_NAME, change), home / FILE_NAME)


def _member_of(document: Document, path: Path) -> Membership:
    psk, bootstrap, inviter = document.get("psk"), document.get("bootstrap"), document.get("inviter")
    damaged = BadConfig(f"{path} is damaged", remedy="Join again with an invitation, after `omni leave`.")
    if not isinstance(bootstrap, list) or not isinstance(inviter, str | None) or not isinstance(psk, str):
        raise damaged
    try:
        key = bytes.fromhex(psk)
        for addr in bootstrap:
            parse_dialable_untrusted(addr if isinstance(addr, str) else "")
    except (ValueError, BadConfig):
        raise damaged from None
    if len(key) != PSK_SIZE:
        raise damaged
    return Membership(key, tuple(bootstrap), inviter)

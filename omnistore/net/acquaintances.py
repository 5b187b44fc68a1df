"""The DHT servers this home has met, kept across restarts: `peers.json` in the home.

A file of hints: whatever is wrong with it, it counts as empty, and losing it costs a restart with
`--bootstrap`. Holds addresses that a peer itself named once it had proved its identity; bounded, and
forgotten when the peer was not met for a month. Dials nobody.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from omnistore.errors import BadConfig
from omnistore.net.addresses import parse_untrusted
from omnistore.net.interface import Provider

logger = logging.getLogger(__name__)

FILE_NAME: Final = "peers.json"
MAX_PEERS: Final = 200
"""Peers kept: any few of them are enough to join again."""
MAX_ADDRS: Final = 8
MAX_AGE: Final = 30 * 86400.0
"""Seconds without a meeting after which a peer is forgotten: addresses change."""
MAX_FILE: Final = 1 << 20
"""Bytes read; what is written has under 200 KiB."""


@dataclass(frozen=True, slots=True)
class Acquaintance:
    """A peer that answered."""

    peer: str
    addrs: tuple[str, ...]
    met: float
    """When it was last connected, in seconds since 1970."""


def recall(home: Path, now: float) -> list[Acquaintance]:
    """Those kept in `home`, last met first. Raises nothing."""
    try:
        with (home / FILE_NAME).open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning("%s can not be read: %s", home / FILE_NAME, error)
        return []
    return _parse_untrusted(data, now)


def remember(home: Path, met: Iterable[Provider], now: float) -> None:
    """Keep `met` as of now, beside those kept before. Raises nothing: these are hints."""
    kept = {one.peer: one for one in recall(home, now)}
    for provider in met:
        usable = sorted(
            filter(_is_address, provider.addrs), key=lambda addr: parse_untrusted(addr).is_loopback
        )
        if usable:
            kept[provider.peer] = Acquaintance(provider.peer, tuple(usable[:MAX_ADDRS]), now)
    latest = sorted(kept.values(), key=lambda one: -one.met)[:MAX_PEERS]
    entries = [{"peer": one.peer, "addrs": list(one.addrs), "met": round(one.met)} for one in latest]
    temporary = home / f".{FILE_NAME}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        temporary.write_text(json.dumps({"peers": entries}, indent=1) + "\n")
        temporary.replace(home / FILE_NAME)
    except OSError as error:
        logger.warning("%s can not be written: %s", home / FILE_NAME, error)
        temporary.unlink(missing_ok=True)


def _parse_untrusted(data: bytes, now: float) -> list[Acquaintance]:
    """What a file holds; entries that are none are left out."""
    try:
        entries = json.loads(data)["peers"] if len(data) <= MAX_FILE else []
        found = [one for entry in entries if (one := _entry_untrusted(entry, now)) is not None]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    return sorted(found, key=lambda one: -one.met)[:MAX_PEERS]


def _entry_untrusted(entry: Any, now: float) -> Acquaintance | None:
    match entry:
        case {"peer": str(peer), "addrs": [*addrs], "met": int(met)} if now - MAX_AGE <= met <= now + 86400:
            usable = tuple(addr for addr in addrs if _is_address(addr))[:MAX_ADDRS]
            known = usable and _is_address(f"{usable[0]}/p2p/{peer}")
            return Acquaintance(peer, usable, min(float(met), now)) if known else None
    return None


def _is_address(addr: Any) -> bool:
    try:
        return isinstance(addr, str) and parse_untrusted(addr).port > 0
    except BadConfig:
        return False

"""What engines made of parts for themselves, kept beside the blocks: each file is named after its part.

A file is called CID-SOMETHING.ort, with the CID of the part that it was made of. The store knows no more of
it: it can be made again from the blocks at any time, so it goes first where room is wanted, and with the last
model that has the part. Files are whole when they have their name (`omninfer.engines.ort_packed`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from omnistore.cid import CID
from omnistore.errors import MalformedCID
from omnistore.store.disk import allocated

DIRECTORY: Final = "packed"
ABANDONED_AFTER: Final = 3600.0
"""Seconds after which a file that never got its name belongs to nobody: writing one takes seconds."""


def packed_files(home: Path) -> list[Path]:
    """All that have their name, the least recently used first."""
    found = []
    for path in (home / DIRECTORY).glob("[!.]*"):
        with suppress(FileNotFoundError):
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


def packed_bytes(home: Path) -> int:
    """The disk space that they take."""
    return sum(allocated(path) for path in packed_files(home))


def unreached(home: Path, parts: Collection[bytes], now: float) -> Iterator[Path]:
    """Files of parts whose digests are not among `parts`, and abandoned ones; `now` in seconds since 1970."""
    for path in packed_files(home):
        try:
            digest = CID.parse_untrusted(path.name.partition("-")[0]).digest
        except MalformedCID:
            digest = b""
        if digest not in parts:
            yield path
    for hidden in (home / DIRECTORY).glob(".*"):
        for path in [hidden, *hidden.rglob("*")]:
            with suppress(FileNotFoundError):
                if path.is_file() and path.stat().st_mtime < now - ABANDONED_AFTER:
                    yield path

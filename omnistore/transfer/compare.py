"""Whether a web server really has the files that somebody here is about to name it for.

Two short ranges of each file are fetched and held against the file on this disk: its size, its header and
its last tensor's end. That finds a wrong address, a page in place of a file, and another export of the
model; it proves nothing to others, who verify every block anyway.
Implements spec/05-transfer, section "Mirror hints".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from omnistore.errors import InputError, PeerUnreachable, RemoteProtocolError
from omnistore.manifest import FileEntry
from omnistore.transfer.hints import Mirror, mirrors_of
from omnistore.transfer.ranges import Range, Whereabouts
from omnistore.transfer.web import WebFiles, open_client

COMPARED: Final = 64 << 10
"""Bytes at either end of a file: more than a page that stands for an error, less than anybody waits for."""
_AS_IT_IS: Final = "Mend the address, or record it unseen with --no-check."


async def check_mirrors(urls: Sequence[str], files: Sequence[Path]) -> None:
    """See that every URL answers range requests with what the file of its name has.

    `urls` are those that `hints.check_hints` let through. Raises `InputError` or `PeerUnreachable`, naming
    the URL.
    """
    entries = [FileEntry(path.name, path.stat().st_size, None) for path in files]
    async with open_client() as client:
        for mirror in mirrors_of(urls, [entry.name for entry in entries]):
            where = Whereabouts(entries)
            await _check(WebFiles(mirror.url, mirror.url, client, where, 1, urls=mirror.urls), mirror, files)


async def _check(web: WebFiles, mirror: Mirror, files: Sequence[Path]) -> None:
    for number, (url, path) in enumerate(zip(mirror.urls, files, strict=True)):
        if url is None:
            continue
        try:
            for job in _ends(number, path.stat().st_size):
                if await _fetched(web, url, job) != _read(path, job):
                    raise RemoteProtocolError(
                        f"has other bytes at {job.first} than {path}: it is another file of the same size"
                    )
        except RemoteProtocolError as error:
            raise InputError(f"--url {url} {error.message}", remedy=_AS_IT_IS) from None
        except PeerUnreachable as error:
            raise PeerUnreachable(f"--url {error.message}", remedy=_AS_IT_IS) from None


def _ends(number: int, size: int) -> Iterator[Range]:
    yield Range(number, 0, min(COMPARED, size) - 1, ())
    if size > COMPARED:
        yield Range(number, max(COMPARED, size - COMPARED), size - 1, ())


async def _fetched(web: WebFiles, url: str, job: Range) -> bytes:
    data = bytearray()
    lacking = job.last - job.first + 1
    async with web.range(url, job) as response:
        async for piece in response.aiter_raw():
            data += piece
            if len(data) >= lacking:
                break
    return bytes(data[:lacking])


def _read(path: Path, job: Range) -> bytes:
    with path.open("rb") as file:
        file.seek(job.first)
        return file.read(job.last - job.first + 1)

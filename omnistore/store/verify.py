"""Reading everything again: does each byte still match the CID it is held under?

Without repair nothing changes. With it, places that hold other bytes are forgotten, and a
file of ours gets them back from another copy on this machine where there is one. Fetching what is
still missing then is `omni pin`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from omnistore.cid import CID, RAW
from omnistore.errors import BlockMissing, DigestMismatch, SourceChanged
from omnistore.store.disk import reported, sync_data, write_at
from omnistore.store.files import FileStore, read_location
from omnistore.store.index import Location, ModelRow, StoredFile
from omnistore.store.interface import ModelStatus

_THREADS: Final = 2
"""Hashing runs without the interpreter's lock; more threads only compete for memory bandwidth."""
_AHEAD: Final = 64
"""Blocks read at once: bounds memory at 128 MiB."""

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Fault:
    """One block whose bytes on disk are not what they should be."""

    path: Path
    offset: int
    length: int
    cid: CID
    message: str
    repaired: bool = False
    """A good copy from elsewhere was put in its place."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What reading a model's files showed."""

    status: ModelStatus
    """After the repair, if there was one."""
    blocks: int
    bytes: int
    faults: tuple[Fault, ...]


def verify(store: FileStore, cid: CID, *, repair: bool = False, progress: Progress | None = None) -> Verdict:
    """Check every block in every file of a model. Raises `BlockMissing` for a model not here."""
    row = store.index.model(cid)
    if row is None:
        raise BlockMissing(f"model {cid} is not held here")
    # A repair writes into files that a fetch may be writing into.
    with store.lock_model(row.manifest, row.name) if repair else nullcontext():
        return _verify(store, row, repair, progress)


def _verify(store: FileStore, row: ModelRow, repair: bool, progress: Progress | None) -> Verdict:
    faults: list[Fault] = []
    blocks = count = 0
    files = store.index.files(row.id)
    there = {number for number, file in files if not file.lost}
    for number, file in files:
        if file.lost and number in there:
            continue  # Another file has its place.
        for fault, length in _check(file, store.index.contents(file.id)):
            blocks += 1
            count += 0 if file.lost else length
            if progress and not file.lost:
                progress(length)
            if fault is not None:
                faults.append(_repair(store, file, fault) if repair else fault)
    return Verdict(store.status(row.cid), blocks, count, tuple(faults))


def size_to_verify(store: FileStore, cid: CID) -> int:
    """Bytes that `verify` will read: its total of progress."""
    row = store.index.model(cid)
    files = [] if row is None else store.index.files(row.id)
    return sum(length for _, file in files if not file.lost for _, length, _ in store.index.contents(file.id))


def _check(file: StoredFile, places: Sequence[tuple[int, int, bytes]]) -> Iterator[tuple[Fault | None, int]]:
    with ThreadPoolExecutor(_THREADS, "omni-verify") as pool:
        for start in range(0, len(places), _AHEAD):
            some = places[start : start + _AHEAD]
            yield from pool.map(lambda place: (_fault(file, *place), place[1]), some)


def _fault(file: StoredFile, offset: int, length: int, digest: bytes) -> Fault | None:
    cid = CID.of_digest(RAW, digest)
    try:
        read_location(Location(file, offset, length), cid)
    except (SourceChanged, DigestMismatch) as error:
        return Fault(file.where, offset, length, cid, error.message)
    return None


def _repair(store: FileStore, file: StoredFile, fault: Fault) -> Fault:
    """Forget the place; write a good copy there if the file is ours and there is one.

    A file that is gone may come back, with everything in it: nothing of it is forgotten.
    """
    if file.lost:
        return fault
    with store.index.writing() as writer:
        writer.drop_location(fault.cid.digest, file.id, fault.offset)
    if not file.owned:
        return fault
    with suppress(BlockMissing, SourceChanged, DigestMismatch):
        block = store.read(fault.cid)
        with reported(file.where, "written"):
            fd = os.open(file.where, os.O_WRONLY | os.O_CLOEXEC)
            try:
                write_at(fd, block.data, fault.offset)
                sync_data(fd)
            finally:
                os.close(fd)
        with store.index.writing() as writer:
            writer.add_locations(file.id, [(fault.cid.digest, fault.offset, fault.length)])
        return Fault(fault.path, fault.offset, fault.length, fault.cid, fault.message, repaired=True)
    return fault


def paths_of(faults: Iterable[Fault]) -> list[Path]:
    """The files that faults were found in, each once."""
    return list(dict.fromkeys(fault.path for fault in faults))

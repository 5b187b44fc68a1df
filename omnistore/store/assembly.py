"""Putting a fetched model together in sparse files, so that a crash at any instruction loses nothing.

The order is the whole idea: verified bytes go to their offsets, and only then does the index say that they
are there. When the process dies, what the index names is in the page cache or on the disk. A power cut
is another matter: waiting for the disk at every write would cost most of the speed, so the disk takes it
now and then, while more is written, and until a wait for all of it the index says that the file is
`unsynced` since this start of the machine. A store opened after another start reads such a file again
(`FileStore`). A file is called `NAME.gguf.part` until every byte of the model's is in place and on the disk.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from omnistore.block import Block
from omnistore.chunker.layout import Placement
from omnistore.cid import CID
from omnistore.config import sync_directory
from omnistore.errors import (
    BlockMissing,
    DigestMismatch,
    InputError,
    LocalProtocolError,
    MalformedManifest,
    SourceChanged,
    StoreError,
)
from omnistore.manifest import PartKey
from omnistore.store.disk import FileLock, boot_id, check_room, place_file, reported, sync_data, write_at
from omnistore.store.index import StoredFile, part_path
from omnistore.store.interface import Model
from omnistore.store.models import by_file, names_of

if TYPE_CHECKING:
    from omnistore.store.files import FileStore

_OPEN_MODE: Final = 0o600
"""Of files under the home: the home is its owner's alone."""


@dataclass(slots=True)
class _Target:
    """One file of the model while it is being put together."""

    file: StoredFile
    fd: int | None
    """Open for writing; None for a user's file that holds all that is wanted already."""
    written: set[int]
    """Offsets of the blocks that the index says are in it."""
    unsynced: list[tuple[bytes, int, int]] = field(default_factory=list)
    """(digest, offset, size) of blocks written and not known to be on the disk."""
    marked: bool = False
    """Whether the index says `unsynced`."""
    early: Future[None] | None = None
    """The disk is taking the first `begun` of them."""
    begun: int = 0


class FileAssembly:
    """The files of one model under construction; holds the model's lock until `close`."""

    def __init__(
        self,
        store: FileStore,
        lock: FileLock,
        model: Model,
        row: int,
        placements: Sequence[Placement],
        parts: Collection[PartKey],
    ) -> None:
        self.model = model
        self._store = store
        self._model_lock = lock
        self._row = row
        self._wanted = sorted(
            (placement for placement in placements if placement.part in parts),
            key=lambda p: (p.part.rank, p.file, p.offset),
        )
        self._places: dict[CID, list[Placement]] = {}
        for placement in placements:
            self._places.setdefault(placement.cid, []).append(placement)
        self._since = boot_id()
        self._lock = threading.Lock()
        self._closed = False
        self._disk = ThreadPoolExecutor(1, "omni-sync")
        self._lacking = Counter[int]()
        """As `lacking`."""
        self._targets: dict[int, _Target] = {}
        if not store.index.files(row):
            # Nothing of it is here: what can not fit is refused before a file is made for it.
            self._check_room(self._wanted)
        try:
            self._targets = self._open_targets()
            held = self._store.held({placement.cid for placement in self._wanted})
            self.local_blocks = len(held)
            self._check_room(self.missing())
            self._lacking = by_file(self.missing())
            self._copy_local(held)
        except BaseException:
            self._close_targets()
            raise

    def missing(self) -> Sequence[Placement]:
        with self._lock:
            return [p for p in self._wanted if p.offset not in self._targets[p.file].written]

    def lacking(self) -> Mapping[int, int]:
        # A block may lie at places that are not wanted, too: those are written, and counted, as well.
        return {number: max(0, count) for number, count in self._lacking.items()}

    def write(self, blocks: Sequence[Block]) -> None:
        with self._lock:
            if self._closed:
                raise LocalProtocolError(f"the assembly of {self.model.manifest.name} is closed")
            self._write(blocks)

    def finish(self, output: Path | None = None) -> Sequence[Path]:
        missing = self.missing()
        if missing:
            raise BlockMissing(
                f"{len(missing)} blocks of {self.model.manifest.name} are missing",
                remedy=f"Run `omni pin {self.model.cid}` again.",
            )
        with self._lock:
            self._sync()
            whole = self._is_whole()
            if whole:
                self._give_names()
        paths = [self._targets[number].file.where for number in range(len(self.model.manifest.files))]
        if output is None:
            return paths
        if not whole:
            raise InputError(
                f"{self.model.manifest.name} is here in part only, so there is nothing to write to {output}",
                remedy="Pin it without --layers first.",
            )
        return deliver(paths, names_of(self.model.manifest), output, link=True)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._sync()
            finally:
                self._close_targets()
                self._model_lock.release()

    # --- opening ----------------------------------------------------------------------------

    def _open_targets(self) -> dict[int, _Target]:
        found: dict[int, _Target] = {}
        known = self._store.index.files(self._row)
        wanted: dict[int, set[int]] = {number: set() for number in range(len(self.model.manifest.files))}
        for placement in self._wanted:
            wanted[placement.file].add(placement.offset)
        for number, offsets in wanted.items():
            mine = [file for of, file in known if of == number and not file.lost]
            found[number] = self._referenced(mine, offsets) or self._owned(number, offsets)
            # Known at once, so that what was opened is closed if a later file can not be.
            self._targets = found
        return found

    def _referenced(self, files: Iterable[StoredFile], offsets: set[int]) -> _Target | None:
        """The user's own file, if it holds everything that is wanted of this one."""
        for file in files:
            if not file.owned and file.where.exists():
                written = self._written(file.id)
                if written >= offsets:
                    return _Target(file, None, written)
        return None

    def _owned(self, number: int, offsets: set[int]) -> _Target:
        """Our file of this number: found again, or begun."""
        entry = self.model.manifest.files[number]
        path = self._store.models_directory / str(self.model.manifest_cid) / entry.name
        row = next((file for _, file in self._store.index.files() if file.path == path), None)
        with reported(path, "written"):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            named = row is not None and not row.partial and path.exists()
            whole = named and row is not None and self._written(row.id) >= offsets
            current = path if whole else part_path(path)
            if named and not whole:
                # It was whole once and lost blocks since: it is to be filled again.
                path.replace(current)
            fresh = not current.exists()
            fd = os.open(current, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _OPEN_MODE)
            try:
                intact = not fresh and os.fstat(fd).st_size == entry.size
                if not intact:
                    os.ftruncate(fd, entry.size)
                    os.fsync(fd)
                sync_directory(path.parent)
                file = StoredFile(0, path, entry.size, 0, 0, owned=True, partial=not whole, lost=False)
                file = self._know(number, file, intact)
                return _Target(file, fd, self._written(file.id))
            except BaseException:
                os.close(fd)
                if fresh:
                    # Such as a file larger than any that this disk can have.
                    current.unlink(missing_ok=True)
                    with suppress(OSError):
                        path.parent.rmdir()
                raise

    def _know(self, number: int, file: StoredFile, intact: bool) -> StoredFile:
        """Enter our file in the index; what it held does not count unless it is `intact`."""
        with self._store.index.writing() as writer:
            row = writer.put_file(file)
            writer.put_model_file(self._row, number, row)
            if not intact:
                writer.clear_locations(row)
        return StoredFile(row, file.path, file.size, 0, 0, owned=True, partial=file.partial, lost=False)

    def _written(self, file: int) -> set[int]:
        return {offset for offset, _, _ in self._store.index.contents(file)}

    def _check_room(self, missing: Iterable[Placement]) -> None:
        needed = sum(placement.size for placement in missing)
        self._store.models_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_room(
            self._store.models_directory, needed, self._store.config.disk_reserve, self.model.manifest.name
        )

    def _copy_local(self, held: set[CID]) -> None:
        """Take in what other files here hold, a bounded batch at a time."""
        batch: list[Block] = []
        size = 0
        for cid in dict.fromkeys(placement.cid for placement in self.missing()):
            if cid not in held:
                continue
            # What turns out to be gone or rotten is simply missing: the store has said so.
            with suppress(BlockMissing, SourceChanged, DigestMismatch):
                batch.append(self._store.read(cid))
                size += len(batch[-1])
            if size >= self._store.config.copy_batch:
                self.write(batch)
                batch, size = [], 0
        if batch:
            self.write(batch)

    # --- writing ----------------------------------------------------------------------------

    def _write(self, blocks: Sequence[Block]) -> None:
        rows: dict[int, list[tuple[bytes, int, int]]] = {}
        for block in blocks:
            for place in self._places_of(block):
                target = self._targets[place.file]
                if target.fd is None or place.offset in target.written:
                    continue
                with reported(target.file.where, "written"):
                    write_at(target.fd, block.data, place.offset)
                rows.setdefault(place.file, []).append((block.cid.digest, place.offset, place.size))
        self._commit(rows)

    def _places_of(self, block: Block) -> Sequence[Placement]:
        places = self._places.get(block.cid)
        if places is None:
            raise LocalProtocolError(f"block {block.cid} has no place in {self.model.manifest.name}")
        for place in places:
            if place.size != len(block):
                raise MalformedManifest(
                    f"{self.model.manifest.name}: block {block.cid} has {len(block)} bytes,"
                    f" but {place.size} are to come from it"
                )
        return places

    def _commit(self, rows: Mapping[int, Sequence[tuple[bytes, int, int]]]) -> None:
        """Tell the index, which the bytes have reached before it; have the disk take them now and then."""
        if not rows:
            return
        with self._store.index.writing(power_safe=False) as writer:
            for number, places in rows.items():
                file = self._targets[number].file.id
                writer.set_unsynced(file, self._since)
                writer.add_locations(file, places)
        for number, places in rows.items():
            self._targets[number].written.update(offset for _, offset, _ in places)
            self._lacking[number] -= sum(size for _, _, size in places)
            self._targets[number].unsynced += places
            self._targets[number].marked = True
        waiting = sum(
            size for target in self._targets.values() for _, _, size in target.unsynced[target.begun :]
        )
        if waiting >= self._store.config.sync_batch // 2:
            self._sync_early()

    def _sync_early(self) -> None:
        """Have the disk take what is written so far while more is: the wait in the end is short then."""
        for target in self._targets.values():
            if target.fd is not None and target.unsynced:
                self._settle(target)
                target.begun = len(target.unsynced)
                target.early = self._disk.submit(sync_data, target.fd)

    def _settle(self, target: _Target) -> None:
        """Wait for what the disk began to take early. Raises `StoreError`."""
        early, target.early = target.early, None
        if early is not None:
            with self._on_disk(target):
                early.result()
            del target.unsynced[: target.begun]
            target.begun = 0

    @contextmanager
    def _on_disk(self, target: _Target) -> Iterator[None]:
        """The block waits for the disk; what is not known to be there is forgotten if that fails."""
        try:
            with reported(target.file.where, "written"):
                yield
        except StoreError:
            # The kernel has dropped the pages it could not write: none of them can be relied on.
            with self._store.index.writing() as writer:
                for digest, offset, _ in target.unsynced:
                    writer.drop_location(digest, target.file.id, offset)
            target.written.difference_update(offset for _, offset, _ in target.unsynced)
            target.unsynced.clear()
            target.begun = 0
            raise

    def _sync(self) -> None:
        """Wait until everything written is on the disk, and say so in the index."""
        for target in self._targets.values():
            if not target.marked or target.fd is None:
                continue
            self._settle(target)
            if target.unsynced:
                with self._on_disk(target):
                    sync_data(target.fd)
            with self._store.index.writing() as writer:
                writer.set_synced(target.file.id)
            target.marked = False
            target.unsynced.clear()

    # --- ending -----------------------------------------------------------------------------

    def _is_whole(self) -> bool:
        """Whether the files hold as many bytes as all parts together (places never overlap)."""
        contents = (self._store.index.contents(target.file.id) for target in self._targets.values())
        held = sum(length for places in contents for _, length, _ in places)
        return held == sum(ref.size for ref in self.model.manifest.parts)

    def _give_names(self) -> None:
        """Rename, then tell the index: a crash in between is mended when the store is opened."""
        for target in self._targets.values():
            file = target.file
            if not file.partial:
                continue
            with reported(file.where, "renamed"):
                file.where.replace(file.path)
                sync_directory(file.path.parent)
            with self._store.index.writing() as writer:
                writer.set_partial(file.id, False)
            target.file = StoredFile(
                file.id, file.path, file.size, 0, 0, owned=True, partial=False, lost=False
            )

    def _close_targets(self) -> None:
        self._disk.shutdown()
        for target in self._targets.values():
            if target.fd is not None:
                os.close(target.fd)
                target.fd = None


def deliver(paths: Sequence[Path], names: Sequence[str], output: Path, *, link: bool) -> list[Path]:
    """Give the user a model's files at `output`: a file, or a directory for several or an existing one."""
    into = output.is_dir() or len(names) > 1
    targets = [output / name if into else output for name in names]
    for source, target in zip(paths, targets, strict=True):
        place_file(source, target, link=link)
    return targets

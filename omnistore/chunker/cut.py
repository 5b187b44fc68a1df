"""Cutting GGUF files: read, hash, describe.

Reads each file once, hashes its blocks where they lie and hands their places to a `Sink`; it
keeps no bytes and stores nothing. Files are read with `preadv` into a small buffer, not mapped:
that is as fast as mapping (both are limited by BLAKE3), and a file truncated meanwhile is an
error instead of a SIGBUS. Implements spec/02-layout.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Final, TypeAlias

from blake3 import blake3

from omnistore.block import BLOCK_SIZE, Block
from omnistore.chunker.describe import build_manifest, build_parts
from omnistore.chunker.gguf import LIMITS, GGUFHeader, read_header_untrusted
from omnistore.chunker.layout import Extent, Gap, Layout, Placement, gaps
from omnistore.chunker.split import check_split, parse_split_name, split_names, stem_of
from omnistore.cid import CID, RAW
from omnistore.errors import InputError, MalformedGGUF, MalformedManifest, SourceChanged, UnsupportedGGUF
from omnistore.manifest import (
    MAX_TEXT,
    FileEntry,
    Manifest,
    Part,
    is_file_name,
    manifest_untrusted,
    part_untrusted,
)

Sink: TypeAlias = Callable[[Sequence[Placement]], None]
"""Takes the places of blocks, batch by batch, in file order, in the caller's thread."""
Take: TypeAlias = Callable[[int, memoryview, int], None]
"""Takes a block's bytes once they were hashed: (file number, bytes, offset in the file).

Called from several threads, in no order; the bytes are gone when it returns. What it raises ends the cut.
"""
Progress: TypeAlias = Callable[[int], None]
"""Takes the bytes hashed since the last call. May raise, which ends the cut."""

_THREADS: Final = 2
"""BLAKE3 releases the interpreter's lock: one reads, or is waited for, while the other hashes."""
_BATCH: Final = 32
"""Blocks between two calls of the sink, or thereabouts."""
_WINDOWS: Final = (1 << 20, 16 << 20, LIMITS.header_bytes)
"""How much of a file is read in search of the end of its header, in bytes."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was when it was cut: how to tell later that it has not changed."""

    path: Path
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class CutResult:
    """A model that was cut."""

    manifest: Manifest
    node: Block
    """The manifest, encoded."""
    parts: tuple[tuple[Part, Block], ...]
    """In the manifest's order, each with its encoded node."""
    headers: tuple[GGUFHeader, ...]
    layout: Layout
    sources: tuple[SourceFile, ...]


def model_files(path: Path) -> list[Path]:
    """The files of the model that `path` belongs to, in order: itself, or its whole split set.

    Raises InputError naming the file that is missing.
    """
    path = path.absolute()
    parsed = parse_split_name(path.name)
    names = (path.name,) if parsed is None else split_names(parsed[0], parsed[2])
    found = [path.with_name(name) for name in names]
    for member in found:
        fault = _not_a_file(member)
        if fault:
            beside = "" if member == path else f", which belongs to the same model as {path.name}"
            raise InputError(
                f"{member}: {fault}{beside}",
                remedy="All files of a split set must lie in one directory." if beside else None,
            )
    return found


def _not_a_file(path: Path) -> str | None:
    """Why `path` can not be cut, or None. A pipe or a device is not opened: it could wait for ever."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    if stat.S_ISDIR(mode):
        return "a directory; name a GGUF file in it"
    return None if stat.S_ISREG(mode) else "not a regular file"


def open_header(path: Path) -> GGUFHeader:
    """Read and check the header of one GGUF file."""
    with _opened(path) as source:
        return source.header()


def cut(
    paths: Sequence[Path],
    *,
    name: str | None = None,
    sha256: bool = False,
    base: CID | None = None,
    sink: Sink | None = None,
    take: Take | None = None,
    progress: Progress | None = None,
) -> CutResult:
    """Cut a model into blocks; `paths` are all its files, as `model_files` gives them.

    What `take` was given, with zeros everywhere else, is the files. Raises InputError (MalformedGGUF,
    UnsupportedGGUF) for files that can not be published, SourceChanged when a file changes while it is
    read, and what `sink`, `take` and `progress` raise.
    """
    with ExitStack() as stack:
        sources = [stack.enter_context(_opened(path)) for path in paths]
        headers = tuple(source.header() for source in sources)
        title = _check_names(paths, name)
        check_split([path.name for path in paths], headers)
        found = {number: source.nonzero_gaps(headers[number]) for number, source in enumerate(sources)}
        layout = Layout.plan(headers, [source.file.size for source in sources], found)
        pool = ThreadPoolExecutor(_THREADS, "omni-cut")
        try:
            sums = [pool.submit(source.sha256) if sha256 else None for source in sources]
            cids = _hash(pool, sources, layout, (sink, take, progress))
            entries = [_entry(source, total) for source, total in zip(sources, sums, strict=True)]
        finally:
            pool.shutdown(cancel_futures=True)
        for source in sources:
            source.check_unchanged()
    parts = tuple((part, part.encode()) for part in build_parts(headers, layout, cids))
    manifest = build_manifest(headers, entries, parts, name=title, base=base)
    node = manifest.encode()
    _check_publishable(paths[0], manifest, node, parts)
    return CutResult(manifest, node, parts, headers, layout, tuple(source.file for source in sources))


def _entry(source: _Source, total: Future[bytes] | None) -> FileEntry:
    return FileEntry(source.file.path.name, source.file.size, total.result() if total else None)


def _check_names(paths: Sequence[Path], name: str | None) -> str:
    for path in paths:
        if not is_file_name(path.name):
            raise InputError(
                f"{str(path)!r}: this file name can not be published: not every system can store it",
                remedy="Rename the file.",
            )
    title = stem_of(paths[0].name) if name is None else name
    if not 0 < len(title) <= MAX_TEXT or not _is_unicode(title):
        raise InputError(f"{title!r}: a model's name is a text of 1 to {MAX_TEXT} characters")
    return title


def _is_unicode(text: str) -> bool:
    """False for the lone surrogates by which Python shows a file name that is not UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _check_publishable(
    path: Path, manifest: Manifest, node: Block, parts: Sequence[tuple[Part, Block]]
) -> None:
    """What we publish must be what we would accept: format limits are enforced in one place."""
    try:
        manifest_untrusted(node)
        for ref, (_, block) in zip(manifest.parts, parts, strict=True):
            part_untrusted(block, ref)
    except MalformedManifest as error:
        raise UnsupportedGGUF(f"{path}: this model can not be published: {error.message}") from error


_Place: TypeAlias = tuple[Extent, int, int]
"""A block to be hashed: its extent, offset and size."""


def _hash(
    pool: ThreadPoolExecutor,
    sources: Sequence[_Source],
    layout: Layout,
    listeners: tuple[Sink | None, Take | None, Progress | None],
) -> list[CID]:
    """The CIDs of the layout's blocks, in its order; the listeners are called on the way."""
    sink, take, progress = listeners
    hashing = _Hashing(sources, list(_places(layout.extents)), take)
    cids: list[CID] = []
    try:
        for batch, digests in hashing.run(pool):
            found = [CID.of_digest(RAW, digest) for digest in digests]
            cids += found
            if sink is not None:
                sink(
                    [
                        Placement(cid, extent.file, offset, size, extent.part)
                        for cid, (extent, offset, size) in zip(found, batch, strict=True)
                    ]
                )
            if progress is not None:
                progress(sum(size for _, _, size in batch))
    finally:
        hashing.end()
    return cids


def _places(extents: Iterable[Extent]) -> Iterator[_Place]:
    for extent in sorted(extents, key=lambda extent: extent.file):
        for offset, size in extent.blocks():
            yield extent, offset, size


class _Hashing:
    """Blocks that threads hash, each the first that no other took: a file is read from front to back."""

    def __init__(self, sources: Sequence[_Source], places: Sequence[_Place], take: Take | None) -> None:
        self._sources, self._places, self._take = sources, places, take
        self._digests = [b""] * len(places)
        # Its next() is one step of the interpreter: no two threads get the same number.
        self._numbers = count()
        self._news: SimpleQueue[None] = SimpleQueue()
        self._ended = False

    def run(self, pool: ThreadPoolExecutor) -> Iterator[tuple[Sequence[_Place], list[bytes]]]:
        """Places and digests, some at a time, in order. Raises what reading and `take` raise."""
        threads = [pool.submit(self._work) for _ in range(_THREADS)]
        for thread in threads:
            thread.add_done_callback(lambda _: self._news.put(None))
        start = 0
        while start < len(self._places):
            self._news.get()
            for thread in threads:
                if thread.done():
                    thread.result()
            end = start
            while end < len(self._places) and self._digests[end]:
                end += 1
            if end > start:
                yield self._places[start:end], self._digests[start:end]
            start = end

    def end(self) -> None:
        """Have the threads stop before their next block."""
        self._ended = True

    def _work(self) -> None:
        buffer = memoryview(bytearray(BLOCK_SIZE))
        try:
            while (number := next(self._numbers)) < len(self._places) and not self._ended:
                extent, offset, size = self._places[number]
                view = buffer[:size]
                digest = self._sources[extent.file].digest(view, offset)
                if self._take is not None:
                    self._take(extent.file, view, offset)
                self._digests[number] = digest
                if number % _BATCH == _BATCH - 1:
                    self._news.put(None)
        except BaseException:
            self._ended = True
            raise


class _Source:
    """An open file that is to stay as it was when it was opened."""

    def __init__(self, path: Path, fd: int) -> None:
        status = os.fstat(fd)
        self.file = SourceFile(path, status.st_size, status.st_mtime_ns, status.st_ino)
        self._fd = fd

    def header(self) -> GGUFHeader:
        size = self.file.size
        for window in _WINDOWS:
            prefix = self._read(0, min(size, window))
            try:
                return read_header_untrusted(prefix, file_size=size, name=self.file.path.name)
            except MalformedGGUF:
                # A header cut off by the window looks malformed: believe it only of the largest one.
                if window >= min(size, LIMITS.header_bytes):
                    raise
        raise AssertionError("the last window is the limit")

    def nonzero_gaps(self, header: GGUFHeader) -> list[Gap]:
        return [(offset, size) for offset, size in gaps(header, self.file.size) if self._any(offset, size)]

    def digest(self, view: memoryview, offset: int) -> bytes:
        """That of the bytes at `offset`, which are in `view` afterwards."""
        self._read_into(view, offset)
        return blake3(view).digest()

    def sha256(self) -> bytes:
        import hashlib  # 3 ms, for OpenSSL, and few ask for it

        total = hashlib.sha256()
        buffer = memoryview(bytearray(BLOCK_SIZE))
        for offset in range(0, self.file.size, BLOCK_SIZE):
            view = buffer[: min(BLOCK_SIZE, self.file.size - offset)]
            self._read_into(view, offset)
            total.update(view)
        return total.digest()

    def check_unchanged(self) -> None:
        try:
            now = self.file.path.stat()
        except OSError:
            raise self._changed() from None
        if (now.st_size, now.st_mtime_ns, now.st_ino) != (
            self.file.size,
            self.file.mtime_ns,
            self.file.inode,
        ):
            raise self._changed()

    def _any(self, offset: int, size: int) -> bool:
        for start in range(offset, offset + size, BLOCK_SIZE):
            piece = self._read(start, min(BLOCK_SIZE, offset + size - start))
            if piece != bytes(len(piece)):
                return True
        return False

    def _read(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        self._read_into(memoryview(data), offset)
        return data

    def _read_into(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise InputError(f"{self.file.path}: can not be read: {error.strerror}") from error
            if count == 0:
                raise self._changed()
            done += count

    def _changed(self) -> SourceChanged:
        return SourceChanged(
            f"{self.file.path} changed while it was being read", remedy="Add it again once it is complete."
        )


@contextmanager
def _opened(path: Path) -> Iterator[_Source]:
    try:
        # Asked before opening: opening a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path}: not a regular file")
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    try:
        yield _Source(path, fd)
    finally:
        os.close(fd)

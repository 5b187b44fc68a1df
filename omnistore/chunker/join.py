"""Joining blocks back into GGUF files: the reverse of `cut`.

Writes what it is given where `resolve_untrusted` said, checks every block's digest once more and
leaves the rest a hole of zeros. Whether the placements are a whole model is the caller's to
know: from those of a partial pin comes a sparse file of full length.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from omnistore.block import Block
from omnistore.chunker.layout import Placement
from omnistore.cid import CID
from omnistore.errors import DigestMismatch, InputError, StoreFull
from omnistore.manifest import FileEntry

Read: TypeAlias = Callable[[CID], bytes | memoryview]
"""Gives the bytes of a block, or raises an error of the tree (BlockMissing, …)."""


def join(
    files: Sequence[FileEntry], placements: Iterable[Placement], read: Read, directory: Path
) -> list[Path]:
    """Rebuild a model's files in `directory`; each appears under its name only when it is complete."""
    of_file: list[list[Placement]] = [[] for _ in files]
    for placement in placements:
        of_file[placement.file].append(placement)
    paths = [directory / entry.name for entry in files]
    for path, entry, own in zip(paths, files, of_file, strict=True):
        join_file(path, entry.size, own, read)
    return paths


def join_file(path: Path, size: int, placements: Iterable[Placement], read: Read) -> None:
    """Rebuild one file of `size` bytes at `path`: temporary file, fsync, rename.

    Raises DigestMismatch when `read` gives other bytes than the CID's, StoreFull when the disk is
    full; `path` is then as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.ftruncate(fd, size)
            for placement in placements:
                _write(fd, placement, read(placement.cid))
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreFull(
                f"{path}: no room for {size:,} bytes", remedy="Free some space, or choose another disk."
            ) from error
        raise InputError(f"{path}: can not be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _write(fd: int, placement: Placement, data: bytes | memoryview) -> None:
    if len(data) != placement.size:
        raise DigestMismatch(f"block {placement.cid} has {len(data)} bytes, not {placement.size}")
    block = Block.verify_untrusted(placement.cid, data)
    view = memoryview(block.data)
    done = 0
    while done < placement.size:
        done += os.pwrite(fd, view[done:], placement.offset + done)


def _sync_directory(directory: Path) -> None:
    """Make the rename durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

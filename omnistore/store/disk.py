"""Files on disk: whole writes, room, locks between processes, copies without copying.

Everything raises errors of the tree that name the file. Knows nothing of blocks or the index.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from omnistore.config import sync_directory
from omnistore.errors import InputError, StoreError, StoreFull, StoreLocked

BRIEFLY: Final = 30.0
"""Seconds that somebody waits for a brief holder of a lock: deleting a file of 40 GB takes some."""
_BRIEF: Final = " briefly"
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FICLONE: Final = 0x40049409
"""Linux: share another file's extents (btrfs, XFS, bcachefs)."""
_COPY_STEP: Final = 16 << 20
"""Bytes copied between two reports of progress."""
_WRITE_STEP: Final = 4 << 20
"""Bytes that the disk is told to write at a time: few enough that it begins at once."""

Progress = Callable[[int], None]


@contextmanager
def reported(path: Path, doing: str) -> Iterator[None]:
    """Turn an `OSError` into `StoreFull` or `StoreError`; `doing` completes "can not be …"."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFull(
                f"{path}: the disk is full", remedy="Free some space, or run `omni gc`, and try again."
            ) from error
        raise StoreError(f"{path} can not be {doing}: {error.strerror}") from error


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data`, however often the kernel stops early."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def write_through(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data`, and have the disk begin with each few megabytes as soon as they are whole.

    It writes while more is being written; `sync_data` then has little left to wait for.
    """
    write_at(fd, data, offset)
    end = (offset + len(data)) // _WRITE_STEP * _WRITE_STEP
    if end > offset and sys.platform.startswith("linux"):
        # Linux starts to write these pages, which it can not drop before that is done.
        os.posix_fadvise(fd, end - _WRITE_STEP, _WRITE_STEP, os.POSIX_FADV_DONTNEED)


def sync_data(fd: int) -> None:
    """Make a file's bytes durable."""
    if sys.platform == "darwin":
        # fsync there only hands the bytes to the drive's cache.
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(fd)


@contextmanager
def reserved(target: Path, size: int) -> Iterator[int]:
    """A new file of `size` zero bytes, its space taken where the file system can: its descriptor."""
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if sys.platform.startswith("linux") and size:
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError as error:
                if error.errno in _FULL:
                    raise
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def boot_id() -> str:
    """Names this start of the machine: bytes in the page cache are safe while it stays the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        import psutil

        return f"booted at {psutil.boot_time():.0f}"


def check_room(directory: Path, needed: int, reserve: int, what: str) -> None:
    """Raise `StoreFull` unless `needed` bytes fit with `reserve` to spare."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if needed and needed + reserve > free:
        raise StoreFull(
            f"{what} needs {needed:,} bytes in {directory}, where {free:,} are free"
            f" and {reserve:,} stay reserved",
            remedy="Free some space, run `omni gc`, or set OMNI_HOME to a larger disk.",
        )


def allocated(path: Path) -> int:
    """Bytes that a file takes on disk (a hole takes none); 0 for one that is not there."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


class FileLock:
    """A lock between processes (and within one) that dies with its holder."""

    def __init__(self, path: Path, what: str, *, brief: bool = False, wait: bool = False) -> None:
        """Take the lock. Raises `StoreLocked`, naming the process that holds it.

        `brief`: it will be held for no longer than some files take to be deleted. `wait`: for such a holder.
        """
        with reported(path, "locked"):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        until = time.monotonic() + (BRIEFLY if wait else 0.0)
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                holder = os.pread(fd, 40, 0).decode("ascii", "replace").strip()
            # Nothing is written there yet when it was taken only now.
            if time.monotonic() >= until or (holder and not holder.endswith(_BRIEF)):
                os.close(fd)
                raise StoreLocked(
                    f"{what} is in use by process {holder.removesuffix(_BRIEF) or '(unknown)'}",
                    remedy="Wait for it to end, or end it, and try again.",
                )
            time.sleep(0.02)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}{_BRIEF if brief else ''}\n".encode(), 0)
        self._path = path
        self._fd: int | None = fd

    def release(self) -> None:
        """Let go; safe to call twice. The file stays: removing it would let two hold the lock."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def remove(self) -> None:
        """Let go for good: only for a lock whose name nobody will ever ask for again."""
        self._path.unlink(missing_ok=True)
        self.release()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def copy_file(source: Path, target: Path, progress: Progress | None = None) -> None:
    """Make `target`, which must not exist, a durable copy of `source`: shared extents where the file
    system can, the kernel's own copy where it can, bytes otherwise."""
    with reported(target, "written"), source.open("rb") as reading, target.open("xb") as writing:
        size = os.fstat(reading.fileno()).st_size
        if _clone(reading.fileno(), writing.fileno()):
            if progress:
                progress(size)
        else:
            _copy_bytes(reading.fileno(), writing.fileno(), size, progress)
        os.fsync(writing.fileno())


def cloned(source: Path, target: Path) -> bool:
    """Make `target`, which must not exist, a durable copy that shares `source`'s extents; False if it
    can not be done here, and then there is no target."""
    with reported(target, "written"), source.open("rb") as reading, target.open("xb") as writing:
        if _clone(reading.fileno(), writing.fileno()):
            os.fsync(writing.fileno())
            return True
    target.unlink()
    return False


def _clone(source: int, target: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def _copy_bytes(source: int, target: int, size: int, progress: Progress | None) -> None:
    done, in_kernel = 0, hasattr(os, "copy_file_range")
    while done < size:
        step = min(_COPY_STEP, size - done)
        if in_kernel:
            try:
                count = os.copy_file_range(source, target, step, done, done)
            except OSError as error:
                if error.errno in _FULL:
                    raise
                in_kernel = False
                continue
        else:
            data = os.pread(source, step, done)
            write_at(target, data, done)
            count = len(data)
        if count == 0:
            break
        done += count
        if progress:
            progress(count)


def place_file(source: Path, target: Path, *, link: bool, progress: Progress | None = None) -> None:
    """Give the user a file: shared extents, else a hard link if `link` allows, else a copy.

    `target` appears whole or not at all. One that is there already is left alone if it has the same
    bytes, else refused with `InputError`.
    """
    if target.exists():
        if _same_bytes(source, target):
            return
        raise InputError(f"{target} exists and is another file", remedy="Remove it or choose another path.")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    with reported(target, "written"):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not (link and _linked(source, temporary)):
                copy_file(source, temporary, progress)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(target.parent)


def _linked(source: Path, target: Path) -> bool:
    if cloned(source, target):
        return True
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _same_bytes(one: Path, other: Path) -> bool:
    with one.open("rb") as a, other.open("rb") as b:
        first, second = os.fstat(a.fileno()), os.fstat(b.fileno())
        if (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino):
            return True
        if first.st_size != second.st_size:
            return False
        while data := a.read(1 << 20):
            if data != b.read(len(data)):
                return False
    return True

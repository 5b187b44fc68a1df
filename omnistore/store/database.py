"""Connections to the index: one writer, a pool of readers, and SQLite's faults translated.

WAL lets readers go on while a transaction is written; with `synchronous=FULL` a commit lasts
through a power cut. Knows no tables, only the schema's version.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from omnistore.errors import StoreError, StoreFull, StoreLocked
from omnistore.store import schema

_PAGE_CACHE_KIB: Final = 16 << 10
"""Page cache of one connection: the inner pages of an index of ten million blocks."""


class Database:
    """One SQLite file, safe to use from several threads and beside other processes."""

    def __init__(self, path: Path, busy_timeout: float) -> None:
        """Open or make the index; `busy_timeout` in seconds. Raises `StoreError` and its leaves."""
        self.path = path
        self._busy_timeout = busy_timeout
        self._idle: list[sqlite3.Connection] = []
        self._write_lock = threading.Lock()
        self._watcher: sqlite3.Connection | None = None
        with self._translated():
            self._writer = self._connect()
            with self.alone():
                self._writer.execute("PRAGMA journal_mode = WAL")
                schema.prepare(self._writer, str(path))

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection to read with; what it sees may be older than a write that is going on."""
        with self._translated():
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._connect()
            try:
                yield connection
            finally:
                self._idle.append(connection)

    @contextmanager
    def writing(self, *, power_safe: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction, all of it kept when the block ends and undone when it raises.

        Kept through a crash of the process always; through a power cut if `power_safe`, which waits for the
        disk. Either way, what a power cut leaves is a prefix of the transactions, in order.
        """
        with self._write_lock, self._translated():
            self._writer.execute(f"PRAGMA synchronous = {'FULL' if power_safe else 'NORMAL'}")
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some faults, such as a full disk.
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from opening the index, waiting until those that are at it have."""
        with exclusive(self.path.with_name(self.path.name + ".lock")):
            yield

    def version(self) -> int:
        """A number that changes whenever anybody commits: us, or another process."""
        with self._translated():
            # SQLite counts for each connection what all the others committed: this one never writes.
            self._watcher = self._watcher or self._connect()
            return int(self._watcher.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        """Close every connection."""
        with self._write_lock:
            if self._watcher is not None:
                self._watcher.close()
            while self._idle:
                self._idle.pop().close()
            self._writer.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=self._busy_timeout, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA cache_size = -{_PAGE_CACHE_KIB}")
        return connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _translate(self.path, error) from error


def _translate(path: Path, error: sqlite3.Error) -> StoreError:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StoreLocked(
            f"another process keeps writing to {path}", remedy="Wait for it, or end it, and try again."
        )
    if name == "SQLITE_FULL":
        return StoreFull(f"the disk of {path} is full", remedy="Free some space, or run `omni gc`.")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return StoreError(
            f"{path} is damaged: {error}",
            remedy="Move it away and `omni add` or `omni pin` the models again; no weights are in it.",
        )
    return StoreError(f"{path}: {error}", remedy="Check that its directory exists and can be written.")


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock between processes, waiting for it: two that make an index at once must take turns."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)

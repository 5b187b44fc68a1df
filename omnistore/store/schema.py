"""The index's tables and their migrations.

SQL is written in `omnistore/store` only: tables here, queries in `index`, garbage collection in
`sweep`. A digest (32 bytes) is the key of blocks and nodes alike: the codec follows from the table.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from omnistore.errors import StoreError

_FIRST: Final = (
    # A GGUF file: the user's own (referenced in place) or ours (`owned`). `path` is the name it has when
    # whole; while `partial` it is called `path` + '.part'. `lost`: gone; its locations do not count.
    # `unsynced`: since which start of the machine it has had writes that a power cut would undo.
    """CREATE TABLE files (
        id INTEGER PRIMARY KEY,
        path TEXT NOT NULL UNIQUE,
        size INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL,
        inode INTEGER NOT NULL,
        owned INTEGER NOT NULL,
        partial INTEGER NOT NULL DEFAULT 0,
        lost INTEGER NOT NULL DEFAULT 0,
        unsynced TEXT
    )""",
    """CREATE TABLE locations (
        digest BLOB NOT NULL,
        file INTEGER NOT NULL REFERENCES files(id) ON DELETE CASCADE,
        offset INTEGER NOT NULL,
        length INTEGER NOT NULL,
        PRIMARY KEY (digest, file, offset)
    ) WITHOUT ROWID""",
    "CREATE INDEX locations_of_file ON locations (file, offset)",
    # `added` in seconds since 1970: garbage collection spares what is new.
    """CREATE TABLE nodes (
        id INTEGER PRIMARY KEY,
        digest BLOB NOT NULL UNIQUE,
        data BLOB NOT NULL,
        added INTEGER NOT NULL
    )""",
    # The blocks of a part's node; `bytes` counts a block as often as the part has it.
    """CREATE TABLE links (
        node INTEGER NOT NULL REFERENCES nodes(id) ON DELETE CASCADE,
        digest BLOB NOT NULL,
        bytes INTEGER NOT NULL,
        PRIMARY KEY (node, digest)
    ) WITHOUT ROWID""",
    # `cid` (binary) is what people name the model by: the signed manifest's, or the bare one's.
    """CREATE TABLE models (
        id INTEGER PRIMARY KEY,
        cid BLOB NOT NULL UNIQUE,
        manifest BLOB NOT NULL,
        name TEXT NOT NULL
    )""",
    "CREATE INDEX models_of_manifest ON models (manifest)",
    # `node` is the digest of the part's node; `checked`: it is held, was decoded against this manifest's
    # reference, and its links are stored.
    """CREATE TABLE parts (
        model INTEGER NOT NULL REFERENCES models(id) ON DELETE CASCADE,
        kind TEXT NOT NULL,
        number INTEGER NOT NULL,
        node BLOB NOT NULL,
        checked INTEGER NOT NULL DEFAULT 0,
        pinned INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (model, kind, number)
    ) WITHOUT ROWID""",
    # Which files hold a model, by the file's number in its manifest; one number may have several.
    """CREATE TABLE model_files (
        model INTEGER NOT NULL REFERENCES models(id) ON DELETE CASCADE,
        number INTEGER NOT NULL,
        file INTEGER NOT NULL REFERENCES files(id) ON DELETE CASCADE,
        PRIMARY KEY (model, number, file)
    ) WITHOUT ROWID""",
    "CREATE INDEX models_of_file ON model_files (file)",
)
# When blocks of a file were last read or written, in seconds since 1970: what eviction goes by.
_SECOND: Final = ("ALTER TABLE files ADD COLUMN used INTEGER NOT NULL DEFAULT 0",)
# Where the user says that a model's files lie on the web too; no part of what is signed.
_THIRD: Final = (
    """CREATE TABLE mirrors (
        model INTEGER NOT NULL REFERENCES models(id) ON DELETE CASCADE,
        url TEXT NOT NULL,
        PRIMARY KEY (model, url)
    ) WITHOUT ROWID""",
)

_MIGRATIONS: Final = {"0001_first": _FIRST, "0002_last_use": _SECOND, "0003_mirrors": _THIRD}
"""By the name that an index keeps of those it has had, in order."""
VERSION: Final = len(_MIGRATIONS)
"""`PRAGMA user_version` of an index that has every migration."""


def prepare(connection: sqlite3.Connection, path: str) -> None:
    """Bring the index at `path` up to date. Raises `StoreError` for one made by a newer release.

    A new one is made as it is now; what an older one lacks, migrations add. The caller sees to it that no
    other process does the same at this moment.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise StoreError(
            f"{path} was made by a newer release of omni (its version is {version}, ours {VERSION})",
            remedy="Upgrade omni, or set OMNI_HOME to another directory.",
        )
    if version == 0 and connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is None:
        _make(connection)
    elif version < VERSION:
        _migrate(connection, version)


def _make(connection: sqlite3.Connection) -> None:
    """A new index, in one transaction: one wait for the disk, all or nothing."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for statements in _MIGRATIONS.values():
            _execute(statements, connection)
        connection.execute(f"PRAGMA user_version = {VERSION}")


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    """What an older index lacks, in one transaction."""
    # It takes 60 ms to import, a fifth of adding a gigabyte, and neither a new index nor one that is up to
    # date needs it.
    with _without("numpy"):
        from sqlite_utils import Database, Migrations

    migrations = Migrations("omni")
    for number, (name, statements) in enumerate(_MIGRATIONS.items()):
        # What the index was made with is only noted, by whom it was made new.
        migrations(name=name)(partial(_execute, statements if number >= version else ()))
    database = Database(connection, execute_plugins=False)
    with database.atomic():
        migrations.apply(database)
        connection.execute(f"PRAGMA user_version = {VERSION}")


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Hide a module from what is imported here, which would take it where it is installed.

    sqlite_utils converts numpy's numbers; we have none, and numpy takes as long to import as all the rest.
    """
    hidden = module not in sys.modules
    if hidden:
        sys.modules[module] = None  # type: ignore[assignment]  # what the import system knows as absent
    try:
        yield
    finally:
        if hidden:
            del sys.modules[module]


def _execute(statements: Sequence[str], database: Any) -> None:
    for statement in statements:
        database.execute(statement)

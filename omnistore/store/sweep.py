"""Garbage collection: free what no pin reaches, and never a file of the user's.

Mark and sweep in SQL, in one transaction; files are deleted after it has committed. A crash in
between leaves files that the index does not name, which the next sweep deletes. The last
copy of a block that a pin reaches stays, whichever model's file it lies in. What engines packed goes with
the last model that has the part.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from omnistore.errors import StoreLocked
from omnistore.store.disk import FileLock, allocated, reported
from omnistore.store.files import FileStore
from omnistore.store.index import part_path
from omnistore.store.packed import unreached
from omnistore.store.publish import INCOMING

_MARK: Final = (
    "CREATE TEMP TABLE IF NOT EXISTS marked (digest BLOB PRIMARY KEY) WITHOUT ROWID",
    "DELETE FROM marked",
    "INSERT OR IGNORE INTO marked SELECT k.digest FROM parts p JOIN nodes n ON n.digest = p.node"
    " JOIN links k ON k.node = n.id WHERE p.pinned = 1",
)
_KEPT_FILE: Final = "EXISTS (SELECT 1 FROM model_files m WHERE m.file = {}.id)"
_GARBAGE_FILES: Final = (
    "SELECT f.id, f.path, f.owned FROM files f"
    f" WHERE NOT {_KEPT_FILE.format('f')}"
    " AND NOT EXISTS (SELECT 1 FROM locations l JOIN marked ON marked.digest = l.digest"
    "  WHERE l.file = f.id AND NOT EXISTS (SELECT 1 FROM locations o JOIN files g ON g.id = o.file"
    f"   WHERE o.digest = l.digest AND g.lost = 0 AND {_KEPT_FILE.format('g')}))"
)
_REACHED_NODES: Final = (
    "SELECT node FROM parts"
    " UNION SELECT substr(cid, 5) FROM models UNION SELECT substr(manifest, 5) FROM models"
)


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep freed, or would free."""

    models: tuple[str, ...]
    """Names of models forgotten."""
    nodes: int
    files: tuple[Path, ...]
    """Files of ours deleted."""
    bytes: int
    """Disk space of those files."""
    released: tuple[Path, ...]
    """The user's files that are no longer referenced, and were not touched."""


def sweep(
    store: FileStore, *, now: float, dry_run: bool = False, only: Collection[int] | None = None
) -> Swept:
    """Free what no pin keeps; `now` in seconds since 1970. With `dry_run` nothing changes.

    With `only`, of the models without pins just these rows go.
    """
    with ExitStack() as stack:
        busy = _lock_unpinned(store, stack)
        models, nodes, garbage, parts = _sweep_index(
            store, busy, only, now - store.config.node_grace, dry_run
        )
        doomed = [path for path, owned in garbage if owned]
        found = [path for base in doomed for path in (base, part_path(base)) if path.exists()]
        found += unreached(store.config.home, parts, now)
        freed = free_files(found, dry_run)
    for path in _orphans(store):
        if path not in found:
            freed += free_files([path], dry_run)
            found.append(path)
    if not dry_run:
        _remove_empty(store)
    return Swept(models, nodes, tuple(found), freed, tuple(path for path, owned in garbage if not owned))


def _lock_unpinned(store: FileStore, stack: ExitStack) -> set[bytes]:
    """Lock every model without pins, so that nobody starts to fetch it now; those in use are returned."""
    busy: set[bytes] = set()
    manifests = {row.manifest for row in store.index.models() if not store.index.pinned(row.id)}
    for manifest in manifests:
        try:
            stack.enter_context(store.lock_model(manifest, str(manifest), brief=True))
        except StoreLocked:
            busy.add(manifest.binary)
    return busy


def _sweep_index(
    store: FileStore, busy: Iterable[bytes], only: Collection[int] | None, before: float, dry_run: bool
) -> tuple[tuple[str, ...], int, list[tuple[Path, bool]], set[bytes]]:
    """Names of models that went, how many nodes did, garbage files with whether they are ours, and the
    digests of the parts that models still have."""
    with _transaction(store, dry_run) as db:
        for statement in _MARK:
            db.execute(statement)
        kept = list(busy)
        unpinned = db.execute(
            "SELECT id, name, cid, manifest FROM models"
            " WHERE id NOT IN (SELECT model FROM parts WHERE pinned = 1)"
            f" AND manifest NOT IN ({','.join('?' * len(kept))})",
            kept,
        ).fetchall()
        if only is not None:
            unpinned = [row for row in unpinned if row[0] in only]
        for model, _, cid, manifest in unpinned:
            # The grace is for nodes on their way to a model; these have had theirs.
            digests = (
                "SELECT node FROM parts WHERE model = ? UNION SELECT substr(?, 5) UNION SELECT substr(?, 5)"
            )
            db.execute(f"UPDATE nodes SET added = 0 WHERE digest IN ({digests})", (model, cid, manifest))
            db.execute("DELETE FROM models WHERE id = ?", (model,))
        garbage = db.execute(_GARBAGE_FILES).fetchall()
        db.executemany("DELETE FROM files WHERE id = ?", ((file,) for file, _, _ in garbage))
        nodes = db.execute(
            f"DELETE FROM nodes WHERE added < ? AND digest NOT IN ({_REACHED_NODES})", (int(before),)
        ).rowcount
        parts = {node for (node,) in db.execute("SELECT DISTINCT node FROM parts")}
    files = [(Path(path), bool(owned)) for _, path, owned in garbage]
    return tuple(row[1] for row in unpinned), nodes, files, parts


class _DryRun(Exception):
    """Undoes the transaction of a dry run."""


@contextmanager
def _transaction(store: FileStore, dry_run: bool) -> Iterator[sqlite3.Connection]:
    with suppress(_DryRun), store.database.writing() as db:
        yield db
        if dry_run:
            raise _DryRun


def _orphans(store: FileStore) -> Iterator[Path]:
    """Files under the home that the index does not name: what a crash left behind.

    Each is yielded while its directory is locked; those in use are passed over.
    """
    for directory in sorted(store.models_directory.glob("*/")):
        lock = store.config.home / "locks" / f"{directory.name}.lock"
        with suppress(StoreLocked), FileLock(lock, directory.name, brief=True) as held:
            # Read only now: before we had the lock, somebody may have been renaming.
            named = {file.where for _, file in store.index.files()}
            yield from (path for path in sorted(directory.iterdir()) if path not in named)
            if directory.name.startswith(INCOMING):
                held.remove()


def free_files(paths: Iterable[Path], dry_run: bool) -> int:
    """Delete files; the bytes that gives back, which is none while another name keeps them."""
    freed = 0
    for path in paths:
        with reported(path, "deleted"):
            freed += allocated(path) if path.stat().st_nlink == 1 else 0
            if not dry_run:
                path.unlink()
    return freed


def _remove_empty(store: FileStore) -> None:
    for directory in store.models_directory.glob("*"):
        with suppress(OSError):
            directory.rmdir()

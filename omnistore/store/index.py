"""What the index says and how it is changed: every query and every row of the store.

`Index` reads; `Writer`, alive within one transaction, changes. Rows become the small records below.
Deciding what to write, and in which order with the files, is `omnistore.store.files`' and
`omnistore.store.assembly`'s; what may be deleted is `omnistore.store.sweep`'s.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

from omnistore.cid import CID
from omnistore.errors import InputError, LocalProtocolError
from omnistore.manifest import PartKey, PartKind
from omnistore.store.database import Database

_IN_ONE_QUERY: Final = 512
"""Digests asked for at once: fewer queries, and well under SQLite's limit of variables."""
_KINDS: Final[Mapping[str, PartKind]] = {kind: kind for kind in get_args(PartKind)}
_FILE_COLUMNS: Final = "f.id, f.path, f.size, f.mtime_ns, f.inode, f.owned, f.partial, f.lost, f.unsynced"
_PRESENT: Final = (
    "EXISTS (SELECT 1 FROM locations x JOIN files g ON g.id = x.file WHERE x.digest = {} AND g.lost = 0)"
)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A GGUF file that blocks lie in."""

    id: int
    path: Path
    """Its name when whole."""
    size: int
    mtime_ns: int
    inode: int
    """With size and mtime: how a referenced file looked when it was added. Meaningless for an owned one."""
    owned: bool
    """Under the home and ours to delete; otherwise the user's own."""
    partial: bool
    lost: bool
    unsynced: str | None = None
    """The start of the machine since which it has had writes that a power cut would undo."""

    @property
    def where(self) -> Path:
        """The name it has now."""
        return part_path(self.path) if self.partial else self.path


@dataclass(frozen=True, slots=True)
class Location:
    """Where a block's bytes are."""

    file: StoredFile
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model known here."""

    id: int
    cid: CID
    manifest: CID
    name: str


@dataclass(frozen=True, slots=True)
class PartState:
    """How much of one part is held."""

    key: PartKey
    checked: bool
    """Its node was decoded against the manifest."""
    pinned: bool
    bytes_held: int
    complete: bool


def part_path(path: Path) -> Path:
    """What a file is called while it is not whole."""
    return path.with_name(path.name + ".part")


class Index:
    """The rows of one home."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @contextmanager
    def writing(self, *, power_safe: bool = True) -> Iterator[Writer]:
        """One transaction: all of it is kept when the block ends, none of it when it raises.

        Without `power_safe` it outlives the process but perhaps not the machine, and takes no time.
        """
        with self._database.writing(power_safe=power_safe) as connection:
            yield Writer(connection)

    def has_block(self, digest: bytes) -> bool:
        with self._database.reading() as db:
            return bool(db.execute(f"SELECT {_PRESENT.format('?')}", (digest,)).fetchone()[0])

    def has_node(self, digest: bytes) -> bool:
        with self._database.reading() as db:
            return db.execute("SELECT 1 FROM nodes WHERE digest = ?", (digest,)).fetchone() is not None

    def held_blocks(self, digests: Collection[bytes]) -> set[bytes]:
        """Those of `digests` with a location in a file that is not lost."""
        query = (
            "SELECT DISTINCT l.digest FROM locations l JOIN files f ON f.id = l.file"
            " WHERE f.lost = 0 AND l.digest IN ({})"
        )
        return self._those(query, digests)

    def held_nodes(self, digests: Collection[bytes]) -> set[bytes]:
        """Those of `digests` that are nodes held."""
        return self._those("SELECT digest FROM nodes WHERE digest IN ({})", digests)

    def _those(self, query: str, digests: Collection[bytes]) -> set[bytes]:
        wanted, found = list(digests), set[bytes]()
        with self._database.reading() as db:
            for start in range(0, len(wanted), _IN_ONE_QUERY):
                some = wanted[start : start + _IN_ONE_QUERY]
                # Few different statements, each kept prepared: the last digest again, up to a power of two.
                some += some[-1:] * ((1 << (len(some) - 1).bit_length()) - len(some))
                marks = ",".join("?" * len(some))
                found.update(digest for (digest,) in db.execute(query.format(marks), some))
        return found

    def locations(self, digest: bytes) -> list[Location]:
        """Everywhere a block is, our own copies first."""
        query = (
            f"SELECT {_FILE_COLUMNS}, l.offset, l.length FROM locations l JOIN files f ON f.id = l.file"
            " WHERE l.digest = ? AND f.lost = 0 ORDER BY f.owned DESC, f.id, l.offset"
        )
        with self._database.reading() as db:
            return [Location(_file(row), row[-2], row[-1]) for row in db.execute(query, (digest,))]

    def node(self, digest: bytes) -> bytes | None:
        with self._database.reading() as db:
            row = db.execute("SELECT data FROM nodes WHERE digest = ?", (digest,)).fetchone()
            return None if row is None else row[0]

    def models(self) -> list[ModelRow]:
        """Every model, by name."""
        with self._database.reading() as db:
            rows = db.execute("SELECT id, cid, manifest, name FROM models ORDER BY name, cid").fetchall()
        return [_model(row) for row in rows]

    def model(self, cid: CID) -> ModelRow | None:
        """The model under its own CID or its manifest's (the first of several publishers')."""
        query = (
            "SELECT id, cid, manifest, name FROM models WHERE cid = ?1 OR manifest = ?1"
            " ORDER BY cid = ?1 DESC, cid <> manifest DESC, id LIMIT 1"
        )
        with self._database.reading() as db:
            row = db.execute(query, (cid.binary,)).fetchone()
        return None if row is None else _model(row)

    def parts(self, model: int) -> list[PartState]:
        """The parts of a model in the manifest's order."""
        query = (
            "SELECT p.kind, p.number, p.checked, p.pinned, TOTAL(l.bytes),"
            f" TOTAL(CASE WHEN {_PRESENT.format('l.digest')} THEN l.bytes ELSE 0 END)"
            " FROM parts p LEFT JOIN nodes n ON n.digest = p.node LEFT JOIN links l ON l.node = n.id"
            " WHERE p.model = ? GROUP BY p.kind, p.number"
        )
        with self._database.reading() as db:
            rows = db.execute(query, (model,)).fetchall()
        found = [
            PartState(
                PartKey(_KINDS[kind], number), bool(checked), bool(pinned), int(held), held == total > 0
            )
            for kind, number, checked, pinned, total, held in rows
        ]
        return sorted(found, key=lambda state: state.key.rank)

    def pinned(self, model: int) -> bool:
        """Whether any part of a model is pinned."""
        with self._database.reading() as db:
            query = "SELECT 1 FROM parts WHERE model = ? AND pinned = 1 LIMIT 1"
            return db.execute(query, (model,)).fetchone() is not None

    def checked_parts(self, model: int) -> set[PartKey]:
        """Parts whose node is held and was decoded against this model's manifest."""
        query = (
            "SELECT p.kind, p.number FROM parts p JOIN nodes n ON n.digest = p.node"
            " WHERE p.model = ? AND p.checked = 1"
        )
        with self._database.reading() as db:
            return {PartKey(_KINDS[kind], number) for kind, number in db.execute(query, (model,))}

    def whole_parts(self) -> set[bytes]:
        """Digests of the nodes of all parts whose every block is held."""
        query = (
            "SELECT DISTINCT p.node FROM parts p JOIN nodes n ON n.digest = p.node WHERE p.checked = 1"
            " AND NOT EXISTS (SELECT 1 FROM links l WHERE l.node = n.id"
            f" AND NOT {_PRESENT.format('l.digest')})"
        )
        with self._database.reading() as db:
            return {digest for (digest,) in db.execute(query)}

    def files(self, model: int | None = None) -> list[tuple[int, StoredFile]]:
        """(number in the manifest, file) of one model's files, or of every file here (number 0)."""
        if model is None:
            query, values = f"SELECT {_FILE_COLUMNS}, 0 FROM files f ORDER BY f.path", ()
        else:
            query = (
                f"SELECT {_FILE_COLUMNS}, m.number FROM model_files m JOIN files f ON f.id = m.file"
                f" WHERE m.model = {int(model)} ORDER BY m.number, f.lost, f.partial, f.owned, f.id"
            )
            values = ()
        with self._database.reading() as db:
            return [(row[-1], _file(row)) for row in db.execute(query, values)]

    def mirrors(self, cid: CID) -> list[str]:
        """URLs recorded for the model under its own CID, or for any that has this manifest."""
        query = (
            "SELECT DISTINCT u.url FROM mirrors u JOIN models m ON m.id = u.model"
            " WHERE m.cid = ?1 OR m.manifest = ?1 ORDER BY u.url"
        )
        with self._database.reading() as db:
            return [url for (url,) in db.execute(query, (cid.binary,))]

    def evictable(self) -> list[int]:
        """Models that nothing pins and that have files of ours, the least recently used first."""
        query = (
            "SELECT m.id FROM models m JOIN model_files o ON o.model = m.id JOIN files f ON f.id = o.file"
            " WHERE f.owned = 1 AND m.id NOT IN (SELECT model FROM parts WHERE pinned = 1)"
            " GROUP BY m.id ORDER BY MAX(f.used), m.id"
        )
        with self._database.reading() as db:
            return [model for (model,) in db.execute(query)]

    def contents(self, file: int) -> list[tuple[int, int, bytes]]:
        """(offset, length, digest) of every block that lies in a file, in file order."""
        query = "SELECT offset, length, digest FROM locations WHERE file = ? ORDER BY offset"
        with self._database.reading() as db:
            return db.execute(query, (file,)).fetchall()

    def totals(self) -> tuple[int, int]:
        """(distinct blocks held, nodes held)."""
        with self._database.reading() as db:
            blocks = db.execute("SELECT COUNT(DISTINCT digest) FROM locations").fetchone()[0]
            return blocks, db.execute("SELECT COUNT(*) FROM nodes").fetchone()[0]


class Writer:
    """The changes that one transaction may make."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    def put_node(self, digest: bytes, data: bytes, now: float) -> None:
        self._db.execute(
            "INSERT INTO nodes (digest, data, added) VALUES (?, ?, ?)"
            " ON CONFLICT (digest) DO UPDATE SET added = MAX(added, excluded.added)",
            (digest, data, int(now)),
        )

    def put_model(self, cid: CID, manifest: CID, name: str) -> int:
        """The model's id. A model first known by its bare manifest becomes the signed one."""
        if cid == manifest:
            query = "SELECT id FROM models WHERE manifest = ? ORDER BY id"
            row = self._db.execute(query, (manifest.binary,)).fetchone()
            if row is not None:
                return int(row[0])
        else:
            self._db.execute(
                "UPDATE OR IGNORE models SET cid = ? WHERE cid = ?", (cid.binary, manifest.binary)
            )
        self._db.execute(
            "INSERT INTO models (cid, manifest, name) VALUES (?, ?, ?) ON CONFLICT (cid) DO NOTHING",
            (cid.binary, manifest.binary, name),
        )
        return int(self._db.execute("SELECT id FROM models WHERE cid = ?", (cid.binary,)).fetchone()[0])

    def put_parts(self, model: int, parts: Iterable[tuple[PartKey, CID]]) -> None:
        """Name the parts of a model and their nodes."""
        self._db.executemany(
            "INSERT INTO parts (model, kind, number, node) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
            ((model, key.kind, key.index, cid.digest) for key, cid in parts),
        )

    def put_links(self, model: int, key: PartKey, node: CID, links: Iterable[tuple[CID, int]]) -> None:
        """Note which blocks a part that was checked against its manifest is made of."""
        total: dict[bytes, int] = {}
        for cid, size in links:
            total[cid.digest] = total.get(cid.digest, 0) + size
        row = self._db.execute("SELECT id FROM nodes WHERE digest = ?", (node.digest,)).fetchone()
        if row is None:
            raise LocalProtocolError(f"the node of part {key}, {node}, is to be stored before its model")
        self._db.executemany(
            "INSERT OR IGNORE INTO links (node, digest, bytes) VALUES (?, ?, ?)",
            ((row[0], digest, size) for digest, size in sorted(total.items())),
        )
        self._db.execute(
            "UPDATE parts SET checked = 1 WHERE model = ? AND kind = ? AND number = ?",
            (model, key.kind, key.index),
        )

    def pin(self, model: int, parts: Iterable[PartKey], pinned: bool) -> None:
        self._db.executemany(
            "UPDATE parts SET pinned = ? WHERE model = ? AND kind = ? AND number = ?",
            ((pinned, model, key.kind, key.index) for key in parts),
        )

    def put_mirrors(self, model: int, urls: Iterable[str]) -> None:
        """Have these be the mirrors of a model, in place of those known before."""
        self._db.execute("DELETE FROM mirrors WHERE model = ?", (model,))
        self._db.executemany("INSERT INTO mirrors (model, url) VALUES (?, ?)", ((model, url) for url in urls))

    def put_file(self, file: StoredFile) -> int:
        """Know a file, or how it looks now; its id. `file.id` is ignored; a file of ours stays ours."""
        path = _text(file.path)
        self._db.execute(
            "INSERT INTO files (path, size, mtime_ns, inode, owned, partial) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (path) DO UPDATE SET size = excluded.size, mtime_ns = excluded.mtime_ns, lost = 0,"
            " inode = excluded.inode, owned = MAX(owned, excluded.owned), partial = excluded.partial",
            (path, file.size, file.mtime_ns, file.inode, file.owned, file.partial),
        )
        return int(self._db.execute("SELECT id FROM files WHERE path = ?", (path,)).fetchone()[0])

    def put_model_file(self, model: int, number: int, file: int) -> None:
        self._db.execute(
            "INSERT INTO model_files (model, number, file) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (model, number, file),
        )

    def add_locations(self, file: int, places: Iterable[tuple[bytes, int, int]]) -> None:
        """Note (digest, offset, length) of blocks whose bytes lie in `file`."""
        # In the order of the key, a large insertion touches each page of the tree once.
        self._db.executemany(
            "INSERT OR IGNORE INTO locations (digest, file, offset, length) VALUES (?, ?, ?, ?)",
            ((digest, file, offset, length) for digest, offset, length in sorted(places)),
        )

    def clear_locations(self, file: int) -> None:
        self._db.execute("DELETE FROM locations WHERE file = ?", (file,))

    def drop_location(self, digest: bytes, file: int, offset: int) -> None:
        self._db.execute(
            "DELETE FROM locations WHERE digest = ? AND file = ? AND offset = ?", (digest, file, offset)
        )

    def set_lost(self, file: int, lost: bool) -> None:
        self._db.execute("UPDATE files SET lost = ? WHERE id = ?", (lost, file))

    def set_unsynced(self, file: int, since: str) -> None:
        """Note that a power cut from now on would undo writes."""
        self._db.execute("UPDATE files SET unsynced = ? WHERE id = ?", (since, file))

    def set_synced(self, file: int) -> None:
        """Note that everything the index says of a file is on the disk."""
        self._db.execute("UPDATE files SET unsynced = NULL WHERE id = ?", (file,))

    def set_used(self, files: Mapping[int, float]) -> None:
        """Note when files were last used, in seconds since 1970."""
        self._db.executemany(
            "UPDATE files SET used = MAX(used, ?) WHERE id = ?",
            ((int(now), file) for file, now in files.items()),
        )

    def set_used_model(self, model: int, now: float) -> None:
        """Note that a model's files are used now."""
        self._db.execute(
            "UPDATE files SET used = MAX(used, ?) WHERE id IN (SELECT file FROM model_files WHERE model = ?)",
            (int(now), model),
        )

    def set_partial(self, file: int, partial: bool) -> None:
        self._db.execute("UPDATE files SET partial = ? WHERE id = ?", (partial, file))


def _file(row: tuple[int, str, int, int, int, int, int, int, str | None]) -> StoredFile:
    number, path, size, mtime_ns, inode, owned, partial, lost, unsynced = row[:9]
    return StoredFile(
        number, Path(path), size, mtime_ns, inode, bool(owned), bool(partial), bool(lost), unsynced
    )


def _model(row: tuple[int, bytes, bytes, str]) -> ModelRow:
    number, cid, manifest, name = row
    return ModelRow(number, CID(cid), CID(manifest), name)


def _text(path: Path) -> str:
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{text!r}: a path that is not UTF-8 can not be kept", remedy="Rename it.") from None
    return text

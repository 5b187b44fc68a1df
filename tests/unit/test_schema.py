"""An index made new, one that is brought up to date, and the record of which migrations either had."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from omnistore.store import schema


def test_a_new_index_is_what_migrations_make_of_an_empty_one(tmp_path: Path) -> None:
    def tables(db: sqlite3.Connection) -> list[tuple[str, str]]:
        query = "SELECT name, sql FROM sqlite_master WHERE name NOT LIKE '%_sqlite_%' ORDER BY name"
        return [*db.execute(query).fetchall(), ("version", db.execute("PRAGMA user_version").fetchone()[0])]

    made, migrated = (sqlite3.connect(tmp_path / name, isolation_level=None) for name in ("made", "migrated"))
    schema.prepare(made, "made")
    schema._migrate(migrated, 0)
    assert tables(made) == tables(migrated)
    assert ("version", schema.VERSION) in tables(made)
    made.close()
    migrated.close()


def test_an_index_that_was_made_new_takes_later_migrations_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = sqlite3.connect(tmp_path / "index", isolation_level=None)
    schema.prepare(db, "index")
    for name in ("9998_next", "9999_last"):
        later = {**schema._MIGRATIONS, name: (f"CREATE TABLE t{name} (n INTEGER)",)}
        monkeypatch.setattr(schema, "_MIGRATIONS", later)
        monkeypatch.setattr(schema, "VERSION", len(later))
        schema.prepare(db, "index")
        noted = [noted for (noted,) in db.execute("SELECT name FROM _sqlite_migrations ORDER BY name")]
        assert noted == list(later)
        assert db.execute("PRAGMA user_version").fetchone() == (len(later),)
        assert db.execute(f"SELECT COUNT(*) FROM t{name}").fetchone() == (0,)
    db.close()


def test_an_index_that_could_not_be_made_is_made_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = sqlite3.connect(tmp_path / "index", isolation_level=None)
    with monkeypatch.context() as broken:
        broken.setattr(schema, "_MIGRATIONS", {**schema._MIGRATIONS, "9999_broken": ("CREATE NOTHING",)})
        with pytest.raises(sqlite3.OperationalError):
            schema.prepare(db, "index")
    assert db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone() == (0,)
    schema.prepare(db, "index")
    assert db.execute("SELECT COUNT(*) FROM files").fetchone() == (0,)
    db.close()

"""The disk cap: which models go, which stay, and what a crash in between leaves."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import trio

from omnistore.chunker.layout import Placement
from omnistore.config import Config
from omnistore.errors import BlockMissing
from omnistore.manifest import PartKey
from omnistore.store import sweep
from omnistore.store.assembly import FileAssembly
from omnistore.store.eviction import evict, owned_bytes
from omnistore.store.files import FileStore
from omnistore.store.index import ModelRow
from omnistore.store.interface import Model
from omnistore.store.publish import publish
from omnistore.testing.network import VirtualNetwork
from omnistore.testing.seeding import seeded
from omnistore.testing.store_contract import PUBLISHER, Sample, begin, fill, sample
from omnistore.testing.tiny_gguf import tiny_model
from omnistore.transfer.client import FetchOptions, fetch_model
from omnistore.transfer.server import serve_transfer

NOW = 2_000_000_000.0
LONG_AGO = 1_000_000_000.0


@pytest.fixture
def store(home: Path) -> Iterator[FileStore]:
    store = FileStore(Config(home))
    yield store
    store.close()


@pytest.fixture
def three(store: FileStore, tmp_path: Path) -> list[Sample]:
    """Three models fetched and unpinned, last used one after the other."""
    made = []
    for number in range(3):
        directory = tmp_path / f"source{number}"
        directory.mkdir()
        one = sample(directory, tiny_model(layers=2, seed=f"seed {number}"), f"model{number}.gguf")
        fill(store, one)
        store.unpin(one.signed.cid)
        made.append(one)
    for number, one in enumerate(made):
        set_used(store, one, LONG_AGO + number)
    return made


def set_used(store: FileStore, one: Sample, when: float) -> None:
    row = store.index.model(one.signed.cid)
    assert row is not None
    with store.index.writing() as writer:
        writer._db.execute(
            "UPDATE files SET used = ? WHERE id IN (SELECT file FROM model_files WHERE model = ?)",
            (int(when), row.id),
        )
    store._used.clear()


def names(store: FileStore) -> list[str]:
    return sorted(status.model.manifest.name for status in store.models())


def all_but_one(store: FileStore) -> int:
    """A cap that one model has to go for."""
    return owned_bytes(store) - 1


def test_under_the_cap_everything_stays(store: FileStore, three: list[Sample]) -> None:
    assert evict(store, owned_bytes(store), now=NOW) == []
    assert len(names(store)) == 3


def test_the_least_recently_used_goes_first_and_no_more_than_needed(
    store: FileStore, three: list[Sample]
) -> None:
    (path,) = store.status(three[0].signed.cid).files
    (swept,) = evict(store, all_but_one(store), now=NOW)
    assert swept.models == ("model0",)
    assert swept.files == (path,)
    assert not path.exists()
    assert names(store) == ["model1", "model2"]
    assert not store.has(three[0].blocks()[0].cid)


def test_reading_is_using(store: FileStore, three: list[Sample]) -> None:
    store.read(three[0].blocks()[-1].cid)
    evict(store, all_but_one(store), now=NOW)
    assert names(store) == ["model0", "model2"]


def test_a_use_survives_the_process(store: FileStore, three: list[Sample]) -> None:
    store.read(three[0].blocks()[-1].cid)
    store.close()
    store = FileStore(store.config)
    evict(store, all_but_one(store), now=NOW)
    assert names(store) == ["model0", "model2"]
    store.close()


def test_unpinning_and_fetching_are_using(store: FileStore, three: list[Sample]) -> None:
    fill(store, three[0])
    store.unpin(three[0].signed.cid)
    evict(store, all_but_one(store), now=NOW)
    assert names(store) == ["model0", "model2"]


def test_what_is_pinned_stays_whatever_the_cap(store: FileStore, three: list[Sample]) -> None:
    fill(store, three[0])
    evict(store, 0, now=NOW)
    assert names(store) == ["model0"]
    assert store.status(three[0].signed.cid).whole
    assert all(store.read(block.cid).data == block.data for block in three[0].blocks())


def test_files_of_the_user_stay(store: FileStore, three: list[Sample], tmp_path: Path) -> None:
    own = tmp_path / "own.gguf"
    own.write_bytes(tiny_model(layers=1, seed="own").build())
    added = publish(store, own, PUBLISHER)
    store.unpin(added.cid)
    evict(store, 0, now=NOW)
    assert [status.model.cid for status in store.models()] == [added.cid]
    assert own.exists()
    assert owned_bytes(store) == 0


def test_what_is_being_fetched_stays_and_others_go_instead(store: FileStore, three: list[Sample]) -> None:
    assembly = begin(store, three[0])
    store.unpin(three[0].signed.cid)
    set_used(store, three[0], 1)
    evict(store, all_but_one(store), now=NOW)
    assert names(store) == ["model0", "model2"]
    assembly.close()


def test_a_crash_before_the_files_are_deleted_loses_nothing_else(
    store: FileStore, three: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: object) -> int:
        raise Crash

    cap = all_but_one(store)
    monkeypatch.setattr(sweep, "free_files", crash)
    with pytest.raises(Crash):
        evict(store, cap, now=NOW)
    monkeypatch.undo()
    again = FileStore(store.config)
    assert names(again) == ["model1", "model2"]
    # The file that the index forgot is an orphan: the next sweep, of whatever kind, deletes it.
    assert sweep.sweep(again, now=NOW, only=()).bytes > 0
    assert owned_bytes(again) <= cap
    assert sum(1 for path in again.models_directory.rglob("*.gguf") if path.is_file()) == 2
    again.close()


def test_an_index_of_the_first_release_is_brought_up_to_date(home: Path, tmp_path: Path) -> None:
    store = FileStore(Config(home))
    (tmp_path / "source").mkdir()
    made = sample(tmp_path / "source")
    fill(store, made)
    store.close()
    db = sqlite3.connect(home / "index.sqlite")
    db.execute("ALTER TABLE files DROP COLUMN used")
    db.execute("DROP TABLE mirrors")
    db.execute("PRAGMA user_version = 1")
    db.commit()
    db.close()
    store = FileStore(Config(home))
    assert store.status(made.signed.cid).whole
    store.unpin(made.signed.cid)
    assert evict(store, 0, now=time.time())[0].models == ("tiny",)
    store.close()


class SweptBefore(FileStore):
    """A store that is swept between reading a model's nodes and assembling it."""

    swept: tuple[str, ...] | None = None

    def assemble(
        self, model: Model, placements: Sequence[Placement], parts: Collection[PartKey]
    ) -> FileAssembly:
        if self.swept is None:
            self.swept = sweep.sweep(self, now=time.time()).models
        return super().assemble(model, placements, parts)


def test_a_pin_of_what_is_evicted_at_that_moment_fetches_it_again(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_model(2).build())
    seed, cid = seeded(path, PUBLISHER)
    options = FetchOptions(peers=("/memory/seed/p2p/seed",))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            network = VirtualNetwork(nursery, random.Random(1))
            await nursery.start(partial(serve_transfer, network.node("seed"), seed))
            before = FileStore(Config(home))
            await fetch_model(network.node("before"), None, before, cid, options)
            before.unpin(cid)
            before.close()
            store = SweptBefore(Config(home))
            report = await fetch_model(network.node("me"), None, store, cid, options)
            assert store.swept == ("tiny",)
            assert report.blocks_local == 0
            assert store.status(cid).whole
            assert report.paths[0].read_bytes() == path.read_bytes()
            store.close()
            nursery.cancel_scope.cancel()

    trio.run(main)


def packed_for(store: FileStore, one: Sample, used: float) -> list[Path]:
    """What an engine would keep of a model: a file for each of two parts."""
    directory = store.packed_directory
    assert directory is not None
    directory.mkdir(exist_ok=True)
    made = []
    for ref in store.model(one.signed.cid).manifest.parts[1:3]:
        path = directory / f"{ref.cid}-0123456789abcdef.ort"
        path.write_bytes(b"x" * 8192)
        os.utime(path, (used, used))
        made.append(path)
    return made


def test_what_engines_packed_goes_before_any_model(store: FileStore, three: list[Sample]) -> None:
    older, newer = packed_for(store, three[2], LONG_AGO), packed_for(store, three[0], LONG_AGO + 1)
    assert owned_bytes(store) >= 4 * 8192
    (swept,) = evict(store, all_but_one(store), now=NOW)
    assert swept.models == () and swept.bytes == 8192 and len(swept.files) == 1
    assert swept.files[0] in older and all(path.exists() for path in newer)
    assert len(names(store)) == 3


def test_what_was_packed_goes_with_its_model(store: FileStore, three: list[Sample]) -> None:
    gone, abandoned = packed_for(store, three[0], NOW), Path(f"{store.packed_directory}/.abc.new")
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (NOW - 7200, NOW - 7200))
    fresh = abandoned.with_name(".def.new")
    fresh.write_bytes(b"half")
    os.utime(fresh, (NOW, NOW))
    assert sweep.sweep(store, now=NOW, dry_run=True).bytes > 0 and gone[0].exists()
    swept = sweep.sweep(store, now=NOW)
    assert {*gone, abandoned} <= set(swept.files)
    assert list(fresh.parent.iterdir()) == [fresh]


def test_a_list_of_models_of_which_one_is_evicted_meanwhile(
    store: FileStore, three: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = store.index.models

    def evicting() -> Sequence[ModelRow]:
        rows = listed()
        monkeypatch.undo()
        evict(store, owned_bytes(store) - 1, now=NOW)
        return rows

    monkeypatch.setattr(store.index, "models", evicting)
    assert names(store) == ["model1", "model2"]
    # What is still known but lacks a node is a fault, and said.
    with store.database.writing() as db:
        db.execute("DELETE FROM nodes WHERE digest = ?", (three[1].bare.cid.digest,))
    with pytest.raises(BlockMissing):
        store.models()

"""What only a store of files has to do: live with files that change, disks that fill, other processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from omnistore.cid import CID
from omnistore.config import Config
from omnistore.errors import (
    BlockMissing,
    DigestMismatch,
    InputError,
    LocalProtocolError,
    MalformedManifest,
    SourceChanged,
    StoreError,
    StoreFull,
    StoreLocked,
)
from omnistore.manifest import PartKey
from omnistore.store import assembly as assembly_module
from omnistore.store import disk, files
from omnistore.store.export import export
from omnistore.store.files import FileStore
from omnistore.store.index import part_path
from omnistore.store.publish import Published, publish
from omnistore.store.sweep import sweep
from omnistore.store.verify import verify
from omnistore.testing.store_contract import (
    PUBLISHER,
    Sample,
    begin,
    fill,
    put_nodes,
    sample,
    sample_of,
)
from omnistore.testing.tiny_gguf import split_set, tiny_model


@pytest.fixture
def store(home: Path) -> Iterator[FileStore]:
    store = FileStore(Config(home))
    yield store
    store.close()


@pytest.fixture
def made(tmp_path: Path) -> Sample:
    (tmp_path / "source").mkdir()
    return sample(tmp_path / "source")


@pytest.fixture
def source(made: Sample, tmp_path: Path) -> Path:
    return tmp_path / "source" / "tiny.gguf"


def reopened(store: FileStore) -> FileStore:
    store.close()
    return FileStore(store.config)


def add(store: FileStore, path: Path, *, copy: bool = False) -> Published:
    return publish(store, path, PUBLISHER, copy=copy)


def flip(path: Path, offset: int, *, keep_times: bool = False) -> None:
    """Rot: change one byte, perhaps without a trace in the file's times."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    # A coarse clock could give the file its old time again, which is the other case.
    stamp = before.st_mtime_ns if keep_times else before.st_mtime_ns + 1_000_000
    os.utime(path, ns=(stamp, stamp))


def block_at(made: Sample, offset: int) -> CID:
    return next(p.cid for p in made.placements if p.offset <= offset < p.offset + p.size)


# --- adding -------------------------------------------------------------------------------------


def test_adding_in_place_copies_nothing(store: FileStore, made: Sample, source: Path) -> None:
    found = add(store, source)
    assert found.cid == made.signed.cid
    assert found.blocks == len(made.blocks())
    status = store.status(found.cid)
    assert status.whole
    assert status.referenced
    assert status.files == (source,)
    assert not store.models_directory.exists()
    assert all(store.read(block.cid).data == block.data for block in made.blocks())


def test_adding_twice_is_adding_once(store: FileStore, source: Path) -> None:
    first = add(store, source)
    assert add(store, source) == first
    assert len(store.models()) == 1
    assert len(store.index.files()) == 1


def test_a_copy_is_ours(store: FileStore, made: Sample, source: Path) -> None:
    found = add(store, source, copy=True)
    source.unlink()
    status = store.status(found.cid)
    assert status.whole
    assert not status.referenced
    assert status.files[0].read_bytes() == made.files["tiny.gguf"]
    assert store.models_directory in status.files[0].parents
    assert [path.name for path in store.models_directory.iterdir()] == [str(made.bare.cid)]
    assert add(store, status.files[0], copy=True).cid == found.cid


def test_a_copy_completes_a_partial_fetch(store: FileStore, made: Sample, source: Path) -> None:
    fill(store, made, {PartKey("header"), PartKey("layer", 0)})
    (partial,) = store.status(made.signed.cid).files
    assert partial.suffix == ".part"
    add(store, source, copy=True)
    status = store.status(made.signed.cid)
    assert status.whole
    assert status.files[0].suffix == ".gguf"
    assert not partial.exists()


def test_a_split_set_is_one_model(store: FileStore, tmp_path: Path) -> None:
    for name, data in split_set(tiny_model(layers=2), "set", [5]).items():
        (tmp_path / name).write_bytes(data)
    found = add(store, tmp_path / "set-00002-of-00002.gguf")
    status = store.status(found.cid)
    assert [path.name for path in status.files] == ["set-00001-of-00002.gguf", "set-00002-of-00002.gguf"]
    assert status.whole
    assert store.find("set").cid == found.cid


def test_a_fetched_split_set_needs_a_directory(store: FileStore, tmp_path: Path) -> None:
    paths = []
    for name, data in split_set(tiny_model(layers=2), "set", [5]).items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(data)
    made = sample_of(paths)
    assembly = begin(store, made)
    assembly.write(made.blocks())
    found = assembly.finish(tmp_path / "out")
    assembly.close()
    assert [path.read_bytes() for path in found] == list(made.files.values())
    assert [path.name for path in found] == list(made.files)


def test_a_changed_file_added_again_loses_its_old_blocks(store: FileStore, source: Path) -> None:
    old = add(store, source)
    source.write_bytes(tiny_model(layers=3, seed="other").build())
    new = add(store, source)
    assert new.cid != old.cid
    assert store.status(new.cid).whole
    assert not store.status(old.cid).whole
    assert len(store.index.files()) == 1


def test_a_file_of_the_home_stays_ours_when_added(store: FileStore, made: Sample) -> None:
    fill(store, made)
    (path,) = store.status(made.signed.cid).files
    add(store, path)
    assert store.index.files()[0][1].owned


# --- files that change under us ------------------------------------------------------------------


def test_a_file_that_moved(
    store: FileStore, made: Sample, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = add(store, source)
    block = made.blocks()[0]
    away = source.with_name("moved.gguf")
    source.rename(away)
    with pytest.raises(SourceChanged, match=r"tiny\.gguf") as caught:
        store.read(block.cid)
    assert "omni add" in str(caught.value.remedy)
    assert not store.has(block.cid)
    assert not store.status(found.cid).complete
    assert len([record for record in caplog.records if "tiny.gguf" in record.message]) == 1
    with pytest.raises(BlockMissing):
        store.read(block.cid)
    away.rename(source)
    store = reopened(store)
    assert store.read(block.cid).data == block.data
    assert store.status(found.cid).whole
    store.close()


def test_what_is_announced_follows_the_files(store: FileStore, made: Sample, source: Path) -> None:
    add(store, source)
    away = source.with_name("away.gguf")
    source.rename(away)
    assert set(store.announced()) == {made.signed.cid, made.bare.cid}
    away.rename(source)
    assert set(store.announced()) == {node.cid for node in made.nodes}


def test_a_file_that_changed_loses_only_what_changed(store: FileStore, made: Sample, source: Path) -> None:
    found = add(store, source)
    offset = len(made.files["tiny.gguf"]) - 1
    bad = block_at(made, offset)
    flip(source, offset)
    with pytest.raises(SourceChanged, match="changed since it was added"):
        store.read(bad)
    assert not store.has(bad)
    good = [block for block in made.blocks() if block.cid != bad]
    assert all(store.read(block.cid).data == block.data for block in good)
    assert not store.status(found.cid).whole


def test_a_file_that_was_only_touched_is_still_good(store: FileStore, made: Sample, source: Path) -> None:
    add(store, source)
    os.utime(source)
    assert all(store.read(block.cid).data == block.data for block in made.blocks())


def test_a_truncated_file(store: FileStore, made: Sample, source: Path) -> None:
    add(store, source)
    last = block_at(made, len(made.files["tiny.gguf"]) - 1)
    os.truncate(source, source.stat().st_size - 1)
    with pytest.raises(SourceChanged):
        store.read(last)
    assert store.read(made.placements[0].cid)


def test_rot_that_left_no_trace(store: FileStore, made: Sample, source: Path) -> None:
    add(store, source)
    flip(source, 5000, keep_times=True)
    with pytest.raises(DigestMismatch, match=r"tiny\.gguf: the \d+ bytes at \d+"):
        store.read(block_at(made, 5000))


def test_a_good_copy_stands_in_for_a_bad_one(store: FileStore, made: Sample, source: Path) -> None:
    add(store, source)
    add(store, source, copy=True)
    ours = store.models_directory / str(made.bare.cid) / "tiny.gguf"
    flip(ours, 5000, keep_times=True)
    bad = block_at(made, 5000)
    assert store.read(bad).cid == bad
    assert len(store.index.locations(bad.digest)) == 1


def test_a_lost_home_file_is_begun_again(store: FileStore, made: Sample) -> None:
    fill(store, made)
    (path,) = store.status(made.signed.cid).files
    path.unlink()
    with pytest.raises(SourceChanged, match=r"tiny\.gguf"):
        store.read(made.blocks()[0].cid)
    assembly = begin(store, made)
    assert {place.cid for place in assembly.missing()} == {block.cid for block in made.blocks()}
    assembly.write(made.blocks())
    assembly.finish()
    assembly.close()
    assert path.read_bytes() == made.files["tiny.gguf"]


# --- assembling -----------------------------------------------------------------------------------


def test_a_model_in_place_needs_no_second_file(store: FileStore, made: Sample, source: Path) -> None:
    add(store, source)
    assembly = begin(store, made)
    assert assembly.missing() == []
    assert assembly.local_blocks == len(made.blocks())
    assert list(assembly.finish()) == [source]
    assembly.close()
    assert not list(store.models_directory.glob("*"))


def test_a_whole_file_that_lost_a_block_becomes_partial(store: FileStore, made: Sample) -> None:
    fill(store, made)
    (path,) = store.status(made.signed.cid).files
    flip(path, 5000)
    with pytest.raises(DigestMismatch):
        store.read(block_at(made, 5000))
    assembly = begin(store, made)
    assert {place.cid for place in assembly.missing()} == {block_at(made, 5000)}
    assert part_path(path).exists()
    assert not path.exists()
    assembly.write([block for block in made.blocks() if block.cid == block_at(made, 5000)])
    assembly.finish()
    assembly.close()
    assert path.read_bytes() == made.files["tiny.gguf"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_crash_between_renaming_and_the_index_is_mended(
    store: FileStore, made: Sample, whole: bool
) -> None:
    fill(store, made)
    (path,) = store.status(made.signed.cid).files
    (_, file) = store.index.files()[0]
    if whole:
        # As if `finish` had renamed and died.
        with store.index.writing() as writer:
            writer.set_partial(file.id, True)
    else:
        # As if a re-opened assembly had renamed and died.
        path.rename(part_path(path))
    assert store.read(made.blocks()[0].cid).data == made.blocks()[0].data
    store = reopened(store)
    expected = path if whole else part_path(path)
    assert store.status(made.signed.cid).files == (expected,)
    assembly = begin(store, made)
    assert assembly.missing() == []
    assembly.finish()
    assembly.close()
    assert path.read_bytes() == made.files["tiny.gguf"]
    store.close()


def test_a_manifest_that_lies_about_lengths_is_refused(store: FileStore, made: Sample) -> None:
    put_nodes(store, made.nodes)
    lying = [replace(place, size=place.size - 1) for place in made.placements]
    assembly = store.assemble(store.model(made.signed.cid), lying, made.keys)
    with pytest.raises(MalformedManifest):
        assembly.write(made.blocks()[:1])
    assembly.close()


def test_a_closed_assembly_takes_nothing(store: FileStore, made: Sample) -> None:
    assembly = begin(store, made)
    assembly.close()
    assembly.close()
    with pytest.raises(LocalProtocolError):
        assembly.write(made.blocks())


def test_output_is_never_overwritten(store: FileStore, made: Sample, tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(b"precious")
    assembly = begin(store, made)
    assembly.write(made.blocks())
    with pytest.raises(InputError, match=r"mine\.gguf"):
        assembly.finish(mine)
    assert mine.read_bytes() == b"precious"
    (path,) = assembly.finish(tmp_path)
    assert path == tmp_path / "tiny.gguf"
    assert list(assembly.finish(tmp_path)) == [path]
    assembly.close()


def interrupted(store: FileStore, made: Sample) -> Path:
    """Write some blocks as a process does that then dies; the file they are in."""
    assembly = begin(store, made)
    assembly.write(made.blocks()[:8])
    (path,) = store.status(made.signed.cid).files
    assert store.index.files()[0][1].unsynced == disk.boot_id()
    # What the death of a process lets go of, and nothing else.
    assembly._close_targets()
    assembly._model_lock.release()
    return path


def test_a_power_cut_takes_only_what_it_took(
    store: FileStore, made: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = interrupted(store, made)
    lost = made.blocks()[3]
    place = next(place for place in made.placements if place.cid == lost.cid)
    with path.open("r+b") as file:
        file.seek(place.offset)
        file.write(bytes(place.size))
    monkeypatch.setattr(files, "boot_id", lambda: "another start")
    store = reopened(store)
    assert not store.has(lost.cid)
    assert store.held(block.cid for block in made.blocks()) == {
        block.cid for block in made.blocks()[:8] if block.cid != lost.cid
    }
    assert store.index.files()[0][1].unsynced is None
    fill(store, made)
    assert store.status(made.signed.cid).files[0].read_bytes() == made.files["tiny.gguf"]
    store.close()


def test_without_a_power_cut_nothing_is_read_again(
    store: FileStore, made: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(store, made)
    monkeypatch.setattr(files, "still_holds", lambda *_: pytest.fail("was read again"))
    store = reopened(store)
    assert len(store.held(block.cid for block in made.blocks())) == 8
    store.close()


def test_what_is_closed_is_on_the_disk(store: FileStore, made: Sample) -> None:
    assembly = begin(store, made)
    assembly.write(made.blocks()[:8])
    assembly.close()
    assert store.index.files()[0][1].unsynced is None


def test_what_the_disk_refused_late_is_fetched_again(
    store: FileStore, made: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly = begin(store, made)
    assembly.write(made.blocks())

    def refused(_fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(assembly_module, "sync_data", refused)
        with pytest.raises(StoreError, match="Input/output error"):
            assembly.finish()
    assert {place.cid for place in assembly.missing()} == {block.cid for block in made.blocks()}
    assert not any(store.has(block.cid) for block in made.blocks())
    assembly.write(made.blocks())
    assembly.finish()
    assembly.close()
    assert store.status(made.signed.cid).files[0].read_bytes() == made.files["tiny.gguf"]


def test_what_the_disk_refused_while_more_was_written_is_fetched_again(
    home: Path, made: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, blocks = FileStore(Config(home, sync_batch=2)), made.blocks()
    assembly = begin(store, made)
    calls = []

    def refused_once(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(assembly_module, "sync_data", refused_once)
        with pytest.raises(StoreError, match="Input/output error"):
            for block in blocks:
                assembly.write([block])
            assembly.finish()
    missing = {place.cid for place in assembly.missing()}
    assert blocks[0].cid not in missing
    assert blocks[1].cid in missing
    assert {block.cid for block in blocks if not store.has(block.cid)} == missing
    assert store.index.files()[0][1].unsynced is not None
    assembly.write(blocks)
    assembly.finish()
    assert store.index.files()[0][1].unsynced is None
    assembly.close()
    assert store.status(made.signed.cid).files[0].read_bytes() == made.files["tiny.gguf"]
    store.close()


# --- full disks -----------------------------------------------------------------------------------


def test_no_room_is_said_before_anything_is_fetched(home: Path, made: Sample) -> None:
    store = FileStore(Config(home, disk_reserve=1 << 60))
    with pytest.raises(StoreFull, match=r"tiny needs [\d,]+ bytes") as caught:
        begin(store, made)
    assert "OMNI_HOME" in str(caught.value.remedy)
    store.close()


def test_a_disk_that_fills_up_keeps_what_was_written(
    store: FileStore, made: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = made.blocks()
    assembly = begin(store, made)
    assembly.write(blocks[:4])

    def full(_fd: int, _data: memoryview, _offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(disk.os, "pwrite", full)
        with pytest.raises(StoreFull, match="disk is full"):
            assembly.write(blocks[4:])
    assert {place.cid for place in assembly.missing()} == {block.cid for block in blocks[4:]}
    assembly.write(blocks[4:])
    assembly.finish()
    assembly.close()
    assert store.status(made.signed.cid).whole


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0,
    reason="mounting a small disk needs root on Linux",
)
def test_a_really_full_disk(tmp_path: Path, made: Sample) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs can not be mounted here: {mounted.stderr.decode().strip()}")
    try:
        store = FileStore(Config(small / "home", disk_reserve=0))
        put_nodes(store, made.nodes)
        (small / "filler").write_bytes(bytes(150_000))
        with pytest.raises(StoreFull):
            begin(store, made)
        store.close()
    finally:
        subprocess.run(["umount", small], check=True)


# --- other processes ------------------------------------------------------------------------------


def test_a_locked_model_names_the_process(store: FileStore, made: Sample) -> None:
    other = FileStore(store.config)
    assembly = begin(store, made)
    with pytest.raises(StoreLocked, match=f"process {os.getpid()}"):
        begin(other, made)
    assembly.close()
    begin(other, made).close()
    other.close()


def test_a_model_that_is_only_swept_over_is_waited_for(store: FileStore, made: Sample) -> None:
    """A sweep holds every model without pins for a moment: a fetch that begins then is not refused."""
    begin(store, made).close()
    held = store.lock_model(made.bare.cid, "swept", brief=True)
    with pytest.raises(StoreLocked):
        store.lock_model(made.bare.cid, "swept", brief=True)
    release = threading.Timer(0.2, held.release)
    release.start()
    begin(store, made).close()
    release.join()
    # Written at an end that was not in order, this is nobody's.
    begin(store, made).close()


def test_a_busy_index_is_a_locked_store(store: FileStore, made: Sample) -> None:
    hasty = FileStore(Config(store.config.home, busy_timeout=0.01))
    with store.index.writing(), pytest.raises(StoreLocked, match=r"index\.sqlite"):
        hasty.put_node(made.bare)
    hasty.put_node(made.bare)
    assert store.has(made.bare.cid)
    hasty.close()


def test_a_damaged_index_is_a_clear_error(home: Path) -> None:
    home.mkdir()
    (home / "index.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match=r"index\.sqlite is damaged"):
        FileStore(Config(home))


def test_an_index_of_a_newer_release_is_refused(store: FileStore) -> None:
    with store.database.writing() as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="newer release"):
        FileStore(store.config)


# --- verify, export, gc ----------------------------------------------------------------------------


def test_verify_only_looks(store: FileStore, made: Sample, source: Path) -> None:
    found = add(store, source)
    assert verify(store, found.cid).faults == ()
    flip(source, 5000)
    (fault,) = verify(store, found.cid).faults
    assert (fault.path, fault.cid) == (source, block_at(made, 5000))
    assert store.has(fault.cid)


def test_verify_repairs_from_another_copy(store: FileStore, made: Sample, source: Path) -> None:
    add(store, source)
    add(store, source, copy=True)
    ours = store.models_directory / str(made.bare.cid) / "tiny.gguf"
    flip(ours, 5000)
    (fault,) = verify(store, made.signed.cid, repair=True).faults
    assert fault.repaired
    assert ours.read_bytes() == made.files["tiny.gguf"]
    assert verify(store, made.signed.cid).faults == ()


def test_verify_forgets_what_it_can_not_repair(store: FileStore, made: Sample, source: Path) -> None:
    add(store, source)
    flip(source, 5000)
    verdict = verify(store, made.signed.cid, repair=True)
    assert [fault.repaired for fault in verdict.faults] == [False]
    assert not verdict.status.whole
    assert not store.has(block_at(made, 5000))
    with pytest.raises(BlockMissing):
        verify(store, block_at(made, 0))


def test_export_checks_every_byte(store: FileStore, made: Sample, source: Path, tmp_path: Path) -> None:
    found = add(store, source)
    model = store.model(found.cid)
    assert export(store, model, tmp_path / "copy.gguf") == [tmp_path / "copy.gguf"]
    assert (tmp_path / "copy.gguf").read_bytes() == made.files["tiny.gguf"]
    with pytest.raises(InputError, match="exists"):
        export(store, model, tmp_path / "copy.gguf")
    flip(source, 5000)
    with pytest.raises(SourceChanged):
        export(store, model, tmp_path / "bad.gguf")
    assert not list(tmp_path.glob("*bad*"))
    with pytest.raises(BlockMissing):
        export(store, model, tmp_path / "bad.gguf")


def test_gc_never_touches_a_file_of_the_user(store: FileStore, source: Path) -> None:
    found = add(store, source)
    store.unpin(found.cid)
    swept = sweep(store, now=time.time())
    assert (swept.files, swept.bytes, swept.released) == ((), 0, (source,))
    assert source.exists()
    assert store.models() == []
    assert not store.has(found.cid)
    assert store.index.files() == []


def test_gc_frees_what_was_fetched(store: FileStore, made: Sample) -> None:
    fill(store, made)
    (path,) = store.status(made.signed.cid).files
    assert sweep(store, now=time.time()).files == ()
    store.unpin(made.signed.cid)
    dry = sweep(store, now=time.time(), dry_run=True)
    assert path.exists()
    assert store.status(made.signed.cid).whole
    swept = sweep(store, now=time.time())
    assert swept == dry
    assert swept.files == (path,)
    assert swept.bytes >= len(made.files["tiny.gguf"])
    assert not path.exists()
    assert not list(store.models_directory.iterdir())
    assert store.index.totals() == (0, 0)


def test_gc_keeps_what_is_being_fetched(store: FileStore, made: Sample) -> None:
    assembly = begin(store, made)
    assembly.write(made.blocks()[:5])
    store.unpin(made.signed.cid)
    swept = sweep(store, now=time.time() + 1e6)
    assert (swept.models, swept.files, swept.nodes) == ((), (), 0)
    assembly.write(made.blocks()[5:])
    assembly.finish()
    assembly.close()
    assert store.status(made.signed.cid).whole


def test_gc_spares_young_nodes_only(store: FileStore, made: Sample) -> None:
    put_nodes(store, made.nodes)
    assert sweep(store, now=time.time()).nodes == 0
    assert sweep(store, now=time.time() + store.config.node_grace + 10).nodes == len(made.nodes)


def test_gc_keeps_the_last_copy_of_a_pinned_block(store: FileStore, made: Sample, source: Path) -> None:
    add(store, source)
    other = sample(source.parent, tiny_model(layers=3, seed="tiny"), "renamed.gguf")
    fill(store, other)
    store.unpin(other.signed.cid)
    source.unlink()
    for _, file in store.index.files():
        if not file.owned:
            with store.index.writing() as writer:
                writer.set_lost(file.id, True)
    swept = sweep(store, now=time.time())
    assert swept.models == ("renamed",)
    assert swept.files == ()
    assert all(store.has(block.cid) for block in made.blocks())


def test_gc_deletes_what_a_crash_left(store: FileStore, made: Sample) -> None:
    fill(store, made)
    stray = store.models_directory / str(made.bare.cid) / "old.gguf"
    incoming = store.models_directory / "incoming-0123" / "x.gguf"
    incoming.parent.mkdir()
    for path in (stray, incoming):
        path.write_bytes(bytes(10))
    assert set(sweep(store, now=time.time(), dry_run=True).files) == {stray, incoming}
    assert set(sweep(store, now=time.time()).files) == {stray, incoming}
    assert not incoming.parent.exists()
    assert store.status(made.signed.cid).whole

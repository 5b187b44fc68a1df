from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from omnistore.chunker.cut import cut, model_files
from omnistore.chunker.join import join
from omnistore.chunker.layout import Placement
from omnistore.cid import CID
from omnistore.errors import BlockMissing, DigestMismatch, InputError, StoreFull
from omnistore.manifest import FileEntry, PartKey
from omnistore.testing.tiny_gguf import TinyGGUF, block_tensors, split_set, tiny_model


class Cut:
    """A model cut in memory: its files, placements and blocks."""

    def __init__(self, directory: Path, files: dict[str, bytes]) -> None:
        directory.mkdir()
        for name, data in files.items():
            (directory / name).write_bytes(data)
        self.files = files
        self.placements: list[Placement] = []
        result = cut(model_files(directory / min(files)), sink=self.placements.extend)
        self.entries: tuple[FileEntry, ...] = result.manifest.files
        datas = list(files.values())
        self.blocks = {p.cid: datas[p.file][p.offset : p.offset + p.size] for p in self.placements}


@pytest.fixture
def model(tmp_path: Path) -> Cut:
    return Cut(tmp_path / "in", split_set(TinyGGUF(block_tensors(2), fill=7, tail=b"!"), "m", [4]))


def test_join_rebuilds_every_file(tmp_path: Path, model: Cut) -> None:
    paths = join(model.entries, model.placements, model.blocks.__getitem__, tmp_path)
    assert {path.name: path.read_bytes() for path in paths} == model.files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", *sorted(model.files)]


def test_what_is_not_placed_is_a_hole(tmp_path: Path) -> None:
    model = Cut(tmp_path / "in", {"m.gguf": tiny_model(2).build()})
    some = [p for p in model.placements if p.part != PartKey("layer", 1)]
    (path,) = join(model.entries, some, model.blocks.__getitem__, tmp_path)
    joined, original = path.read_bytes(), model.files["m.gguf"]
    assert len(joined) == len(original)
    for placement in model.placements:
        place = slice(placement.offset, placement.offset + placement.size)
        assert joined[place] == (original[place] if placement in some else bytes(placement.size))


def test_wrong_bytes_are_never_visible(tmp_path: Path, model: Cut) -> None:
    (tmp_path / model.entries[0].name).write_bytes(b"the old one")
    lie = {**model.blocks, model.placements[3].cid: b"\0" * model.placements[3].size}
    with pytest.raises(DigestMismatch):
        join(model.entries, model.placements, lie.__getitem__, tmp_path)
    short = {**model.blocks, model.placements[3].cid: b"\0"}
    with pytest.raises(DigestMismatch, match="has 1 bytes, not"):
        join(model.entries, model.placements, short.__getitem__, tmp_path)
    assert (tmp_path / model.entries[0].name).read_bytes() == b"the old one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", model.entries[0].name]


def test_a_missing_block_is_the_readers_error(tmp_path: Path, model: Cut) -> None:
    def read(cid: CID) -> bytes:
        raise BlockMissing(f"{cid} is not held here")

    with pytest.raises(BlockMissing):
        join(model.entries, model.placements, read, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_full_disk_is_a_full_store(tmp_path: Path, model: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreFull, match="no room"):
        join(model.entries, model.placements, model.blocks.__getitem__, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_directory_that_is_not_there_is_named(tmp_path: Path, model: Cut) -> None:
    with pytest.raises(InputError, match="nowhere"):
        join(model.entries, model.placements, model.blocks.__getitem__, tmp_path / "nowhere")

"""The file that the transfer benchmarks send about: valid, of exactly the wanted size, and reproducible."""

from __future__ import annotations

import mmap
from pathlib import Path

import gguf
import numpy as np
import pytest

from omnistore.chunker.gguf import GGUFHeader, read_header_untrusted
from tests.bench.make_gguf import TYPES, make_gguf, parsed_size

MIB = 1 << 20


def header_of(path: Path) -> GGUFHeader:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return read_header_untrusted(mapped, file_size=len(mapped), name=path.name)


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_the_file_has_the_wanted_size_and_finite_numbers(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "noise.gguf"
    shape = make_gguf(path, 12 * MIB + 77, layers=2, kind=kind)
    assert path.stat().st_size == 12 * MIB + 64
    header = header_of(path)
    assert header.metadata["llama.block_count"] == shape.layers == 2
    assert len(header.tensors) == 3 + 9 * 2
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all(), tensor.name
        assert np.abs(values).max() < 4, tensor.name


def test_tensors_outside_the_layers_come_first_and_layers_are_sorted(tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    make_gguf(path, 12 * MIB, layers=3)
    tensors = header_of(path).in_file_order()
    names = [tensor.name for tensor in tensors]
    assert names[:3] == ["output.weight", "output_norm.weight", "token_embd.weight"]
    assert names[3:] == sorted(names[3:])
    assert tensors[-1].offset + tensors[-1].size == path.stat().st_size


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for path, seed in ((first, 5), (again, 5), (other, 6)):
        make_gguf(path, 10 * MIB, layers=2, seed=seed)
    assert first.read_bytes() == again.read_bytes()
    ours, theirs = first.read_bytes(), other.read_bytes()
    for tensor in header_of(first).tensors:
        part = slice(tensor.offset, tensor.offset + tensor.size)
        assert (ours[part] == theirs[part]) == ("norm" in tensor.name), tensor.name


def test_a_size_too_small_for_the_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="too few for 22 layers"):
        make_gguf(tmp_path / "noise.gguf", MIB)
    assert not (tmp_path / "noise.gguf").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 1 << 30), ("5MB", 5_000_000), ("2 KiB", 2048), ("77", 77), ("8B", None)]
)
def test_sizes_are_written_as_people_write_them(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(Exception, match="is no size"):
            parsed_size(text)
    else:
        assert parsed_size(text) == size

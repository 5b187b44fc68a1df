"""What the ort engine keeps beside the blocks: found again, checked, and made again where it is not right."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omninfer.engines import StageSpec, get_engine, ort_packed
from omninfer.engines.checks import check_tensors
from omninfer.engines.ort_graph import layer_part
from omninfer.engines.ort_weights import Matrix
from omninfer.engines.packing import decode
from omninfer.testing.noise import NoiseSource, noise_model
from omnistore.errors import InferenceError, StoreFull

TOKENS = np.arange(9, dtype=np.int32)


class Traced(NoiseSource):
    """Noise whose tensors come from parts."""

    def __init__(self, noise: NoiseSource, packed: Path | None) -> None:
        super().__init__(noise.shapes, noise.types)
        self.packed = packed

    def origin(self, name: str) -> str | None:
        return "part-of-" + ".".join(name.split(".")[:2])


def answer(packed: Path | None, kind: str = "Q4_0") -> NDArray[np.float32]:
    spec, noise = noise_model(kind=kind)
    stage = get_engine("ort").load(StageSpec.whole(spec), Traced(noise, packed), context=16)
    return stage.forward(TOKENS, slot=0, position=0)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices were repacked since."""
    repacked: list[int] = []
    whole = Matrix.repack

    def repack(self: Matrix, *args: Any) -> None:
        repacked.append(self.rows)
        whole(self, *args)

    monkeypatch.setattr(Matrix, "repack", repack)
    return repacked


def test_the_next_start_packs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repacked = counted(monkeypatch)
    first = answer(tmp_path / "packed")
    assert repacked
    files = sorted((tmp_path / "packed").iterdir())
    assert len(files) == 4  # three layers and the head
    assert all(path.name.startswith("part-of-") for path in files)
    repacked.clear()
    assert np.array_equal(answer(tmp_path / "packed"), first)
    assert repacked == [] and sorted((tmp_path / "packed").iterdir()) == files


@pytest.mark.parametrize("fault", ["cut short", "a byte", "the digest", "empty"])
def test_a_file_that_is_not_right_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    first = answer(tmp_path)
    (path,) = tmp_path.glob("part-of-blk.1-*")
    whole = path.read_bytes()
    at = {"a byte": len(whole) // 2, "the digest": len(whole) - 1}.get(fault)
    if at is None:
        path.write_bytes(whole[: 0 if fault == "empty" else -4096])
    else:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    repacked = counted(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(answer(tmp_path), first)
    assert len(repacked) == 4 and path.read_bytes() == whole
    assert path.name in caplog.text and "made again" in caplog.text


def test_what_is_repacked_otherwise_has_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path)
    before = set(tmp_path.iterdir())
    monkeypatch.setattr(ort_packed, "VERSION", ort_packed.VERSION + 1)
    answer(tmp_path)
    assert len(set(tmp_path.iterdir()) - before) == len(before)


def test_a_write_that_fails_leaves_nothing_and_the_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answer(None)
    whole = os.pwrite

    def full(fd: int, data: Any, offset: int) -> int:
        if Path(f"/proc/self/fd/{fd}").resolve().is_relative_to(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(answer(tmp_path / "packed"), expected)
    assert list((tmp_path / "packed").iterdir()) == []
    assert "nothing is kept" in caplog.text and str(tmp_path) in caplog.text


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.engines.test_ort_packed import answer
whole, left = os.pwrite, int(sys.argv[2])
def killed(*args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args)
os.pwrite = killed
answer(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("writes", [1, 9, 20])
def test_killed_while_it_writes(tmp_path: Path, writes: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(writes)], check=False)
    assert done.returncode == -signal.SIGKILL
    left = list(tmp_path.glob(".*.new"))
    assert left
    expected = answer(None)
    for _ in range(2):
        assert np.array_equal(answer(tmp_path), expected)
    assert len(list(tmp_path.glob("part-of-*"))) == 4


def test_no_room_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreFull, match="can not be written"):
        answer(tmp_path)


def test_a_file_that_goes_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ort_packed.PackedFolder.ready

    def gone(self: ort_packed.PackedFolder, part: ort_packed.PackedPart, run: str) -> str:
        name = whole(self, part, run)
        (self.path / run / name).unlink()
        return name

    monkeypatch.setattr(ort_packed.PackedFolder, "ready", gone)
    with pytest.raises(InferenceError, match="can not load"):
        answer(tmp_path)


def test_files_that_are_not_kept_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    answer(None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4"]
)
def test_operands_say_the_weights(tmp_path: Path, kind: str) -> None:
    """As MatMulNBits is documented to read them; only rests are rounded, to half a step."""
    spec, noise = noise_model(kind=kind)
    part = layer_part(spec, check_tensors(StageSpec.whole(spec), noise), 1)
    ort_packed.write(tmp_path / "part", part, noise)
    data = np.fromfile(tmp_path / "part", np.uint8)
    for name, matrix in part.matrices.items():
        held = {
            place.split(".")[-1]: data[at.offset : at.offset + at.operand.nbytes]
            .view(at.operand.dtype)
            .reshape(at.operand.shape)
            for place, at in part.places.items()
            if place.startswith(name + ".")
        }
        whole = np.concatenate(
            [decode(one.kind, np.concatenate([s for _, s in one.slabs(noise)])) for one in matrix.tensors]
        )
        weights = multiplied(held, matrix)
        slack = 0.51 * held["rest_scales"].max() if matrix.form.minimums else 1e-6 * np.abs(whole).max()
        assert np.abs(weights - whole).max() <= slack


def nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)


def multiplied(held: dict[str, NDArray[Any]], matrix: Matrix) -> NDArray[np.float32]:
    form, blocks = matrix.form, held["scales"].shape[1]
    codes = nibbles(held["codes"]) if form.bits == 4 else held["codes"]
    zeros = np.float32(1 << (form.bits - 1))
    if form.minimums:
        own = nibbles(held["zeros"]) if form.bits == 4 else held["zeros"]
        zeros = own[:, :blocks, None].astype(np.float32)
    weights = held["scales"][..., None] * (codes.astype(np.float32) - zeros)
    if form.minimums:
        rests = held["rest_scales"][..., None] * (held["rests"].astype(np.float32) - 128)
        weights += rests.reshape(matrix.rows, -1)[:, :blocks, None]
    return weights.reshape(matrix.rows, matrix.columns)

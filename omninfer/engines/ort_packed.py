"""Files of operands: a part's weights as ONNX Runtime wants them, which it maps while it loads.

One file for each layer and one for the head: the operands of `ort_weights`, each at a page's start, and a
BLAKE3 of the BLAKE3s of all of them. ONNX Runtime makes its own copy of a matrix and lets go of the mapping,
so that no more than one matrix is in memory twice, however large the graph. Scales it copies too but keeps
mapped: their pages are let go of, since it reads them again on few processors. The form is the same on all.

Where a source says what its tensors come from (`interface.TracedSource`), the file is kept under that name
and found again by the next start; elsewhere it is removed as soon as it was loaded. It is written aside and
renamed when all of it is written; one that is cut short or altered is noticed and made again.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import secrets
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from omninfer.engines.fields import Room
from omninfer.engines.interface import TensorSource, TracedSource
from omninfer.engines.ort_weights import ROOM_BYTES, Matrix, Operand
from omnistore.errors import StoreFull
from omnistore.store.disk import reserved, write_at

VERSION: Final = 2
"""Of what `ort_weights` makes of a tensor, and of the order of it here: another one is another file."""
PAGE: Final = mmap.ALLOCATIONGRANULARITY
_DIGEST_BYTES: Final = 32
_READ_BYTES: Final = 1 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an operand lies in its file."""

    operand: Operand
    offset: int


@dataclass(slots=True)
class PackedPart:
    """What one file holds: matrices by the names that they have in the graph."""

    title: str
    """Of the part in a file that is not kept: "head", "layer-3"."""
    matrices: Mapping[str, Matrix]
    places: dict[str, Place] = field(init=False, default_factory=dict)
    """By matrix and operand, as "blk.0.out.0.codes"."""
    size: int = field(init=False, default=0)
    """Bytes of all operands, without the digest behind them."""

    def __post_init__(self) -> None:
        for name, matrix in self.matrices.items():
            for kind, operand in matrix.operands().items():
                self.places[f"{name}.{kind}"] = Place(operand, self.size)
                self.size += -(-operand.nbytes // PAGE) * PAGE

    def file_name(self, source: TensorSource) -> tuple[str, bool]:
        """The file's name, and whether it may be kept."""
        tensors = [tensor.name for matrix in self.matrices.values() for tensor in matrix.tensors]
        origins = {source.origin(name) if isinstance(source, TracedSource) else None for name in tensors}
        if len(origins) != 1 or None in origins:
            return f"{self.title}.ort", False
        said = [VERSION, *((name, place.offset, place.operand) for name, place in self.places.items())]
        # The same layer has another number in another model, and the same name in this file.
        layout = blake3(repr(said).encode()).hexdigest()[:16]
        return f"{origins.pop()}-{layout}.ort", True


class PackedFolder:
    """The directory that a stage's graphs load from."""

    def __init__(self, source: TensorSource, *, keep: bool = True) -> None:
        """Files are kept in the source's own directory, if it has one and they may be (`keep`)."""
        self._source = source
        self._kept = source.packed if keep and isinstance(source, TracedSource) else None
        if self._kept is not None:
            self._kept.mkdir(parents=True, exist_ok=True)
        # Another for every load, and on the same disk: mappings are told apart by their paths.
        self._made = tempfile.TemporaryDirectory(prefix=".load-", dir=self._kept)
        self.path = Path(self._made.name)

    @property
    def kept(self) -> bool:
        """Whether files stay after loading."""
        return self._kept is not None

    def close(self) -> None:
        """Remove the directory; mappings stay valid."""
        self._made.cleanup()

    def ready(self, part: PackedPart, run: str) -> str:
        """The name of the part's file in the directory of a run, which is made unless it is kept already.

        Raises `StoreFull`.
        """
        name, named = part.file_name(self._source)
        kept = self._kept / name if self._kept is not None and named else None
        own = self.path / run / name
        try:
            own.parent.mkdir(exist_ok=True)
            if kept is None:
                write(own, part, self._source)
                return name
            if is_whole(kept, part):
                os.utime(kept)  # the least recently used goes first
            else:
                write(kept, part, self._source)
            own.hardlink_to(kept)
        except OSError as error:
            raise StoreFull(
                f"the packed form of {part.title} can not be written to {self.path}: {error.strerror}",
                remedy=f"free {part.size >> 20} MiB there, or set TMPDIR to a larger disk",
            ) from error
        return name

    def let_go(self, run: str) -> None:
        """Take what a run has mapped out of this process's memory; it comes back where it is read.

        Only when the run's session was made, and before it may be dropped: what is unmapped meanwhile could
        be somebody else's memory by then.
        """
        if not sys.platform.startswith("linux"):
            return
        libc, inside = ctypes.CDLL(None), f"{(self.path / run).resolve()}/"
        for line in Path("/proc/self/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith(inside):
                start, stop = (int(end, 16) for end in fields[0].split("-"))
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


def write(path: Path, part: PackedPart, source: TensorSource) -> None:
    """Make a part's file; its name is there only when all of it is written.

    Nobody waits for the disk: what a power cut takes, the next start notices by its digest.
    """
    aside = path.with_name(f".{secrets.token_hex(8)}.new")
    try:
        with reserved(aside, part.size + _DIGEST_BYTES) as fd:
            rows, room = _Rows(fd, part.places), Room(ROOM_BYTES)
            for name, matrix in part.matrices.items():
                matrix.repack(source, partial(rows.put, name), room)
            write_at(fd, rows.digest(), part.size)
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def is_whole(path: Path, part: PackedPart) -> bool:
    """Whether a file is there and is what was written."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != part.size + _DIGEST_BYTES:
                _log.warning("%s has another length than it was written with; it is made again", path)
                return False
            if os.pread(file.fileno(), _DIGEST_BYTES, part.size) == _digest(file.fileno(), part.places):
                return True
            _log.warning("%s was altered; it is made again", path)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("%s can not be read and is made again: %s", path, error.strerror)
    return False


class _Rows:
    """Writes the rows of matrices' operands to their places, in order, and hashes them on the way."""

    def __init__(self, fd: int, places: Mapping[str, Place]) -> None:
        self._fd = fd
        self._places = places
        self._hashers = {name: blake3() for name in places}

    def put(self, matrix: str, kind: str, row: int, rows: NDArray[Any]) -> None:
        """Rows of an operand, the first of which is number `row`."""
        name = f"{matrix}.{kind}"
        place = self._places[name]
        stride = place.operand.nbytes // place.operand.shape[0]
        data = np.ascontiguousarray(rows, place.operand.dtype).data.cast("B")
        self._hashers[name].update(data)
        write_at(self._fd, data, place.offset + row * stride)

    def digest(self) -> bytes:
        return _joined(self._hashers.values())


def _joined(hashers: Iterable[blake3]) -> bytes:
    """One digest of the digests of all operands: each is hashed while others are written between its rows."""
    return blake3(b"".join(hasher.digest() for hasher in hashers)).digest()


def _digest(fd: int, places: Mapping[str, Place]) -> bytes:
    buffer = memoryview(bytearray(_READ_BYTES))

    def hashed(place: Place) -> blake3:
        hasher, at, end = blake3(), place.offset, place.offset + place.operand.nbytes
        while at < end and (count := os.preadv(fd, [buffer[: end - at]], at)):
            hasher.update(buffer[:count])
            at += count
        return hasher

    return _joined(hashed(place) for place in places.values())

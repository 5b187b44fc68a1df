"""Files of operands: a part's weights as ONNX Runtime wants them, which it maps while it loads.

One file for each layer and one for the head: the operands of `ort_weights`, each at a page's start, and a
BLAKE3 of it all. ONNX Runtime makes its own copy of a matrix and lets go of the mapping, so that no more than
one matrix is in memory twice, however large the graph. Scales it copies too but keeps mapped: their pages
are let go of, since it reads them again on few processors. The form is the same on all of them.

Where a source says what its tensors come from (`interface.TracedSource`), the file is kept under that name
and found again by the next start; elsewhere it is removed as soon as it was loaded. It is written aside and
renamed when it is durable; one that is cut short or altered is noticed and made again.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from omninfer.engines.interface import TensorSource, TracedSource
from omninfer.engines.ort_weights import Matrix, Operand
from omnistore.config import sync_directory
from omnistore.errors import StoreFull
from omnistore.store.disk import sync_data

VERSION: Final = 1
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
                write(own, part, self._source, durable=False)
                return name
            if is_whole(kept, part.size):
                os.utime(kept)  # the least recently used goes first
            else:
                write(kept, part, self._source, durable=True)
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


def write(path: Path, part: PackedPart, source: TensorSource, *, durable: bool) -> None:
    """Make a part's file. Its name is there only when all of it is, `durable` even after a power cut."""
    with _aside(path) as aside, aside.open("w+b") as file:
        os.ftruncate(file.fileno(), part.size + _DIGEST_BYTES)
        for name, matrix in part.matrices.items():
            matrix.repack(source, _Rows(file.fileno(), name, part.places).put)
        os.pwrite(file.fileno(), _digest(file.fileno(), part.size), part.size)
        if durable:
            sync_data(file.fileno())
    if durable:
        sync_directory(path.parent)


def is_whole(path: Path, size: int) -> bool:
    """Whether a file is there and is what was written."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size + _DIGEST_BYTES:
                _log.warning("%s has another length than it was written with; it is made again", path)
                return False
            if os.pread(file.fileno(), _DIGEST_BYTES, size) == _digest(file.fileno(), size):
                return True
            _log.warning("%s was altered; it is made again", path)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("%s can not be read and is made again: %s", path, error.strerror)
    return False


@dataclass(frozen=True, slots=True)
class _Rows:
    """Writes the rows of one matrix's operands to their places."""

    fd: int
    name: str
    places: Mapping[str, Place]

    def put(self, kind: str, row: int, rows: NDArray[Any]) -> None:
        place = self.places[f"{self.name}.{kind}"]
        stride = place.operand.nbytes // place.operand.shape[0]
        data = np.ascontiguousarray(rows, place.operand.dtype).data.cast("B")
        at, done = place.offset + row * stride, 0
        while done < len(data):
            done += os.pwrite(self.fd, data[done:], at + done)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A path beside another, which takes its place unless something is raised."""
    fd, name = tempfile.mkstemp(prefix=".", suffix=".new", dir=path.parent)
    os.close(fd)
    try:
        yield Path(name)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise


def _digest(fd: int, size: int) -> bytes:
    hasher, buffer, at = blake3(), bytearray(_READ_BYTES), 0
    while at < size:
        count = os.preadv(fd, [memoryview(buffer)[: size - at]], at)
        if not count:
            break
        hasher.update(memoryview(buffer)[:count])
        at += count
    return hasher.digest()

"""Publishing files of this machine: cut, sign, and know where their blocks are.

In place, the user's files stay what they are and where they are. Copied, they are taken in under
the home while they are cut, from the same bytes in memory, so that what is published is what we hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from omnistore.chunker.cut import CutResult, Take, cut, model_files
from omnistore.chunker.layout import Placement
from omnistore.cid import CID
from omnistore.config import sync_directory
from omnistore.keys import PrivateKey
from omnistore.manifest import PartRef, SignedManifest
from omnistore.store.disk import FileLock, check_room, cloned, reported, reserved, sync_data, write_through
from omnistore.store.files import FileStore, write_nodes
from omnistore.store.index import StoredFile, part_path
from omnistore.store.interface import Model

INCOMING = "incoming-"
"""Directories of copies under way, beside the models'; each has a lock of its own name."""

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Published:
    """A model that this home now holds and vouches for."""

    cid: CID
    """The signed manifest's."""
    manifest: CID
    name: str
    parts: tuple[PartRef, ...]
    bytes: int
    """Of all files."""
    blocks: int
    """Distinct ones."""
    files: tuple[Path, ...]


def total_size(path: Path) -> int:
    """Bytes of all files of the model that `path` belongs to: what `publish` will report as progress."""
    return sum(file.stat().st_size for file in model_files(path))


def publish(
    store: FileStore,
    path: Path,
    key: PrivateKey,
    *,
    name: str | None = None,
    sha256: bool = False,
    copy: bool = False,
    progress: Progress | None = None,
) -> Published:
    """Add the model that `path` belongs to and sign its manifest. Doing it again changes nothing.

    Raises `InputError` and its leaves, `SourceChanged`, `StoreFull`, `StoreLocked`.
    """

    def cutting(paths: Sequence[Path], take: Take | None = None) -> tuple[CutResult, list[Placement]]:
        places: list[Placement] = []
        result = cut(paths, name=name, sha256=sha256, sink=places.extend, take=take, progress=progress)
        return result, places

    paths = model_files(path)
    if copy:
        return _publish_copy(store, paths, key, cutting)
    result, places = cutting(paths)
    files = [
        StoredFile(0, source.path, source.size, source.mtime_ns, source.inode, False, False, False)
        for source in result.sources
    ]
    return _enter(store, result, key, files, places)


class _Cutting(Protocol):
    """`cut`, with what the caller of `publish` wants of it."""

    def __call__(
        self, paths: Sequence[Path], take: Take | None = None
    ) -> tuple[CutResult, list[Placement]]: ...


def _publish_copy(
    store: FileStore,
    paths: Sequence[Path],
    key: PrivateKey,
    cutting: _Cutting,
) -> Published:
    import shutil  # 3 ms, for its archives

    tag = INCOMING + os.urandom(8).hex()
    directory = store.models_directory / tag
    with FileLock(store.config.home / "locks" / f"{tag}.lock", "a copy") as lock:
        try:
            with reported(directory, "made"):
                directory.mkdir(mode=0o700, parents=True)
            needed = sum(path.stat().st_size for path in paths)
            check_room(directory, needed, store.config.disk_reserve, paths[0].name)
            result, places = _cut_copying(cutting, paths, directory)
            with store.lock_model(result.node.cid, result.manifest.name):
                return _take_in(store, directory, result, key, places)
        finally:
            # What stays behind because this fails is deleted by the next garbage collection.
            shutil.rmtree(directory, ignore_errors=True)
            lock.remove()


def _cut_copying(
    cutting: _Cutting, paths: Sequence[Path], directory: Path
) -> tuple[CutResult, list[Placement]]:
    """Cut, with durable copies in `directory`: shared extents, else written as they are read."""
    copies = [directory / path.name for path in paths]
    if cloned(paths[0], copies[0]) and all(
        cloned(path, copy) for path, copy in zip(paths[1:], copies[1:], strict=True)
    ):
        return cutting(copies)
    for copy in copies:
        copy.unlink(missing_ok=True)
    with reported(directory, "written"), _targets(copies, paths) as fds:
        result, places = cutting(paths, lambda file, data, offset: write_through(fds[file], data, offset))
        for fd, source in zip(fds, result.sources, strict=True):
            # It may have been opened a moment after its size was asked for.
            os.ftruncate(fd, source.size)
            sync_data(fd)
        return result, places


@contextmanager
def _targets(copies: Sequence[Path], paths: Sequence[Path]) -> Iterator[list[int]]:
    with ExitStack() as stack:
        sizes = [path.stat().st_size for path in paths]
        yield [stack.enter_context(reserved(copy, size)) for copy, size in zip(copies, sizes, strict=True)]


def _take_in(
    store: FileStore, copies: Path, result: CutResult, key: PrivateKey, places: Sequence[Placement]
) -> Published:
    """Move `copies` to the model's directory; bytes first, then the index."""
    directory = store.models_directory / str(result.node.cid)
    files = [
        StoredFile(0, directory / source.path.name, source.size, 0, 0, True, False, False)
        for source in result.sources
    ]
    with reported(directory, "written"):
        directory.mkdir(mode=0o700, exist_ok=True)
        for file in files:
            (copies / file.path.name).replace(file.path)
        sync_directory(directory)
        sync_directory(directory.parent)
        published = _enter(store, result, key, files, places)
        for file in files:
            # A fetch of the same model that had not ended: the index names the whole file now.
            part_path(file.path).unlink(missing_ok=True)
    return published


def _enter(
    store: FileStore,
    result: CutResult,
    key: PrivateKey,
    files: Sequence[StoredFile],
    places: Sequence[Placement],
) -> Published:
    """Put everything in the index in one transaction: the model is here whole, or not at all."""
    by_file: dict[int, list[tuple[bytes, int, int]]] = {number: [] for number in range(len(files))}
    for place in places:
        by_file[place.file].append((place.cid.digest, place.offset, place.size))
    signed = SignedManifest.sign(result.node.cid, key).encode()
    nodes = [signed, result.node, *(node for _, node in result.parts)]
    manifest = result.manifest
    parts = {part.key: part for part, _ in result.parts}
    model = Model(signed.cid, result.node.cid, manifest, key.public, parts)
    with store.index.writing() as writer:
        write_nodes(writer, nodes)
        row = store.register(writer, model, parts)
        for number, file in enumerate(files):
            known = writer.put_file(file)
            writer.clear_locations(known)
            writer.add_locations(known, by_file[number])
            writer.put_model_file(row, number, known)
    return Published(
        cid=signed.cid,
        manifest=result.node.cid,
        name=manifest.name,
        parts=manifest.parts,
        bytes=manifest.size,
        blocks=len({place.cid for place in places}),
        files=tuple(file.path for file in files),
    )

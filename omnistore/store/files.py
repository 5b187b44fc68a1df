"""`FileStore`: the store of a home, where the GGUF files themselves hold the blocks.

A block is a place in a file: the user's own file, referenced where it lies, or one under
`$OMNI_HOME/models/<manifest's CID>/` that was fetched or taken in. The SQLite index says which
block is where; whatever is read is checked against its digest again. Putting fetched blocks
together is `omnistore.store.assembly`'s, publishing files `omnistore.store.publish`'s, deleting
`omnistore.store.sweep`'s.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from omnistore.block import Block
from omnistore.chunker.layout import Placement
from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.config import Config, make_home
from omnistore.errors import BlockMissing, DigestMismatch, LocalProtocolError, SourceChanged, StoreError
from omnistore.manifest import PartKey
from omnistore.store import packed
from omnistore.store.assembly import FileAssembly
from omnistore.store.database import Database
from omnistore.store.disk import FileLock, boot_id
from omnistore.store.index import Index, Location, ModelRow, StoredFile, Writer, part_path
from omnistore.store.interface import Model, ModelStatus
from omnistore.store.models import checked, choose_model, open_model

_log = logging.getLogger(__name__)


class FileStore:
    """Blocks, nodes and models of one `$OMNI_HOME`; safe for several threads and processes."""

    def __init__(self, config: Config) -> None:
        """Open the home, making it when it is new. Raises `StoreError` and its leaves, `BadConfig`."""
        self.config = config
        make_home(config.home)
        self.database = Database(config.home / "index.sqlite", config.busy_timeout)
        self.index = Index(self.database)
        self._reported: set[int] = set()
        """Files that a warning was logged for."""
        self._used: dict[int, float] = {}
        """When files were last read from, in seconds since 1970, as far as the index does not know it."""
        self._lock = threading.Lock()
        self._recover()

    @property
    def models_directory(self) -> Path:
        """Where files of ours are, one directory for each manifest."""
        return self.config.home / "models"

    @property
    def packed_directory(self) -> Path | None:
        return self.config.home / packed.DIRECTORY

    def lock_model(self, manifest: CID, name: str, *, brief: bool = False, wait: bool = False) -> FileLock:
        """Keep others from writing this model's files. Raises `StoreLocked`."""
        path = self.config.home / "locks" / f"{manifest}.lock"
        return FileLock(path, f"model {name}", brief=brief, wait=wait)

    def has(self, cid: CID) -> bool:
        find = self.index.has_node if cid.codec == DAG_CBOR else self.index.has_block
        return find(cid.digest)

    def held(self, cids: Iterable[CID]) -> set[CID]:
        nodes: dict[bytes, CID] = {}
        blocks: dict[bytes, CID] = {}
        for cid in cids:
            (nodes if cid.codec == DAG_CBOR else blocks)[cid.digest] = cid
        found = {nodes[digest] for digest in self.index.held_nodes(nodes.keys())}
        return found | {blocks[digest] for digest in self.index.held_blocks(blocks.keys())}

    def read(self, cid: CID, room: memoryview | None = None) -> Block:
        if cid.codec == DAG_CBOR:
            return self._read_node(cid)
        fault: SourceChanged | DigestMismatch | None = None
        for location in self.index.locations(cid.digest):
            try:
                block = read_location(location, cid, room)
                self._used[location.file.id] = time.time()
                return block
            except (SourceChanged, DigestMismatch) as error:
                self._distrust(location, cid, error)
                fault = fault or error
        if fault is not None:
            raise fault
        raise BlockMissing(f"block {cid} is not held here")

    def put_node(self, block: Block) -> None:
        if block.cid.codec != DAG_CBOR:
            raise LocalProtocolError(f"{block.cid} is not a dag-cbor node")
        self.put_nodes([block])

    def put_nodes(self, blocks: Iterable[Block]) -> None:
        """Keep several nodes at the price of one commit."""
        with self.index.writing() as writer:
            write_nodes(writer, blocks)

    def model(self, cid: CID) -> Model:
        row = self.index.model(cid)
        if row is None:
            return checked(open_model(cid, self._read_node, self.has))
        return self._known(row)

    def models(self) -> Sequence[ModelStatus]:
        found = []
        for row in self.index.models():
            try:
                found.append(self._status(row))
            except BlockMissing:
                now = self.index.model(row.cid)
                if now is not None and now.id == row.id:
                    raise
                # Evicted, or swept by another process, since the list was made.
        return found

    def status(self, cid: CID) -> ModelStatus:
        return self._status(self._row(cid))

    def _row(self, cid: CID) -> ModelRow:
        row = self.index.model(cid)
        if row is None:
            raise BlockMissing(
                f"model {cid} is not held here", remedy="`omni ls` lists the models held here."
            )
        return row

    def find(self, text: str) -> Model:
        return self.model(
            choose_model(text, [(row.cid, row.manifest, row.name) for row in self.index.models()])
        )

    def unpin(self, cid: CID, parts: Collection[PartKey] | None = None) -> None:
        row = self._row(cid)
        status = self._status(row)
        with self.index.writing() as writer:
            writer.pin(row.id, status.pinned if parts is None else parts, False)
            writer.set_used_model(row.id, time.time())

    def mirrors(self, cid: CID) -> Sequence[str]:
        return self.index.mirrors(cid)

    def set_mirrors(self, cid: CID, urls: Collection[str]) -> None:
        row = self.index.model(cid)
        if row is None:
            raise BlockMissing(f"model {cid} is not held here")
        with self.index.writing() as writer:
            writer.put_mirrors(row.id, sorted(set(urls)))

    def announced(self) -> Collection[CID]:
        self._look_at_files()
        found = {CID.of_digest(DAG_CBOR, digest) for digest in self.index.whole_parts()}
        for row in self.index.models():
            found |= {row.cid, row.manifest}
        return found

    def assemble(
        self, model: Model, placements: Sequence[Placement], parts: Collection[PartKey]
    ) -> FileAssembly:
        # Whoever sweeps looks at every model for a moment: no reason to refuse.
        lock = self.lock_model(model.manifest_cid, model.manifest.name, wait=True)
        try:
            with self.index.writing() as writer:
                # Nobody else can write now: what is there stays until its model keeps it.
                self._check_nodes(model)
                row = self.register(writer, model, parts)
            assembly = FileAssembly(self, lock, model, row, placements, parts)
            with self.index.writing(power_safe=False) as writer:
                writer.set_used_model(row, time.time())
            return assembly
        except BaseException:
            lock.release()
            raise

    def _check_nodes(self, model: Model) -> None:
        refs = (ref.cid for ref in model.manifest.parts if ref.key in model.parts)
        nodes = {cid.digest for cid in (model.cid, model.manifest_cid, *refs)}
        lacking = len(nodes) - len(self.index.held_nodes(nodes))
        if lacking:
            raise BlockMissing(f"{lacking} nodes of {model.manifest.name} are not here: put them first")

    def register(self, writer: Writer, model: Model, pins: Collection[PartKey]) -> int:
        """Know a model and the links of its held parts, and pin `pins`; the model's row."""
        row = writer.put_model(model.cid, model.manifest_cid, model.manifest.name)
        writer.put_parts(row, ((ref.key, ref.cid) for ref in model.manifest.parts))
        already = self.index.checked_parts(row)
        for key in model.parts.keys() - already:
            ref = model.manifest.part(key)
            assert ref is not None, "a Model's parts are its manifest's"
            writer.put_links(row, key, ref.cid, model.parts[key].links())
        writer.pin(row, pins, True)
        return row

    def version(self) -> int:
        """A number that changes when this or another process changed the index; for one caller at a time."""
        return self.database.version()

    def note_uses(self) -> None:
        """Have the index know what was read since it was last told, for eviction."""
        used, self._used = self._used, {}
        if used:
            with self.index.writing(power_safe=False) as writer:
                writer.set_used(used)

    def close(self) -> None:
        # Which model goes first is not worth failing for.
        with suppress(StoreError):
            self.note_uses()
        self.database.close()

    def _read_node(self, cid: CID) -> Block:
        data = self.index.node(cid.digest) if cid.codec == DAG_CBOR else None
        if data is None:
            raise BlockMissing(f"node {cid} is not held here")
        return Block.verify_untrusted(cid, data)

    def _known(self, row: ModelRow) -> Model:
        model = open_model(row.cid, self._read_node, self.has)
        for key in model.parts.keys() - self.index.checked_parts(row.id):
            # Its node came after the model was registered: nobody has looked at it yet.
            model.parts[key]
        return model

    def _status(self, row: ModelRow) -> ModelStatus:
        model = open_model(row.cid, self._read_node, self.has)
        states = self.index.parts(row.id)
        chosen: dict[int, StoredFile] = {}
        for number, file in self.index.files(row.id):
            if not file.lost:
                chosen.setdefault(number, file)
        files = [chosen[number] for number in sorted(chosen)]
        placed = len(files) == len(model.manifest.files)
        return ModelStatus(
            model=model,
            pinned=frozenset(state.key for state in states if state.pinned),
            complete=frozenset(state.key for state in states if state.checked and state.complete),
            bytes_held=sum(state.bytes_held for state in states),
            files=tuple(file.where for file in files) if placed else (),
            referenced=placed and not any(file.owned for file in files),
            mirrors=tuple(self.index.mirrors(row.cid)),
        )

    def _distrust(self, location: Location, cid: CID, error: SourceChanged | DigestMismatch) -> None:
        """Forget a place whose bytes are not the block's; all of a file that is gone."""
        file = location.file
        gone = not file.where.exists() and not (file.owned and other_name(file).exists())
        # What may not be read just now is not forgotten: nothing says that its bytes are wrong.
        if gone or os.access(file.where, os.R_OK):
            with self.index.writing() as writer:
                if gone:
                    writer.set_lost(file.id, True)
                else:
                    writer.drop_location(cid.digest, file.id, location.offset)
        with self._lock:
            first = file.id not in self._reported
            self._reported.add(file.id)
        if first:
            _log.warning("%s", error.diagnosis())

    def _recover(self) -> None:
        """Bring the index in line with what a crash, a power cut, or a disk that came back, changed."""
        now = boot_id()
        if any(file.unsynced not in (None, now) for _, file in self.index.files()):
            with self.database.alone():
                # Asked again: another process may have done it while we waited.
                for _, file in self.index.files():
                    if file.unsynced not in (None, now):
                        self._read_again(file)
        self._look_at_files()

    def _look_at_files(self) -> None:
        """Follow what became of files: gone, back again, or renamed just before a crash."""
        for _, file in self.index.files():
            there = file.where.exists()
            if file.owned and not there and other_name(file).exists():
                with self.index.writing() as writer:
                    writer.set_partial(file.id, not file.partial)
            elif not file.owned and file.lost == there:
                with self.index.writing() as writer:
                    # What is back under its name is read and checked like any other file.
                    writer.set_lost(file.id, not there)

    def _read_again(self, file: StoredFile) -> None:
        """Forget what a power cut took: the machine stopped before this file was on the disk."""
        _log.warning("%s was being written when the machine stopped: checking it", file.where)
        contents = self.index.contents(file.id)
        gone = [place for place in contents if not still_holds(file, *place)]
        with self.index.writing() as writer:
            for offset, _, digest in gone:
                writer.drop_location(digest, file.id, offset)
            writer.set_synced(file.id)


def still_holds(file: StoredFile, offset: int, length: int, digest: bytes) -> bool:
    """Whether a place in a file still has a block's bytes."""
    try:
        read_location(Location(file, offset, length), CID.of_digest(RAW, digest))
    except (SourceChanged, DigestMismatch):
        return False
    return True


def write_nodes(writer: Writer, blocks: Iterable[Block]) -> None:
    """Keep nodes within a transaction."""
    for block in blocks:
        writer.put_node(block.cid.digest, bytes(block.data), time.time())


def other_name(file: StoredFile) -> Path:
    """What an owned file is called if a crash came between its renaming and the index's commit."""
    return file.path if file.partial else part_path(file.path)


def read_location(location: Location, cid: CID, room: memoryview | None = None) -> Block:
    """The block at a place, digest checked; in `room` if it fits there.

    Raises `SourceChanged` or `DigestMismatch`, naming the file.
    """
    file = location.file
    try:
        fd = _open(file)
    except OSError as error:
        raise _changed(file, f"can not be opened: {error.strerror}") from None
    try:
        data: bytes | memoryview
        if room is None or len(room) < location.length:
            data = os.pread(fd, location.length, location.offset)
        else:
            data = room[: os.preadv(fd, [room[: location.length]], location.offset)]
        same = _stamp(os.fstat(fd)) == (file.size, file.mtime_ns, file.inode)
    except OSError as error:
        raise DigestMismatch(
            f"{file.where} can not be read at {location.offset}: {error.strerror}",
            remedy="The disk may be failing: copy what is important, then `omni verify`.",
        ) from None
    finally:
        os.close(fd)
    try:
        return Block.verify_untrusted(cid, data)
    except DigestMismatch:
        if not file.owned and not same:
            raise _changed(file, "was changed since it was added") from None
        raise DigestMismatch(
            f"{file.where}: the {location.length} bytes at {location.offset} are not block {cid} any more",
            remedy=f"Run `omni verify --repair`, then {'`omni pin`' if file.owned else '`omni add`'} again.",
        ) from None


def _open(file: StoredFile) -> int:
    try:
        return os.open(file.where, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if not file.owned:
            raise
        # It is being renamed by an assembly that just became whole.
        return os.open(other_name(file), os.O_RDONLY | os.O_CLOEXEC)


def _changed(file: StoredFile, what: str) -> SourceChanged:
    remedy = (
        "Fetch the model again with `omni pin`."
        if file.owned
        else f"Put it back, or run `omni add {file.path}` (or its new path) again."
    )
    return SourceChanged(f"{file.where} {what}", remedy=remedy)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino

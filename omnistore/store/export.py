"""Writing a model's files somewhere else, byte for byte.

Blocks are read one by one, so every byte is checked against its CID on the way out; a copy is made
of those even where the file system could share, because a file that rotted must not be handed on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omnistore.chunker.gguf import read_header_untrusted
from omnistore.chunker.join import join_file
from omnistore.chunker.layout import Placement, resolve_untrusted
from omnistore.cid import CID
from omnistore.errors import BlockMissing, InputError
from omnistore.manifest import HeaderPart, PartKey
from omnistore.store.files import FileStore
from omnistore.store.interface import Model
from omnistore.store.models import names_of

Progress = Callable[[int], None]


def export(store: FileStore, model: Model, output: Path, progress: Progress | None = None) -> list[Path]:
    """Write the files to `output`: a file, or a directory for several or an existing one.

    Raises `BlockMissing` for a model that is not whole, `InputError` for a target that exists,
    `SourceChanged` or `DigestMismatch` naming the file that went bad.
    """
    status = store.status(model.cid)
    if not status.whole:
        raise BlockMissing(
            f"{model.manifest.name} is not whole here: {status.bytes_held:,} bytes of its parts are held",
            remedy=f"Fetch the rest with `omni pin {model.cid}`; `omni verify` names a file that is gone.",
        )
    names = names_of(model.manifest)
    into = output.is_dir() or len(names) > 1
    targets = [output / name if into else output for name in names]
    for target in targets:
        if target.exists():
            raise InputError(f"{target} exists", remedy="Remove it or choose another path.")
    places = _places(store, model)

    def read(cid: CID) -> bytes | memoryview:
        block = store.read(cid)
        if progress:
            progress(len(block))
        return block.data

    for number, (target, entry) in enumerate(zip(targets, model.manifest.files, strict=True)):
        target.parent.mkdir(parents=True, exist_ok=True)
        join_file(target, entry.size, [place for place in places if place.file == number], read)
    return targets


def _places(store: FileStore, model: Model) -> tuple[Placement, ...]:
    """Where every block belongs, by headers read from verified blocks."""
    headers = []
    for number, entry in enumerate(model.manifest.files):
        part = model.parts[PartKey("header", number)]
        assert isinstance(part, HeaderPart), "the manifest's reference was checked"
        data = b"".join(store.read(cid).data for cid in part.blocks)
        headers.append(read_header_untrusted(data, file_size=entry.size, name=entry.name))
    return resolve_untrusted(model.manifest, dict(model.parts), headers)

"""`FileTensorSource`: tensors straight out of GGUF files on this machine.

For local runs and tests; the source that reads from the store's blocks lives with the pipeline. It
reads instead of mapping: pages of a mapping count as the process's memory for as long as it exists, and a
file that shrinks under a mapping kills the process.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Mapping
from pathlib import Path

from omninfer.arch import ModelSpec
from omnistore.chunker.ggml import GGMLType
from omnistore.chunker.gguf import TensorInfo, read_header_untrusted
from omnistore.errors import InputError, SourceChanged


class FileTensorSource:
    """The tensors of one model, from all the files of its split set."""

    def __init__(self, *paths: Path) -> None:
        self._where: dict[str, tuple[Path, TensorInfo]] = {}
        self.metadata: Mapping[str, object] = {}
        """Of the first file, which describes the model."""
        for path in paths:
            try:
                with (
                    path.open("rb") as file,
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
                ):
                    header = read_header_untrusted(mapped, file_size=len(mapped), name=str(path))
            except (OSError, ValueError) as error:
                raise InputError(f"can not read {path}: {error}") from error
            self.metadata = self.metadata or header.metadata
            self._where.update({tensor.name: (path, tensor) for tensor in header.tensors})

    def model(self) -> ModelSpec:
        return ModelSpec.from_metadata_untrusted(self.metadata, self._where)

    def names(self) -> Collection[str]:
        return self._where.keys()

    def info(self, name: str) -> tuple[GGMLType, tuple[int, ...]]:
        tensor = self._where[name][1]
        return tensor.type, tensor.shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        path, tensor = self._where[name]
        data = bytearray((tensor.size if stop is None else stop) - start)
        with path.open("rb") as file:
            file.seek(tensor.offset + start)
            if file.readinto(data) != len(data):
                raise SourceChanged(f"{path} ends before tensor {name} does")
        return memoryview(data)

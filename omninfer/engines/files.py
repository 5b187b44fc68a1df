"""`FileTensorSource`: tensors straight out of GGUF files on this machine, by mmap.

For local runs and tests; the source that reads from the store's blocks lives with the pipeline.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from omninfer.arch import ModelSpec
from omnistore.errors import InputError

if TYPE_CHECKING:
    from omnistore.chunker.ggml import GGMLType


class FileTensorSource:
    """The tensors of one model, from all the files of its split set."""

    def __init__(self, *paths: Path) -> None:
        from omnistore.chunker.gguf import read_header_untrusted

        self._views: list[memoryview] = []
        self._where: dict[str, tuple[GGMLType, tuple[int, ...], memoryview]] = {}
        self.metadata: Mapping[str, object] = {}
        """Of the first file, which describes the model."""
        for path in paths:
            try:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise InputError(f"can not read {path}: {error}") from error
            view = memoryview(mapped)
            header = read_header_untrusted(view, file_size=len(view), name=str(path))
            self.metadata = self.metadata or header.metadata
            for tensor in header.tensors:
                data = view[tensor.offset : tensor.offset + tensor.size]
                self._where[tensor.name] = (tensor.type, tensor.shape, data)

    def model(self) -> ModelSpec:
        return ModelSpec.from_metadata_untrusted(self.metadata, self._where)

    def names(self) -> Collection[str]:
        return self._where.keys()

    def info(self, name: str) -> tuple[GGMLType, tuple[int, ...]]:
        kind, shape, _ = self._where[name]
        return kind, shape

    def read(self, name: str) -> memoryview:
        return self._where[name][2]

"""Small JSON documents in the home: read whole, replaced whole, for their owner's eyes only.

A reader sees the old document or the new one, whatever happens to the writer; `update` lets one process
at a time change it. What is in them is other modules' business. For a few kilobytes, not for data.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias

from omnistore.config import make_home, sync_directory
from omnistore.errors import BadConfig

Document: TypeAlias = dict[str, Any]

MAX_SIZE: Final = 16 << 20
"""Bytes of a document that is read."""


def read_document(path: Path) -> Document:
    """The document in `path`, empty when there is no file. Raises `BadConfig`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SIZE + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BadConfig(f"{path} can not be read: {error.strerror}") from None
    try:
        document = json.loads(data) if len(data) <= MAX_SIZE else None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise BadConfig(
            f"{path} is damaged: it is no JSON object", remedy="Restore it from a backup, or remove it."
        )
    return document


def write_private(path: Path, data: bytes) -> None:
    """Replace a file, or make it, at once and durably, for its owner only. Raises `BadConfig`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise BadConfig(f"{path} can not be written: {error.strerror}") from None


def update(path: Path, change: Callable[[Document], Document]) -> Document:
    """Replace the document by `change(document)`, while no other process does; the new one."""
    make_home(path.parent)
    with _locked(path):
        document = change(read_document(path))
        write_private(path, json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")
    return document


def remove_document(path: Path) -> bool:
    """Remove a document durably; whether there was one. Raises `BadConfig`."""
    try:
        path.unlink()
        sync_directory(path.parent)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise BadConfig(f"{path} can not be removed: {error.strerror}") from None
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The lock is a file of its own: the document's is replaced at every write."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BadConfig(f"{lock} can not be opened: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)

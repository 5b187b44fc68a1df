"""The home a command works on, from the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from omnistore.config import Config
from omnistore.store.files import FileStore


def config() -> Config:
    """The configuration that `$OMNI_HOME` selects."""
    return Config.from_environment(os.environ)


@contextmanager
def home_store() -> Iterator[FileStore]:
    """The home's store, for one command."""
    store = FileStore(config())
    try:
        yield store
    finally:
        store.close()

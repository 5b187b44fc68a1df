"""The home a command works on, from the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from omnistore.config import Config, settings
from omnistore.settings import check_untrusted
from omnistore.store.files import FileStore


def config(**given: Any) -> Config:
    """The configuration that `$OMNI_HOME` selects, overridden by what the command line gave.

    Options are settings by name, as text or lists of texts; None and empty lists were not given.
    """
    found = Config.from_environment(os.environ)
    known = settings()
    values: dict[str, Any] = {}
    for name, value in given.items():
        if value is not None and value != ():
            values[name] = check_untrusted(f"--{name.replace('_', '-')}", known[name], value)
    return replace(found, **values)


@contextmanager
def home_store() -> Iterator[FileStore]:
    """The home's store, for one command."""
    store = FileStore(config())
    try:
        yield store
    finally:
        store.close()

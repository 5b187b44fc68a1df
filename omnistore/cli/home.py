"""The home a command works on, from the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from omnistore.config import Config, settings
from omnistore.settings import check_untrusted

if TYPE_CHECKING:
    from omnistore.store.files import FileStore


def config(**given: Any) -> Config:
    """The configuration that `$OMNI_HOME` selects, overridden by what the command line gave.

    Options are settings by name, as text or lists of texts; None and empty lists were not given. In a
    private swarm, its members are bootstrap nodes too.
    """
    # What a command does not use, it does not wait for: half of a short one's time is imports.
    from omnistore.membership import membership

    found = Config.from_environment(os.environ)
    member = membership(found.home)
    known = settings()
    values: dict[str, Any] = {}
    if member is not None:
        values["bootstrap"] = tuple(dict.fromkeys([*member.bootstrap, *found.bootstrap]))
    for name, value in given.items():
        if value is not None and value != ():
            values[name] = check_untrusted(f"--{name.replace('_', '-')}", known[name], value)
    return replace(found, **values)


@contextmanager
def home_store() -> Iterator[FileStore]:
    """The home's store, for one command. What is in it does not depend on the home's swarm."""
    from omnistore.store.files import FileStore

    store = FileStore(Config.from_environment(os.environ))
    try:
        yield store
    finally:
        store.close()

"""Both stores keep the contract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from omnistore.config import Config
from omnistore.store.files import FileStore
from omnistore.store.interface import Store
from omnistore.store.memory import MemoryStore
from omnistore.testing.store_contract import StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


class TestFileStore(StoreContract):
    @pytest.fixture
    def store(self, home: Path) -> Iterator[Store]:
        store = FileStore(Config(home))
        yield store
        store.close()

    def reopen(self, store: Store) -> Store:
        assert isinstance(store, FileStore)
        store.close()
        # In place, so that the fixture closes what is open at the end.
        store.__init__(store.config)  # type: ignore[misc]  # on purpose: the object stays the fixture's
        return store

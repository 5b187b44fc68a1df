"""Keeping files of ours under a cap: the least recently used models that nothing pins go first.

Goes by what files take on the disk. What engines packed goes before any model. Never touches what is
pinned, being fetched, or the user's own; so what is pinned may take more than the cap. Deleting models is
`sweep`'s, in an order that a crash can not harm.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from omnistore.store.disk import allocated
from omnistore.store.files import FileStore
from omnistore.store.packed import packed_bytes, packed_files
from omnistore.store.sweep import Swept, free_files, sweep

_log = logging.getLogger(__name__)


def owned_bytes(store: FileStore) -> int:
    """Disk space of all files of ours, with what engines packed."""
    models = sum(allocated(file.where) for _, file in store.index.files() if file.owned)
    return models + packed_bytes(store.config.home)


def evict(store: FileStore, cap: int, *, now: float) -> list[Swept]:
    """Free until files of ours take `cap` bytes or nothing more may go; `now` in seconds since 1970."""
    rounds = _evict_packed(store, owned_bytes(store) - cap)
    # Read and written to by now, or it would look unused.
    store.note_uses()
    tried: set[int] = set()
    # Another round when a model shared what it was to free, or was in use.
    while (over := owned_bytes(store) - cap) > 0 and (victims := _victims(store, over, tried)):
        swept = sweep(store, now=now, only=victims)
        tried |= victims
        if swept.models:
            _log.info("evicted %s: %d bytes", ", ".join(swept.models), swept.bytes)
            rounds.append(swept)
    return rounds


def _evict_packed(store: FileStore, over: int) -> list[Swept]:
    """Free `over` bytes of what engines packed, or all of it."""
    doomed = []
    for path in packed_files(store.config.home):
        if over <= 0:
            break
        doomed.append(path)
        over -= allocated(path)
    if not doomed:
        return []
    swept = Swept((), 0, tuple(doomed), free_files(doomed, dry_run=False), ())
    _log.info("evicted %d files that engines had packed: %d bytes", len(doomed), swept.bytes)
    return [swept]


def _victims(store: FileStore, over: int, tried: Collection[int]) -> frozenset[int]:
    """The models to forget, so that `over` bytes become free."""
    found = set()
    for model in store.index.evictable():
        if over <= 0:
            break
        if model in tried:
            continue
        found.add(model)
        over -= sum(allocated(file.where) for _, file in store.index.files(model) if file.owned)
    return frozenset(found)

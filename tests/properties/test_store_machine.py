"""A store against a dictionary: any sequence of operations leaves both with the same blocks."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from omnistore.cid import CID
from omnistore.config import Config
from omnistore.errors import BlockMissing, StoreError
from omnistore.manifest import PartKey
from omnistore.store.files import FileStore
from omnistore.store.publish import publish
from omnistore.store.sweep import sweep
from omnistore.testing.store_contract import PUBLISHER, Sample, begin, sample
from omnistore.testing.tiny_gguf import tiny_model

_DIRECTORY = Path(tempfile.mkdtemp(prefix="omni-machine-"))
"""Sources are cut once: every example works on copies of them."""


def _samples() -> list[Sample]:
    """Three models: two that share all layers, and a stranger."""
    specs = (("one", "a", 2), ("two", "a", 2), ("three", "b", 1))
    return [sample(_DIRECTORY, tiny_model(layers=n, seed=seed), f"{name}.gguf") for name, seed, n in specs]


SAMPLES = _samples()
shutil.rmtree(_DIRECTORY)
WHICH = st.integers(0, len(SAMPLES) - 1)


class StoreMachine(RuleBasedStateMachine):
    """The oracle: which blocks are in a source in place, and in which file of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="omni-machine-"))
        self.store = FileStore(Config(self.directory / "home"))
        self.sources = self.directory / "sources"
        self.sources.mkdir()
        for made in SAMPLES:
            for name, data in made.files.items():
                (self.sources / name).write_bytes(data)
        self.in_place: set[int] = set()
        self.ours: dict[int, set[CID]] = {}
        self.pins: dict[int, frozenset[PartKey]] = {}

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.directory)

    def held(self) -> set[CID]:
        found = {block.cid for which in self.in_place for block in SAMPLES[which].blocks()}
        return found.union(*self.ours.values()) if self.ours else found

    def source(self, which: int) -> Path:
        return self.sources / next(iter(SAMPLES[which].files))

    @rule(which=WHICH)
    def add(self, which: int) -> None:
        assert publish(self.store, self.source(which), PUBLISHER).cid == SAMPLES[which].signed.cid
        self.in_place.add(which)
        self.pins[which] = SAMPLES[which].keys

    @rule(which=WHICH)
    def copy(self, which: int) -> None:
        publish(self.store, self.source(which), PUBLISHER, copy=True)
        self.ours[which] = {block.cid for block in SAMPLES[which].blocks()}
        self.pins[which] = SAMPLES[which].keys

    @rule(which=WHICH, data=st.data())
    def fetch(self, which: int, data: st.DataObject) -> None:
        made = SAMPLES[which]
        chosen = data.draw(st.sets(st.sampled_from(sorted(made.keys, key=lambda key: key.rank)), min_size=1))
        parts = frozenset(chosen | {PartKey("header")})
        wanted = {place.cid for place in made.placements if place.part in parts}
        held = self.held()
        with self.assembling(made, parts) as assembly:
            missing = {place.cid for place in assembly.missing()}
            assert missing == wanted - held
            assert assembly.local_blocks == len(wanted & held)
            some = [block for block in made.blocks() if block.cid in missing][: data.draw(st.integers(0, 30))]
            assembly.write(some)
            left = missing - {block.cid for block in some}
            assert {place.cid for place in assembly.missing()} == left
            if not left:
                assembly.finish()
        if which not in self.in_place:
            self.ours.setdefault(which, set()).update(wanted - left)
        self.pins[which] = self.pins.get(which, frozenset()) | parts

    @contextmanager
    def assembling(self, made: Sample, parts: frozenset[PartKey]) -> Iterator[object]:
        assembly = begin(self.store, made, parts)
        try:
            yield assembly
        finally:
            assembly.close()

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        which = data.draw(st.sampled_from(sorted(self.pins)))
        self.store.unpin(SAMPLES[which].signed.cid)
        self.pins[which] = frozenset()

    @rule()
    def collect(self) -> None:
        swept = sweep(self.store, now=time.time())
        dead = {which for which, parts in self.pins.items() if not parts}
        assert set(swept.models) == {SAMPLES[which].manifest.name for which in dead}
        for which in dead:
            del self.pins[which]
            self.in_place.discard(which)
            self.ours.pop(which, None)

    @precondition(lambda self: self.in_place)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """A file of the user's goes away, is noticed, and is put back before the next start."""
        which = data.draw(st.sampled_from(sorted(self.in_place)))
        path = self.source(which)
        away = path.with_suffix(".away")
        path.rename(away)
        try:
            for block in SAMPLES[which].blocks():
                try:
                    assert self.store.read(block.cid).data == block.data
                except StoreError:
                    continue
        finally:
            away.rename(path)
        self.reopen()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = FileStore(self.store.config)

    @invariant()
    def the_same_blocks(self) -> None:
        everything = {block.cid: block for made in SAMPLES for block in made.blocks()}
        assert self.store.held(everything) == self.held()
        for cid, block in everything.items():
            if cid in self.held():
                assert self.store.read(cid).data == block.data
            else:
                try:
                    self.store.read(cid)
                except BlockMissing:
                    continue
                raise AssertionError(f"{cid} should not be readable")

    @invariant()
    def the_same_models(self) -> None:
        found = {status.model.cid: status for status in self.store.models()}
        assert set(found) == {SAMPLES[which].signed.cid for which in self.pins}
        held = self.held()
        for which, parts in self.pins.items():
            made, status = SAMPLES[which], found[SAMPLES[which].signed.cid]
            assert status.pinned == parts
            complete = {
                key for key in made.keys if all(p.cid in held for p in made.placements if p.part == key)
            }
            assert status.complete == complete

    @invariant()
    def no_stray_files(self) -> None:
        named = {file.where for _, file in self.store.index.files() if file.owned}
        assert {path for path in self.store.models_directory.rglob("*") if path.is_file()} == named
        assert all(self.source(which).exists() for which in range(len(SAMPLES)))


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)

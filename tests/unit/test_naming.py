"""Publishing and resolving names against a DHT in memory; a seed's publications in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing
from blake3 import blake3

from omnistore.cid import CID, DAG_CBOR
from omnistore.dht.names import name_key, record_untrusted, sign
from omnistore.errors import BadConfig, BadNameRecord, NoProviders
from omnistore.keys import PrivateKey
from omnistore.naming import (
    INTERVAL,
    RENEW_BEFORE,
    VALIDITY,
    NameBook,
    Publication,
    Published,
    publish,
    resolve,
)

KEY, OTHER = PrivateKey(b"k" * 32), PrivateKey(b"o" * 32)
ONE, TWO = (CID.of_digest(DAG_CBOR, blake3(text).digest()) for text in (b"one", b"two"))
NOW = 1_000_000.0


@dataclass
class MemoryValues:
    """Peers that keep everything, each its own copy; a careless one keeps what it likes."""

    kept: dict[bytes, list[bytes]] = field(default_factory=dict)
    copies: int = 3
    puts: list[float] = field(default_factory=list)

    async def put_value(self, key: bytes, value: bytes) -> int:
        await trio.lowlevel.checkpoint()
        self.puts.append(trio.current_time())
        self.kept.setdefault(key, []).append(value)
        return self.copies

    async def get_values(self, key: bytes) -> Sequence[bytes]:
        await trio.lowlevel.checkpoint()
        return self.kept.get(key, [])


@pytest.mark.trio
async def test_a_name_means_what_was_published_last(home: Path, tmp_path: Path) -> None:
    values, book, reader = MemoryValues(), NameBook(home), NameBook(tmp_path / "reader")
    first, copies = await publish(values, book, KEY, "llama", ONE, now=NOW)
    assert (first.sequence, copies, first.not_after) == (1, 3, int(NOW) + VALIDITY)
    assert (await resolve(values, reader, KEY.public, "llama", now=NOW)).record == first
    second, _ = await publish(values, book, KEY, "llama", TWO, now=NOW)
    # Both records are kept by somebody.
    choice = await resolve(values, reader, KEY.public, "llama", now=NOW)
    assert (choice.record, choice.forked) == (second, False)
    assert [record.value for record in book.own(KEY.public)] == [TWO]
    assert book.own(OTHER.public) == []


@pytest.mark.trio
async def test_an_old_record_is_refused_where_the_new_one_was_seen(home: Path, tmp_path: Path) -> None:
    values, book = MemoryValues(), NameBook(tmp_path / "reader")
    await publish(values, NameBook(home), KEY, "llama", ONE, now=NOW)
    await publish(values, NameBook(home), KEY, "llama", TWO, now=NOW)
    await resolve(values, book, KEY.public, "llama", now=NOW)
    values.kept[name_key(KEY.public, "llama")].pop()
    with pytest.raises(BadNameRecord, match="old record"):
        await resolve(values, book, KEY.public, "llama", now=NOW)
    # Somebody who never saw the second can not know.
    assert (await resolve(values, NameBook(home), KEY.public, "llama", now=NOW)).record.value == ONE


@pytest.mark.trio
async def test_a_home_that_lost_its_book_goes_on_counting(home: Path) -> None:
    values = MemoryValues()
    for _ in range(3):
        await publish(values, NameBook(home), KEY, "llama", ONE, now=NOW)
    (home / "names.json").unlink()
    record, _ = await publish(values, NameBook(home), KEY, "llama", TWO, now=NOW)
    assert record.sequence == 4


@pytest.mark.trio
async def test_the_number_is_written_down_before_anybody_hears_of_it(home: Path) -> None:
    class Failing(MemoryValues):
        async def put_value(self, key: bytes, value: bytes) -> int:
            assert NameBook(home).own(KEY.public)[0].encode() == value
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await publish(Failing(), NameBook(home), KEY, "llama", ONE, now=NOW)
    record, _ = await publish(MemoryValues(), NameBook(home), KEY, "llama", TWO, now=NOW)
    assert record.sequence == 2


@pytest.mark.trio
async def test_a_fork_is_told_and_decided_alike(home: Path, tmp_path: Path) -> None:
    values = MemoryValues()
    forks = [sign(KEY, "llama", value, 5, int(NOW) + 1) for value in (ONE, TWO)]
    values.kept[name_key(KEY.public, "llama")] = [record.encode() for record in forks]
    one = await resolve(values, NameBook(home), KEY.public, "llama", now=NOW)
    values.kept[name_key(KEY.public, "llama")].reverse()
    other = await resolve(values, NameBook(tmp_path / "other"), KEY.public, "llama", now=NOW)
    assert one.forked and one == other


@pytest.mark.trio
async def test_what_peers_make_up_does_not_count(home: Path) -> None:
    values, key = MemoryValues(), name_key(KEY.public, "llama")
    values.kept[key] = [
        b"noise",
        sign(OTHER, "llama", ONE, 9, 1 << 40).encode(),
        sign(KEY, "x", ONE, 9, 1 << 40).encode(),
    ]
    with pytest.raises(NoProviders, match="nobody reachable keeps a record"):
        await resolve(values, NameBook(home), KEY.public, "llama", now=NOW)


@pytest.mark.parametrize("text", ["[]", '{"own": []}', '{"own": {"llama": "00"}}', '{"own": {"llama": "x"}}'])
def test_a_damaged_book_is_named(home: Path, text: str) -> None:
    home.mkdir()
    (home / "names.json").write_text(text)
    with pytest.raises(BadConfig, match=r"names\.json is damaged"):
        NameBook(home).own(KEY.public)


def test_a_withdrawn_name_is_published_no_more(home: Path) -> None:
    book = NameBook(home)
    book.sign_next(KEY, "llama", ONE, after=0, not_after=1)
    assert book.withdraw("llama")
    assert not book.withdraw("llama")
    assert book.own(KEY.public) == []


def test_a_renewal_never_undoes_what_was_published_meanwhile(home: Path) -> None:
    book = NameBook(home)
    first = book.sign_next(KEY, "llama", ONE, after=0, not_after=1)
    second = book.sign_next(KEY, "llama", TWO, after=0, not_after=2)
    assert book.renew(KEY, first, 3) == second
    renewed = book.renew(KEY, second, 3)
    assert (renewed.sequence, renewed.value, renewed.not_after) == (3, TWO, 3)
    assert book.own(KEY.public) == [renewed]


@dataclass
class Seed:
    """A publication under way, and what it told."""

    publication: Publication
    values: MemoryValues
    told: list[Published]
    started: float

    @classmethod
    def of(cls, home: Path) -> Seed:
        values, told, started = MemoryValues(), list[Published](), trio.current_time()
        clock = lambda: NOW + trio.current_time() - started  # noqa: E731
        return cls(Publication(values, NameBook(home), KEY, told.append, clock), values, told, started)


@pytest.mark.trio
async def test_a_seed_publishes_again_and_signs_anew_in_time(
    home: Path, autojump_clock: trio.testing.MockClock
) -> None:
    NameBook(home).sign_next(KEY, "llama", ONE, after=0, not_after=int(NOW) + VALIDITY)
    seed = Seed.of(home)
    seed.publication.look_every = 60
    with trio.move_on_after(VALIDITY - RENEW_BEFORE + INTERVAL + 600):
        await seed.publication.run()
    gaps = [later - earlier for earlier, later in zip(seed.values.puts, seed.values.puts[1:], strict=False)]
    assert gaps and all(INTERVAL <= gap <= INTERVAL + 60 for gap in gaps)
    assert {event.record.sequence for event in seed.told} == {1, 2}
    renewed = seed.told[-1].record
    assert renewed.value == ONE and renewed.not_after > NOW + VALIDITY
    assert record_untrusted(seed.values.kept[name_key(KEY.public, "llama")][-1]) == renewed


@pytest.mark.trio
async def test_a_seed_notices_what_is_published_beside_it(
    home: Path, autojump_clock: trio.testing.MockClock
) -> None:
    seed = Seed.of(home)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(seed.publication.run)
        await trio.sleep(10)
        assert not seed.told
        NameBook(home).sign_next(KEY, "llama", TWO, after=0, not_after=int(NOW) + VALIDITY)
        await trio.sleep(2)
        assert [event.record.value for event in seed.told] == [TWO]
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_a_seed_alone_tries_again_and_at_once_when_somebody_comes(
    home: Path, autojump_clock: trio.testing.MockClock
) -> None:
    NameBook(home).sign_next(KEY, "llama", ONE, after=0, not_after=int(NOW) + VALIDITY)
    seed = Seed.of(home)
    seed.values.copies = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(seed.publication.run)
        await trio.sleep(1000)
        assert 8 <= len(seed.told) <= 12
        seed.values.copies = 2
        seed.publication.hurry()
        await trio.sleep(2)
        assert seed.told[-1].copies == 2
        count = len(seed.told)
        seed.publication.hurry()
        await trio.sleep(600)
        assert len(seed.told) == count
        nursery.cancel_scope.cancel()

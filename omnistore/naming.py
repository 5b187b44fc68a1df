"""Names published and names resolved: what this home signs, remembers, and keeps in the DHT (spec/07-names).

`NameBook` is `names.json` in the home: our own records, each written down before anybody hears of it, and
the newest one seen of every other name. `publish` and `resolve` are one exchange with the DHT each;
`keep_published` is a seed's task. What a record is and which of several counts is `dht.names`'s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import trio

from omnistore.cid import CID
from omnistore.dht.names import Choice, NameRecord, name_key, record_untrusted, select, sign
from omnistore.documents import Document, read_document, update
from omnistore.errors import BadConfig, BadNameRecord, NoProviders, OmniError
from omnistore.keys import PrivateKey, PublicKey

logger = logging.getLogger(__name__)

FILE_NAME: Final = "names.json"
VALIDITY: Final = 30 * 86400
"""Seconds that a record is good for: a publisher's machine may be off for as long."""
RENEW_BEFORE: Final = 20 * 86400
"""Seconds before its end at which a seed signs a new one."""
INTERVAL: Final = 8 * 3600.0
"""Seconds between two publications of a record: nodes come and go, and forget it after a day or two."""
RETRY_FIRST: Final = 2.0
RETRY_MOST: Final = 900.0
"""Seconds between two tries when nobody keeps it: doubling from the first to the most."""
LOOK_EVERY: Final = 1.0
"""Seconds between looks whether another process of this home published something."""


class Values(Protocol):
    """The part of the DHT that keeps values (`omnistore.dht.service.DHTService`)."""

    async def put_value(self, key: bytes, value: bytes) -> int:
        """Leave a value; the number of peers that were seen to keep it."""
        ...

    async def get_values(self, key: bytes) -> Sequence[bytes]:
        """The different values that there are, of any peer."""
        ...


@dataclass(frozen=True, slots=True)
class NameBook:
    """The names that this home published, and the newest records it saw."""

    home: Path

    def own(self, publisher: PublicKey) -> list[NameRecord]:
        """What this identity published from here, by name. Raises `BadConfig`."""
        records = [self._record(text) for text in self._section(read_document(self.path), "own").values()]
        return sorted((r for r in records if r.publisher == publisher), key=lambda record: record.name)

    def sign_next(self, key: PrivateKey, name: str, value: CID, *, after: int, not_after: int) -> NameRecord:
        """A record with a number higher than `after` and any used here; written down already."""

        def choose(last: NameRecord | None) -> NameRecord:
            return sign(key, name, value, max(last.sequence if last else 0, after) + 1, not_after)

        return self._replace(key.public, name, choose)

    def renew(self, key: PrivateKey, record: NameRecord, not_after: int) -> NameRecord:
        """The same under the next number, written down already; what is there instead, if it was replaced."""

        def choose(last: NameRecord | None) -> NameRecord:
            if last is not None and last != record:
                return last
            return sign(key, record.name, record.value, record.sequence + 1, not_after)

        return self._replace(key.public, record.name, choose)

    def _replace(
        self, publisher: PublicKey, name: str, choose: Callable[[NameRecord | None], NameRecord]
    ) -> NameRecord:
        """Put what `choose` makes of our last record of a name in its place."""
        made: list[NameRecord] = []

        def change(document: Document) -> Document:
            own = self._section(document, "own")
            last = self._record(own[name]) if name in own else None
            made.append(choose(last if last is not None and last.publisher == publisher else None))
            return {**document, "own": {**own, name: made[0].encode().hex()}}

        update(self.path, change)
        return made[0]

    def withdraw(self, name: str) -> bool:
        """Publish a name no more; whether it was."""
        found: list[bool] = []

        def change(document: Document) -> Document:
            own = self._section(document, "own")
            found.append(name in own)
            return {**document, "own": {other: text for other, text in own.items() if other != name}}

        update(self.path, change)
        return found[0]

    def seen(self, publisher: PublicKey, name: str) -> NameRecord | None:
        """The newest record of a name that was ever resolved here."""
        text = self._section(read_document(self.path), "seen").get(_shown(publisher, name))
        return self._record(text) if text is not None else None

    def remember(self, record: NameRecord) -> None:
        """Note a record, unless a newer one is noted."""
        where = _shown(record.publisher, record.name)

        def change(document: Document) -> Document:
            seen = self._section(document, "seen")
            if where in seen and self._record(seen[where]).sequence > record.sequence:
                return document
            return {**document, "seen": {**seen, where: record.encode().hex()}}

        update(self.path, change)

    def stamp(self) -> float:
        """Changes whenever the book does."""
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return 0.0

    @property
    def path(self) -> Path:
        """The file."""
        return self.home / FILE_NAME

    def _section(self, document: Document, name: str) -> dict[str, str]:
        section = document.get(name, {})
        if not isinstance(section, dict) or not all(isinstance(text, str) for text in section.values()):
            raise self._damaged(f"its {name!r} is no table of records")
        return section

    def _record(self, text: str) -> NameRecord:
        try:
            return record_untrusted(bytes.fromhex(text))
        except (ValueError, BadNameRecord) as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, why: str) -> BadConfig:
        return BadConfig(f"{self.path} is damaged: {why}", remedy="Restore it from a backup, or remove it.")


async def publish(
    values: Values, book: NameBook, key: PrivateKey, name: str, value: CID, *, now: float
) -> tuple[NameRecord, int]:
    """Sign that `name` means `value` from now on and put it into the DHT; the copies confirmed.

    Looks there first: another home with the same identity, or this one before it lost its files, may
    have used higher numbers.
    """
    known = await _find(values, key.public, name)
    after = max((record.sequence for record in known), default=0)
    not_after = int(now) + VALIDITY
    signing = partial(book.sign_next, key, name, value, after=after, not_after=not_after)
    record = await trio.to_thread.run_sync(signing)
    return record, await values.put_value(name_key(record.publisher, name), record.encode())


async def resolve(values: Values, book: NameBook, publisher: PublicKey, name: str, *, now: float) -> Choice:
    """What a publisher's name means now, remembered. Raises `NoProviders` and `BadNameRecord`."""
    found = await _find(values, publisher, name)
    seen = book.seen(publisher, name)
    if not found:
        raise NoProviders(
            f"nobody reachable keeps a record of {_shown(publisher, name)}",
            remedy="Check the name, and that its publisher runs `omni seed`."
            + (f" When it was last resolved here, it named {seen.value}." if seen else ""),
        )
    choice = select(found, seen, now)
    book.remember(choice.record)
    return choice


async def _find(values: Values, publisher: PublicKey, name: str) -> list[NameRecord]:
    """Every record of that name that anybody keeps."""
    found = []
    for value in await values.get_values(name_key(publisher, name)):
        try:
            record = record_untrusted(value)
        except BadNameRecord as error:
            logger.info("ignoring a value under %s: %s", _shown(publisher, name), error)
            continue
        if (record.publisher, record.name) == (publisher, name):
            found.append(record)
    return found


def _shown(publisher: PublicKey, name: str) -> str:
    return f"{publisher.peer_id}/{name}"


@dataclass(frozen=True, slots=True)
class Published:
    """A name's record was put into the DHT."""

    record: NameRecord
    copies: int
    """Peers confirmed to keep it, this node not counted."""


@dataclass(slots=True)
class _Due:
    sequence: int
    at: float = float("-inf")
    failures: int = 0


@dataclass(slots=True)
class Publication:
    """A seed's own names, published again and again (spec/07-names §5)."""

    values: Values
    book: NameBook
    key: PrivateKey
    tell: Callable[[Published], None] = lambda event: None
    clock: Callable[[], float] = time.time
    """Unix seconds."""
    look_every: float = LOOK_EVERY
    _due: dict[str, _Due] = field(default_factory=dict)
    _stamp: float = -1.0

    def hurry(self) -> None:
        """A node that may keep records appeared: what nobody keeps is due now."""
        for due in self._due.values():
            if due.failures:
                due.at = float("-inf")

    async def run(self) -> None:
        """Publish what is due, and what other processes of this home add, for ever."""
        records: list[NameRecord] = []
        while True:
            stamp = self.book.stamp()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    records = self.book.own(self.key.public)
                except OmniError as error:
                    logger.warning("%s", error.diagnosis())
            for record in records:
                await self._publish_if_due(record)
            await trio.sleep(self.look_every)

    async def _publish_if_due(self, record: NameRecord) -> None:
        due = self._due.get(record.name)
        if due is None or due.sequence < record.sequence:
            due = self._due[record.name] = _Due(record.sequence)
        if trio.current_time() < due.at:
            return
        now = self.clock()
        if record.not_after - now < RENEW_BEFORE:
            # Once in ten days, a few milliseconds: not worth a thread.
            record = self.book.renew(self.key, record, int(now) + VALIDITY)
            due.sequence = record.sequence
        copies = await self.values.put_value(name_key(record.publisher, record.name), record.encode())
        if copies:
            due.failures = 0
            due.at = trio.current_time() + INTERVAL
        else:
            due.at = trio.current_time() + min(RETRY_MOST, RETRY_FIRST * 2 ** min(due.failures, 20))
            due.failures += 1
        self.tell(Published(record, copies))

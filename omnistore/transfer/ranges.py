"""Which byte ranges of which files hold the blocks asked of a web server (pure).

Every block of a model is a byte range of one of its files, so whoever serves the files serves the
blocks. Here: where blocks lie (`Whereabouts`), which asks make one request (`RangeQueue`), which URL
has which file, and what a server's answer to a range request may say. Sockets are `web`'s.
Implements spec/05-transfer, section "Web servers as sources".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import quote, urlsplit, urlunsplit

from omnistore.block import BLOCK_SIZE
from omnistore.chunker.layout import Placement
from omnistore.cid import CID
from omnistore.errors import BadConfig, RemoteProtocolError
from omnistore.manifest import FileEntry, HeaderPart, Part

RANGE_MOST: Final = 8 << 20
"""Bytes of one range request: the round trip before it costs 4 % at 100 MB/s and 3 ms."""
GAP_MOST: Final = 64 << 10
"""Bytes read and thrown away rather than making another request: alignment takes up to 31."""
RETRY_MOST: Final = 600.0
"""Seconds; a server that says a longer `Retry-After` is taken to have said this."""

_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_MEMBER: Final = re.compile(r"(.*)-[0-9]{5}-of-([0-9]{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Place:
    """One occurrence of a block."""

    file: int
    offset: int
    size: int


@dataclass(slots=True)
class Whereabouts:
    """What a fetch knows so far of where blocks lie."""

    files: Sequence[FileEntry] = ()
    links: dict[CID, tuple[CID, ...]] = field(default_factory=dict)
    """The blocks of each part, by the part's CID."""
    places: dict[CID, Place] = field(default_factory=dict)
    resolved: bool = False
    """Whether the place of every block is known; the headers' are known before."""

    def learn_part(self, ref: CID, part: Part) -> None:
        """Take in a part's node. A header lies at the start of its file; the rest follows from headers."""
        links = part.links()
        self.links[ref] = tuple(cid for cid, _ in links)
        if isinstance(part, HeaderPart):
            for number, cid in enumerate(part.blocks):
                size = min(BLOCK_SIZE, part.header_size - number * BLOCK_SIZE)
                self.places.setdefault(cid, Place(part.key.index, number * BLOCK_SIZE, size))

    def resolve(self, placements: Iterable[Placement]) -> None:
        """Take in the place of every block."""
        for placed in placements:
            self.places.setdefault(placed.cid, Place(placed.file, placed.offset, placed.size))
        self.resolved = True


@dataclass(frozen=True, slots=True)
class Range:
    """One request: bytes `first` to `last` of a file, and the asks that they answer, in file order."""

    file: int
    first: int
    last: int
    asks: tuple[tuple[int, Place], ...]


class RangeQueue:
    """The asks of one source that no request was made for yet."""

    def __init__(self) -> None:
        self._pending: dict[int, Place] = {}
        self.bytes = 0

    def add(self, ask: int, place: Place) -> None:
        """Queue an ask."""
        self._pending[ask] = place
        self.bytes += place.size

    def cancel(self, ask: int) -> bool:
        """Take an ask back; False when it is being answered already."""
        place = self._pending.pop(ask, None)
        self.bytes -= place.size if place else 0
        return place is not None

    def next(self, most: int) -> Range | None:
        """The oldest ask, with what lies beside it, up to `most` bytes; None when nothing is queued."""
        if not self._pending:
            return None
        oldest = next(iter(self._pending))
        file = self._pending[oldest].file
        near = sorted(
            (item for item in self._pending.items() if item[1].file == file), key=lambda item: item[1].offset
        )
        start = next(number for number, (ask, _) in enumerate(near) if ask == oldest)
        run = [near[start]]
        for item in near[start + 1 :]:
            if not _joins(run[-1][1], item[1]) or _end(item[1]) - run[0][1].offset > most:
                break
            run.append(item)
        for item in reversed(near[:start]):
            if not _joins(item[1], run[0][1]) or _end(run[-1][1]) - item[1].offset > most:
                break
            run.insert(0, item)
        for ask, _ in run:
            self.cancel(ask)
        return Range(file, run[0][1].offset, _end(run[-1][1]) - 1, tuple(run))


def _end(place: Place) -> int:
    return place.offset + place.size


def _joins(before: Place, after: Place) -> bool:
    """Two asks can share a request: one follows the other. The same bytes twice would be read once only."""
    return 0 <= after.offset - _end(before) <= GAP_MOST


# --- URLs -----------------------------------------------------------------------------------


def check_url(text: str) -> str:
    """A URL that a person gave. Raises `BadConfig`."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not text.isprintable() or " " in text:
        raise BadConfig(f"{text[:200]!r} is not an http:// or https:// URL", remedy="Give the whole address.")
    return text


def shown_url(url: str) -> str:
    """A URL for logs and reports: without password and query, either of which may be a secret."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def file_urls(url: str, names: Sequence[str]) -> tuple[str | None, ...]:
    """The URL of each file of a model, from that of one file or of the directory they are in.

    A member of a split set stands for its siblings, whatever the set is called there. Raises
    `BadConfig` when the URL can not be told to belong to any of several files.
    """
    parts = urlsplit(url)
    directory, _, last = parts.path.rpartition("/")

    def at(name: str) -> str:
        return urlunsplit(parts._replace(path=f"{directory}/{quote(name)}"))

    if not last:
        return tuple(at(name) for name in names)
    if len(names) == 1:
        return (url,)
    member = _MEMBER.fullmatch(last)
    if member and int(member[2]) == len(names):
        stem, count = member.groups()
        return tuple(
            urlunsplit(parts._replace(path=f"{directory}/{stem}-{number:05d}-of-{count}.gguf"))
            for number in range(1, len(names) + 1)
        )
    found = tuple(url if last in (name, quote(name)) else None for name in names)
    if not any(found):
        raise BadConfig(
            f"{shown_url(url)} is none of the model's {len(names)} files, such as {names[0]}",
            remedy="Give the URL of any member of the set, or of their directory with a slash at its end.",
        )
    return found


# --- answers --------------------------------------------------------------------------------


def check_answer_untrusted(status: int, headers: Mapping[str, str], wanted: Range, size: int) -> None:
    """Whether the body of an answer to a range request begins with `wanted`.

    `headers` have lower-case names; `size` is what the manifest says of the file. A whole file (200) will
    do when the range begins with it. Raises `RemoteProtocolError`.
    """
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise RemoteProtocolError(f"sends the file encoded ({encoding[:40]}) though it was asked not to")
    if status == 206:
        _check_range(headers.get("content-range", ""), wanted, size)
    elif status == 200:
        length = headers.get("content-length")
        if length is not None and length != str(size):
            raise RemoteProtocolError(f"has a file of {length[:20]} bytes, and the model's has {size}")
        if wanted.first:
            raise RemoteProtocolError("does not answer range requests")
    elif status == 416:
        there = headers.get("content-range", "").rpartition("/")[2][:20]
        said = f"has a file of {there} bytes" if there.isdecimal() else "says the file ends before that"
        raise RemoteProtocolError(
            f"{said}: no bytes {wanted.first} to {wanted.last} of the model's {size} (416)"
        )
    else:
        raise RemoteProtocolError(f"answered {status} to a range request")


def _check_range(text: str, wanted: Range, size: int) -> None:
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None:
        raise RemoteProtocolError(f"answered a range request without a usable Content-Range ({text[:60]!r})")
    first, last, total = match.groups()
    if total != "*" and int(total) != size:
        raise RemoteProtocolError(f"has a file of {total} bytes, and the model's has {size}")
    if (int(first), int(last)) != (wanted.first, wanted.last):
        raise RemoteProtocolError(
            f"sent bytes {first} to {last} when asked for {wanted.first} to {wanted.last}"
        )


def retry_after_untrusted(text: str | None, now: float, otherwise: float) -> float:
    """Seconds that a `Retry-After` asks for; `now` is the time of day in seconds since 1970."""
    if text is None:
        return otherwise
    if re.fullmatch(r"[0-9]{1,9}", text.strip()):
        return min(RETRY_MOST, float(text))
    try:
        return min(RETRY_MOST, max(0.0, parsedate_to_datetime(text).timestamp() - now))
    except (ValueError, TypeError, OverflowError):
        return otherwise

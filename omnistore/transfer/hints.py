"""Mirror hints: which web servers are said to have a model's files, and the messages that tell it (pure).

Whoever publishes a model may know where its files lie on the web. That is no part of what is signed: it
changes, and nobody has to believe it. A node tells it to peers that ask, over a protocol of one question
and one answer; it is a claim like any other, and what such a server sends is verified like everything else.
Which hints may be followed at all is decided here; sockets are `hinting`'s and `web`'s.
Implements spec/05-transfer, section "Mirror hints".
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlsplit, urlunsplit

from omnistore import dagcbor
from omnistore.cid import CID
from omnistore.errors import InputError, LocalProtocolError, RemoteProtocolError
from omnistore.transfer.messages import LENGTH_SIZE
from omnistore.transfer.ranges import file_urls

PROTOCOL: Final = "/omni/mirrors/1.0.0"


@dataclass(frozen=True, slots=True)
class HintLimits:
    """What both sides of version 1.0.0 know."""

    message: int = 64 << 10
    """Bytes of one message without its length."""
    urls: int = 64
    """Of one model: a split set of 30 files in two places. More files are named by their directory."""
    url: int = 512
    """Characters of one URL: a model hub's take 150."""


LIMITS: Final = HintLimits()
FOLLOWED: Final = 4
"""Servers that one fetch asks because peers named them: a liar can not send it round the world."""

_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
"""Addresses that stand for IPv4 ones behind a translator."""
_ON_PATH: Final = frozenset("!$&'()*+,-./:;=@_~%")
"""What a URL's path may have beside letters and digits (RFC 3986), percent signs included."""


@dataclass(frozen=True, slots=True)
class Hint:
    """A URL that peers named in the course of one fetch."""

    url: str
    peers: tuple[str, ...]
    """Who named it."""
    public: bool
    """Whether it may be followed without a person's asking for it."""
    followed: bool
    """Whether this fetch asked it."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """One web server's copy of a model."""

    url: str
    """Of the directory that all its files are in, or of the only one."""
    urls: tuple[str | None, ...]
    """Of each file, in the manifest's order; None where it lacks one."""


# --- URLs -----------------------------------------------------------------------------------


def fault_of(text: str) -> str | None:
    """What keeps a text from being a hint; None for one that is a URL which anybody may be told."""
    if not 0 < len(text) <= LIMITS.url:
        return f"is not a URL of at most {LIMITS.url} characters"
    if not text.isascii() or not text.isprintable():
        return "has other characters than ASCII, which are written %XX"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "is no URL"
    if parts.scheme not in ("http", "https") or not text.startswith(f"{parts.scheme}://"):
        return "is not an http:// or https:// URL"
    if not host or port == 0 or parts.netloc.endswith(":"):
        return "names no host"
    if "@" in parts.netloc:
        return "has a user or password, which would be told to everybody"
    if "?" in text or "#" in text:
        return "has a query or fragment, which may be a secret or mean nothing to others"
    if not parts.path.startswith("/"):
        return "has no path"
    if not all(letter.isalnum() or letter in _ON_PATH for letter in parts.path) or not _is_host(host):
        return "has a character that no URL has"
    return None


def _is_host(host: str) -> bool:
    return ":" in host or all(letter.isalnum() or letter in "-._" for letter in host)


def is_public(url: str) -> bool:
    """Whether a URL (one without a fault) may lead to the public network.

    A host of the public network has a dot in its name; what a name stands for is looked at when it is
    connected to (`web`), by `is_public_address`.
    """
    host = urlsplit(url).hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        labels = host.rstrip(".").split(".")
        return len(labels) > 1 and all(labels) and labels[-1] not in ("localhost", "local", "internal")
    return is_public_address(host)


def is_public_address(text: str) -> bool:
    """Whether an IP address is one of the public network, however it is wrapped."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address.teredo is not None:
            return False
        if inner is not None:
            return is_public_address(str(inner))
    return address.is_global and not address.is_multicast and not address.is_reserved


def check_hints(urls: Iterable[str], names: Sequence[str]) -> tuple[str, ...]:
    """The hints that a person gave for a model with files of these names, each once. Raises `InputError`."""
    found = tuple(dict.fromkeys(urls))
    if len(found) > LIMITS.urls:
        raise InputError(
            f"{len(found)} URLs; at most {LIMITS.urls} are kept for one model",
            remedy="Name the directory that the files are in, with a slash at its end.",
        )
    for url in found:
        fault = fault_of(url)
        if fault is not None:
            raise InputError(f"{url[:200]!r} {fault}")
        if not any(_urls_of(url, names)):
            raise InputError(
                f"{url} has the name of none of the model's {len(names)} files, such as {names[0]}",
                remedy="Give one URL for each file, or that of their directory with a slash at its end.",
            )
    return found


def mirrors_of(urls: Iterable[str], names: Sequence[str]) -> tuple[Mirror, ...]:
    """The servers that hints lead to; files of one directory are one server's.

    A hint whose URL has no file's name is left out.
    """
    found: dict[str, list[str | None]] = {}
    for url in urls:
        here = _urls_of(url, names)
        if any(here):
            known = found.setdefault(_directory(url) if len(names) > 1 else url, [None] * len(names))
            known[:] = [old or new for old, new in zip(known, here, strict=True)]
    return tuple(Mirror(where, tuple(known)) for where, known in found.items())


def _urls_of(url: str, names: Sequence[str]) -> tuple[str | None, ...]:
    """Which file's URL it is: a directory has all, a member of a set only itself, by its name."""
    last = urlsplit(url).path.rpartition("/")[2]
    if not last or len(names) == 1:
        return file_urls(url, names)
    return tuple(url if last in (name, quote(name)) else None for name in names)


def _directory(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rpartition("/")[0] + "/"))


# --- messages -------------------------------------------------------------------------------


def encode_question(model: CID) -> bytes:
    """Which mirrors of the model under this CID, a signed manifest's or a bare one's?"""
    return _framed({"which": {"model": model}})


def encode_answer(model: CID, urls: Sequence[str]) -> bytes:
    """These; none if nothing is known of the model or its mirrors."""
    return _framed({"mirrors": {"model": model, "urls": list(urls[: LIMITS.urls])}})


def _framed(message: dagcbor.Value) -> bytes:
    data = dagcbor.encode(message)
    if len(data) > LIMITS.message:
        raise LocalProtocolError(f"a message of {len(data)} bytes; at most {LIMITS.message} are allowed")
    return len(data).to_bytes(LENGTH_SIZE, "big") + data


def length_untrusted(data: bytes) -> int:
    """Bytes of the message behind these `LENGTH_SIZE` ones. Raises `RemoteProtocolError`."""
    length = int.from_bytes(data, "big")
    if not 0 < length <= LIMITS.message:
        raise RemoteProtocolError(f"a message of {length} bytes; 1 to {LIMITS.message} are allowed")
    return length


def decode_question_untrusted(body: bytes) -> CID:
    """The model that is asked about. Raises `RemoteProtocolError`."""
    return _link(_fields_untrusted(body, "which", {"model"}))


def decode_answer_untrusted(body: bytes, model: CID) -> tuple[str, ...]:
    """The URLs that a peer names for `model`, each without fault. Raises `RemoteProtocolError`."""
    fields = _fields_untrusted(body, "mirrors", {"model", "urls"})
    if _link(fields) != model:
        raise RemoteProtocolError("'mirrors' of another model than was asked about")
    urls = fields["urls"]
    if not isinstance(urls, list) or len(urls) > LIMITS.urls:
        raise RemoteProtocolError(f"'mirrors' without a list of at most {LIMITS.urls} URLs")
    for url in urls:
        fault = fault_of(url) if isinstance(url, str) else "is no text"
        if fault is not None:
            raise RemoteProtocolError(f"'mirrors' with {str(url)[:80]!r}, which {fault}")
    if len(set(urls)) != len(urls):
        raise RemoteProtocolError("'mirrors' with one URL twice")
    return tuple(urls)


def _fields_untrusted(body: bytes, name: str, fields: set[str]) -> Mapping[str, Any]:
    value = dagcbor.decode_untrusted(body, limit=LIMITS.message)
    if not isinstance(value, dict) or value.keys() != {name}:
        raise RemoteProtocolError(f"a message that is no {name!r}")
    found = value[name]
    if not isinstance(found, dict) or found.keys() != fields:
        raise RemoteProtocolError(f"a {name!r} message with other fields than its own")
    return found


def _link(fields: Mapping[str, Any]) -> CID:
    if not isinstance(fields["model"], CID):
        raise RemoteProtocolError("a model that is no link")
    return fields["model"]

"""Values in the DHT, and who may leave which (pure; spec/04-discovery §4).

A key is text, `/<namespace>/<rest>`; the rules of its namespace decide whether a value is one, at
the node that stores it as well as at the one that reads it, and which of two is better. Nothing is
kept for a namespace without rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol, TypeAlias

from omnistore.errors import OmniError, RemoteProtocolError

MAX_KEY: Final = 128
"""Bytes of a key; other implementations refuse longer ones."""
MAX_VALUE: Final = 4096
"""Bytes of a value: with 50,000 keys, what others leave with a node stays under 200 MiB."""


class ValueRules(Protocol):
    """What the values of one namespace must be."""

    def check_untrusted(self, key: bytes, value: bytes) -> None:
        """Refuse what is no value of `key`. Raises a class of `omnistore.errors`."""
        ...

    def rank(self, key: bytes, value: bytes) -> int:
        """Of two values that `check_untrusted` let pass the one with the higher rank is right."""
        ...


Namespaces: TypeAlias = Mapping[str, ValueRules]


def check_value_untrusted(namespaces: Namespaces, key: bytes, value: bytes) -> None:
    """Refuse a value that is none. Raises `RemoteProtocolError`."""
    if len(key) > MAX_KEY or len(value) > MAX_VALUE:
        raise RemoteProtocolError(f"a DHT value of {len(value)} bytes under a key of {len(key)} is too long")
    rules = _rules(namespaces, key)
    if rules is None:
        raise RemoteProtocolError(f"a DHT value under {key[:40]!r} belongs to no namespace we know")
    try:
        rules.check_untrusted(key, value)
    except OmniError as error:
        raise RemoteProtocolError(f"a DHT value under {key!r} is refused: {error.message}") from error


def best_index(namespaces: Namespaces, key: bytes, values: Sequence[bytes]) -> int:
    """Which of several checked values is right; the last of equals, so that one may be renewed."""
    rules = _rules(namespaces, key)
    if rules is None:
        raise RemoteProtocolError(f"a DHT value under {key[:40]!r} belongs to no namespace we know")
    # Bytes decide between different values of one rank, or each node would keep another.
    return max(range(len(values)), key=lambda index: (rules.rank(key, values[index]), values[index], index))


def sorted_values(namespaces: Namespaces, key: bytes, values: Iterable[bytes]) -> list[bytes]:
    """The different values among these that are any, the right one first; the rest is left out."""
    kept: set[bytes] = set()
    for value in values:
        try:
            check_value_untrusted(namespaces, key, value)
        except RemoteProtocolError:
            continue
        kept.add(value)
    rules = _rules(namespaces, key)
    if rules is None:
        return []
    return sorted(kept, key=lambda value: (rules.rank(key, value), value), reverse=True)


def _rules(namespaces: Namespaces, key: bytes) -> ValueRules | None:
    start, namespace, rest = [*key.split(b"/", 2), b"", b""][:3]
    if start or not rest:
        return None
    try:
        key.decode("utf-8")
        return namespaces.get(namespace.decode("ascii"))
    except UnicodeDecodeError:
        return None

"""What one contender was measured to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


class MissingError(Exception):
    """Not installed; says how to get it."""


@dataclass(frozen=True, slots=True)
class Row:
    """`seconds` from the first byte asked to the last verified, `wall` with the start of the programs; `rss`
    of the receiver in MB, in the biggest of its processes.
    """

    seconds: float
    wall: float
    rss: float
    settings: str
    identical: bool = True

    def found(self, size: int) -> dict[str, Any]:
        return {**asdict(self), "rate": size / self.seconds / 1e6}


def best(rounds: int, measure: Callable[[], Row]) -> Row:
    """The quickest of some rounds; a round that brought other bytes condemns them all."""
    rows = [measure() for _ in range(rounds)]
    return next((row for row in rows if not row.identical), min(rows, key=lambda row: row.seconds))


def program(name: str, package: str) -> str:
    """Where `name` is.

    Raises:
        MissingError: it is not in PATH nor in /usr/sbin.
    """
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if found is None:
        raise MissingError(f"{name} is not installed: apt-get install {package}")
    return found

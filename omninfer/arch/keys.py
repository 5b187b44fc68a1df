"""Typed and bounded look-ups among the metadata of one architecture, which a stranger wrote.

`MalformedGGUF` is for values that make no sense, `UnsupportedModel` for those that make sense but that
no engine here can run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from omnistore.errors import MalformedGGUF, UnsupportedModel

# Inclusive bounds. They are an order of magnitude above any published model: wide enough never to
# refuse a real one, tight enough that no product of two of them overflows or exhausts a machine by itself.
MAX_LAYERS: Final = 1024
MAX_WIDTH: Final = 1 << 17
MAX_HEADS: Final = 1024
MAX_HEAD_DIM: Final = 1024
MAX_FFN_WIDTH: Final = 1 << 20
MAX_EXPERTS: Final = 4096
MAX_VOCAB: Final = 1 << 22
MAX_CONTEXT: Final = 1 << 25
MAX_FACTOR: Final = 1e6
"""Of scales and caps: rope factors, soft caps."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys `<architecture>.…` of a file's metadata."""

    metadata: Mapping[str, object]
    architecture: str

    def name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def get(self, key: str) -> object:
        return self.metadata.get(self.name(key))

    def integer(self, key: str, low: int, high: int, *, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            value = default
        if value is None:
            raise MalformedGGUF(f"the metadata have no {self.name(key)}")
        if isinstance(value, Sequence) and not isinstance(value, str):
            raise UnsupportedModel(f"{self.name(key)} differs from layer to layer, which is not supported")
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise MalformedGGUF(f"{self.name(key)} is {shown(value)}, not an integer from {low} to {high}")
        return value

    def real(self, key: str, low: float, high: float, *, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            value = default
        if value is None:
            raise MalformedGGUF(f"the metadata have no {self.name(key)}")
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise MalformedGGUF(f"{self.name(key)} is {shown(value)}, not a number from {low} to {high}")
        return float(value)

    def flags(self, key: str, length: int) -> tuple[bool, ...] | None:
        """An array of `length` booleans (integers 0 and 1 count); None if the key is absent or no array."""
        value = self.get(key)
        if not isinstance(value, Sequence) or isinstance(value, str):
            return None
        if len(value) != length or any(flag not in (0, 1) for flag in value):
            raise MalformedGGUF(f"{self.name(key)} is not an array of {length} booleans")
        return tuple(bool(flag) for flag in value)

    def refuse_unless(self, key: str, neutral: tuple[object, ...]) -> None:
        """Refuse a key that changes the arithmetic, unless its value is one that does not."""
        value = self.get(key)
        if value is not None and value not in neutral:
            raise UnsupportedModel(f"{self.name(key)} = {shown(value)} is not supported")


def shown(value: object) -> str:
    """A stranger's value, short enough for a message."""
    if isinstance(value, int | float):
        return f"{value:.6g}" if isinstance(value, float) or abs(value) < 1 << 64 else "a huge integer"
    return f"{value[:40]!r}" if isinstance(value, str) else f"a {type(value).__name__}"

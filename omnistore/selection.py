"""Which parts of a model a person means by `--layers` (pure).

The language: a comma list of layer numbers (`3`), inclusive ranges (`0-15`), `embed`, `head`, or
`all`. Headers and shared tensors are always included: nothing runs without them.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from omnistore.errors import InputError
from omnistore.manifest import Manifest, PartKey

_RANGE: Final = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
_ALWAYS: Final = ("header", "shared")
_LANGUAGE: Final = "Give layers such as 0-15, single numbers, embed, head, or all, separated by commas."


def parse_parts(text: str, manifest: Manifest) -> frozenset[PartKey]:
    """The parts of `manifest` that `text` selects, with all headers and shared. Raises `InputError`."""
    there = [ref.key for ref in manifest.parts]
    chosen = {key for key in there if key.kind in _ALWAYS}
    for word in text.replace(" ", "").lower().split(","):
        if word == "all":
            chosen.update(there)
        elif word in ("embed", "head"):
            # A tied model has no head of its own: selecting it selects nothing, and that is no error.
            chosen.update(key for key in there if key.kind == word)
        else:
            chosen.update(_layers(word, text, manifest))
    return frozenset(chosen)


def _layers(word: str, text: str, manifest: Manifest) -> set[PartKey]:
    match = _RANGE.fullmatch(word)
    if match is None:
        raise InputError(f"{word!r} in {text!r} selects no part", remedy=_LANGUAGE)
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise InputError(f"{word!r} in {text!r} runs backwards", remedy=_LANGUAGE)
    if last >= manifest.layers:
        raise InputError(
            f"layer {last} was asked for, but {manifest.name} has {manifest.layers} layers",
            remedy=f"They are numbered 0 to {manifest.layers - 1}.",
        )
    return {key for key in (PartKey("layer", n) for n in range(first, last + 1)) if manifest.part(key)}


def describe_parts(parts: Collection[PartKey]) -> str:
    """The shortest text that selects `parts`; headers and shared are not mentioned."""
    numbers = sorted(key.index for key in parts if key.kind == "layer")
    words = ["embed"] if PartKey("embed") in parts else []
    while numbers:
        length = next((i for i, n in enumerate(numbers) if n != numbers[0] + i), len(numbers))
        first, last = numbers[0], numbers[length - 1]
        words.append(str(first) if first == last else f"{first}-{last}")
        numbers = numbers[length:]
    if PartKey("head") in parts:
        words.append("head")
    return ",".join(words)

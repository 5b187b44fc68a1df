"""Split sets: several GGUF files, `NAME-00001-of-0000N.gguf`, that are one model.

Names and header checks only, no file system: finding the members on disk is `chunker.cut`.
File names count from 1, the metadata key `split.no` counts from 0. Implements spec/02-layout,
section "Split sets".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from omnistore.chunker.gguf import GGUFHeader
from omnistore.errors import InputError
from omnistore.manifest import MAX_FILES

_MEMBER: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def split_names(stem: str, count: int) -> tuple[str, ...]:
    """The file names of a set of `count` members, in order; `stem` is what comes before `-00001-of-…`."""
    return tuple(f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))


def parse_split_name(name: str) -> tuple[str, int, int] | None:
    """(stem, number from 1, count) of a member's file name, or None for a file that stands alone."""
    match = _MEMBER.fullmatch(name)
    if match is None:
        return None
    number, count = int(match["number"]), int(match["count"])
    return (match["stem"], number, count) if 1 <= number <= count <= MAX_FILES else None


def stem_of(name: str) -> str:
    """A file name without `.gguf` and without its place in a split set."""
    parsed = parse_split_name(name)
    return parsed[0] if parsed else name.removesuffix(".gguf")


def check_split(names: Sequence[str], headers: Sequence[GGUFHeader]) -> None:
    """Raise InputError, naming the file, unless these files in this order are one whole model."""
    counts = [_split_key(name, header, "split.count", 1) for name, header in zip(names, headers, strict=True)]
    for number, (name, header) in enumerate(zip(names, headers, strict=True)):
        if counts[number] != len(headers):
            raise InputError(
                f"{name} says it is one of {counts[number]} files, but {len(headers)} were given",
                remedy="Give any one member of the set; the others are found beside it.",
            )
        position = _split_key(name, header, "split.no", 0)
        if position != number:
            raise InputError(f"{name} says it is file {position + 1} of its set, not {number + 1}")
    total = sum(len(header.tensors) for header in headers)
    for name, header in zip(names, headers, strict=True):
        claimed = _split_key(name, header, "split.tensors.count", total)
        if claimed != total:
            raise InputError(f"{name} says its set has {claimed} tensors, but its files hold {total}")
    owners: dict[str, str] = {}
    for name, header in zip(names, headers, strict=True):
        for tensor in header.tensors:
            other = owners.setdefault(tensor.name, name)
            if other != name:
                raise InputError(f"tensor {tensor.name!r} is in {other} and in {name}")


def _split_key(name: str, header: GGUFHeader, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{name}: {key} is {value!r}, not a count")
    # llama-gguf-split has written 0 for a file that stands alone.
    return 1 if key == "split.count" and value == 0 else value

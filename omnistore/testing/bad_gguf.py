"""Broken GGUF files, each named by its one fault: the hostile list of spec/vectors/gguf-bad.json."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from omnistore.chunker.gguf import LIMITS
from omnistore.errors import InputError, MalformedGGUF, UnsupportedGGUF
from omnistore.testing.tiny_gguf import RawValue, TinyGGUF, TinyTensor, Typed

_STRING, _ARRAY = 8, 9
_HUGE = (1 << 64) - 1
_ONE = TinyTensor("a")


@dataclass(frozen=True, slots=True)
class BadGGUF:
    """A file that must be refused."""

    fault: str
    data: bytes
    error: type[InputError] = MalformedGGUF
    says: str = ""
    """What the message must mention."""


def bad_ggufs() -> tuple[BadGGUF, ...]:
    """Every fault we know."""
    return (*_not_gguf(), *_bad_counts(), *_bad_strings(), *_bad_values(), *_bad_alignment(), *_bad_tensors())


def _not_gguf() -> Iterator[BadGGUF]:
    good = TinyGGUF([_ONE]).build()
    yield BadGGUF("empty", b"", says="truncated")
    yield BadGGUF("magic-cut-short", b"GG", says="truncated")
    yield BadGGUF("magic-only", b"GGUF", says="truncated")
    yield BadGGUF("magic-of-another-format", TinyGGUF(magic=b"tjgg").build(), says="not a GGUF file")
    yield BadGGUF("zip-file", b"PK\x03\x04" + bytes(60), says="not a GGUF file")
    for version in (0, 4, 0xFFFFFFFF):
        data = good[:4] + struct.pack("<I", version) + good[8:]
        yield BadGGUF(f"version-{version}", data, UnsupportedGGUF, "version")
    yield BadGGUF("version-1", TinyGGUF([_ONE], version=1).build(), UnsupportedGGUF, "version 1")
    for version in (1, 2, 3):
        data = TinyGGUF([_ONE], version=version, big_endian=True).build()
        yield BadGGUF(f"big-endian-version-{version}", data, UnsupportedGGUF, "big-endian")


def _bad_counts() -> Iterator[BadGGUF]:
    some = [_ONE]
    for name, count in (("one-too-many", 1), ("over-limit", LIMITS.tensors + 1), ("huge", _HUGE)):
        says = "truncated" if name == "one-too-many" else "tensors (limit"
        # Nothing after the tensor infos, so that the one too many can only run off the end.
        data = TinyGGUF(some if name != "one-too-many" else [], tensor_count=count).build()
        yield BadGGUF(f"tensor-count-{name}", data, says=says)
    pairs = {"a": 1, "b": 2}
    for name, count in (("one-too-many", 3), ("over-limit", LIMITS.metadata + 1), ("huge", _HUGE)):
        says = "truncated" if name == "one-too-many" else "metadata keys (limit"
        yield BadGGUF(f"metadata-count-{name}", TinyGGUF((), pairs, metadata_count=count).build(), says=says)
    yield BadGGUF("counts-cut-short", TinyGGUF().build()[:20], says="truncated")


def _bad_strings() -> Iterator[BadGGUF]:
    yield BadGGUF("key-not-utf8", TinyGGUF((), {b"a\xff": 1}).build(), says="UTF-8")
    yield BadGGUF("key-too-long", TinyGGUF((), {"k" * 65536: 1}).build(), says="65536")
    yield BadGGUF("key-twice", TinyGGUF((), [("same", 1), ("same", 2)]).build(), says="twice")
    head = TinyGGUF(metadata_count=1).build()
    yield BadGGUF("key-length-huge", head + struct.pack("<Q", _HUGE), says="metadata key 0")
    yield BadGGUF("key-length-beyond-the-end", head + struct.pack("<Q", 100) + b"short", says="truncated")
    yield BadGGUF("text-not-utf8", TinyGGUF((), {"a": b"\xc3("}).build(), says="UTF-8")
    for name, length in (("beyond-the-end", 1000), ("huge", _HUGE), ("of-63-bits", 1 << 63)):
        value = RawValue(_STRING, struct.pack("<Q", length))
        yield BadGGUF(f"text-length-{name}", TinyGGUF((), {"a": value}).build())
    tensor = TinyTensor(b"blk.0.\xff")
    yield BadGGUF("tensor-name-not-utf8", TinyGGUF([tensor]).build(), says="UTF-8")
    tensor = TinyTensor("t" * (LIMITS.name_bytes + 1))
    yield BadGGUF("tensor-name-too-long", TinyGGUF([tensor]).build(), says="name")
    twice = [TinyTensor("same"), TinyTensor("same")]
    yield BadGGUF("tensor-name-twice", TinyGGUF(twice).build(), says="same")


def _array(item_type: int, count: int, items: bytes = b"") -> RawValue:
    return RawValue(_ARRAY, struct.pack("<IQ", item_type, count) + items)


def _bad_values() -> Iterator[BadGGUF]:
    def one(fault: str, value: RawValue, says: str) -> BadGGUF:
        return BadGGUF(fault, TinyGGUF((), {"the.key": value}).build(), says=says)

    yield one("value-type-unknown", RawValue(13, bytes(8)), "unknown value type 13")
    yield one("value-missing", RawValue(10, bytes(3)), "truncated")
    yield one("bool-that-is-two", RawValue(7, b"\x02"), "not a bool")
    yield one("bool-array-with-a-three", _array(7, 3, b"\x00\x01\x03"), "bools")
    yield one("array-element-type-unknown", _array(99, 0), "unknown element type 99")
    yield one("array-count-beyond-the-end", _array(4, 100, bytes(396)), "claims 100")
    for item_type in (0, 4, _STRING, _ARRAY, 12):
        yield one(f"array-count-huge-of-type-{item_type}", _array(item_type, _HUGE, bytes(64)), "claims")
    overflow = _array(12, 1 << 61, bytes(64))
    yield one("array-whose-size-wraps-to-zero", overflow, "claims")
    for name, length in (("beyond-the-end", 64), ("of-63-bits", 1 << 63), ("huge", _HUGE)):
        items = struct.pack("<QQ", 0, length)
        yield one(f"array-text-length-{name}", _array(_STRING, 2, items), "truncated")
        yield one(f"array-text-length-{name}-not-last", _array(_STRING, 3, items + bytes(8)), "truncated")
    deep = b"".join(struct.pack("<IQ", _ARRAY, 1) for _ in range(LIMITS.nesting)) + struct.pack("<IQ", 4, 0)
    yield one("arrays-nested-too-deep", RawValue(_ARRAY, deep), "nests")
    deeper = b"".join(struct.pack("<IQ", _ARRAY, 1) for _ in range(5000))
    yield one("arrays-nested-5000-deep", RawValue(_ARRAY, deeper), "nests")
    many = struct.pack("<IQ", 4, 0) * LIMITS.arrays
    yield one("too-many-arrays", _array(_ARRAY, LIMITS.arrays, many), "metadata arrays")


def _bad_alignment() -> Iterator[BadGGUF]:
    some = [_ONE]
    for value in (0, 1, 4, 7, 48, 0xFFFFFFFF):
        data = TinyGGUF(some, {"general.alignment": value}).build()
        yield BadGGUF(f"alignment-{value}", data, says="general.alignment")
    negative = {"general.alignment": Typed("i32", -32)}
    yield BadGGUF("alignment-negative", TinyGGUF(some, negative).build(), says="general.alignment")
    yield BadGGUF(
        "alignment-text", TinyGGUF(some, {"general.alignment": "32"}).build(), says="general.alignment"
    )
    yield BadGGUF(
        "alignment-true", TinyGGUF(some, {"general.alignment": True}).build(), says="general.alignment"
    )
    vast = {"general.alignment": Typed("u32", 1 << 31)}
    yield BadGGUF("alignment-beyond-the-end", TinyGGUF(some, vast).build())


def _bad_tensors() -> Iterator[BadGGUF]:
    def one(fault: str, says: str, *tensors: TinyTensor, cut: int = 0) -> BadGGUF:
        data = TinyGGUF(tensors, pad_end=not cut).build()
        error = UnsupportedGGUF if says == "unknown type" else MalformedGGUF
        return BadGGUF(fault, data[: len(data) - cut], error, says)

    a, b = TinyTensor("a", shape=(64,)), TinyTensor("b", shape=(64,))
    for kind in (4, 31, 36, 255, 0xFFFFFFFF):
        yield one(f"tensor-type-{kind}", "unknown type", TinyTensor("a", kind, (32,)))
    yield one("tensor-of-5-dimensions", "5 dimensions", TinyTensor("a", shape=(1, 1, 1, 1, 1)))
    infos_only = TinyGGUF(tensor_count=1).build() + struct.pack("<Q", 1) + b"a"
    huge = infos_only + struct.pack("<I", 0xFFFFFFFF)
    yield BadGGUF("tensor-of-4-billion-dimensions", huge, says="dimensions")
    for fault, shape in (
        ("tensor-dimension-zero", (32, 0)),
        ("tensor-dimension-of-64-bits", (_HUGE,)),
        ("tensor-elements-wrap-to-zero", (1 << 32, 1 << 32)),
        ("tensor-elements-wrap-to-small", ((1 << 62) + 8, 4)),
    ):
        yield one(fault, "impossible shape", TinyTensor("a", shape=shape, data=bytes(32)))
    yield one("tensor-size-wraps", "truncated", TinyTensor("a", "F64", ((1 << 61) + 1,), bytes(64)))
    yield one("tensor-row-not-whole-blocks", "multiple", TinyTensor("a", "Q4_0", (33,), bytes(64)))
    yield one("tensor-scalar-of-a-block-type", "multiple", TinyTensor("a", "Q4_K", (), bytes(256)))
    yield one("tensor-offset-unaligned", "aligned", a, TinyTensor("b", shape=(64,), offset=257))
    yield one("tensor-offset-beyond-the-end", "truncated", a, TinyTensor("b", shape=(64,), offset=1 << 20))
    yield one("tensor-offset-of-64-bits", "truncated", a, TinyTensor("b", shape=(64,), offset=(1 << 64) - 32))
    yield one("tensor-data-cut-by-a-byte", "truncated", a, b, cut=1)
    yield one("tensors-at-one-place", "overlap", a, TinyTensor("b", shape=(64,), offset=0))
    yield one("tensors-overlapping", "overlap", a, TinyTensor("b", shape=(64,), offset=224))
    inside = TinyTensor("b", shape=(8,), offset=64)
    yield one("tensor-inside-another", "overlap", a, inside)
    far = TinyTensor("a", shape=(8,), offset=0)
    cut = TinyGGUF([far]).build()
    yield BadGGUF("tensor-info-cut-short", cut[:40], says="truncated")

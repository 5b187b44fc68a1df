"""The GGUF header reader: bytes in, a checked `GGUFHeader` out.

Reads versions 2 and 3, little-endian. It never looks at tensor data and does no I/O: the
caller maps or reads the file (`chunker.cut`) or joins the verified header blocks. Whatever it
returns has been checked against the limits below and against the size of the file: every
tensor lies inside the file, none overlaps another, every count is bounded.

The caller's buffer is only borrowed. The header's bytes are copied out once (they are bounded
by `Limits.header_bytes`), so a mapping can be closed while the metadata lives on; large string
arrays decode from that copy when an element is read. Implements spec/02-layout, section
"Reading a GGUF header".
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from mmap import mmap
from types import MappingProxyType
from typing import Final, TypeAlias, overload

from omnistore.chunker.ggml import GGML_TYPES, GGMLType, nbytes
from omnistore.errors import MalformedGGUF, UnsupportedGGUF


@dataclass(frozen=True, slots=True)
class Limits:
    """What a header may claim before it is refused."""

    header_bytes: int = 256 << 20
    """Up to the first tensor's data. The largest vocabularies in use take 20 MiB."""
    metadata: int = 1 << 16
    """Keys. Files in use have under a hundred."""
    tensors: int = 1 << 17
    """Per file. A 61-layer model with 384 separate experts per layer has 70 thousand."""
    name_bytes: int = 256
    """Of a tensor's name: a manifest's limit for a text; llama.cpp stops at 64."""
    key_bytes: int = (1 << 16) - 1
    """Of a metadata key; the GGUF specification's own limit."""
    nesting: int = 4
    """Arrays in arrays. Files in use have none."""
    arrays: int = 1 << 16
    """All arrays of a file, nested ones counted."""
    dimensions: int = 4
    """Of a tensor: ggml's own limit."""
    elements: int = (1 << 63) - 1
    """Of a tensor: ggml counts them in an int64."""


LIMITS: Final = Limits()

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS: Final[Mapping[int, struct.Struct]] = MappingProxyType(
    {
        code: struct.Struct("<" + letter)
        for code, letter in (
            (0, "B"),
            (1, "b"),
            (2, "H"),
            (3, "h"),
            (4, "I"),
            (5, "i"),
            (6, "f"),
            (_BOOL, "B"),
            (10, "Q"),
            (11, "q"),
            (12, "d"),
        )
    }
)


class StringArray(Sequence[str]):
    """A metadata array of strings, decoded when an element is read.

    Reading an element that is not UTF-8 raises MalformedGGUF; `raw` gives its bytes.
    """

    __slots__ = ("_data", "_end", "_key", "_starts")

    def __init__(self, key: str, data: bytes, starts: array[int], end: int) -> None:
        self._key = key
        self._data = data
        self._starts = starts
        self._end = end

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        try:
            return self.raw(index).decode()
        except UnicodeDecodeError:
            raise MalformedGGUF(f"element {index} of {self._key} is not UTF-8") from None

    def __iter__(self) -> Iterator[str]:
        data = self._data
        start = 0
        try:
            for i, start in enumerate(self._starts):
                end = self._starts[i + 1] if i + 1 < len(self._starts) else self._end
                yield data[start + 8 : end].decode()
        except UnicodeDecodeError:
            raise MalformedGGUF(f"an element of {self._key}, at byte {start}, is not UTF-8") from None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray):
            return len(self) == len(other) and self._region() == other._region()
        if isinstance(other, Sequence) and not isinstance(other, str):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # equal to lists and tuples, which hash otherwise

    def __repr__(self) -> str:
        return f"<StringArray {self._key}: {len(self)} strings>"

    def raw(self, index: int) -> bytes:
        """The bytes of one element, undecoded."""
        index = range(len(self._starts))[index]
        end = self._starts[index + 1] if index + 1 < len(self._starts) else self._end
        return self._data[self._starts[index] + 8 : end]

    def _region(self) -> bytes:
        return self._data[self._starts[0] : self._end] if self._starts else b""


NumberArray: TypeAlias = "memoryview[int] | memoryview[float] | memoryview[bool]"

Value: TypeAlias = "bool | int | float | str | StringArray | NumberArray | tuple[Value, ...]"
"""A metadata value. A numeric array is a read-only memoryview with the item format of its type
(`numpy.asarray` takes it as it is); an array of arrays is a tuple."""

HeaderBuffer: TypeAlias = bytes | bytearray | memoryview | mmap


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a GGUF file says about one tensor."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    """In GGUF order: `ne[0]`, the row length, first."""
    offset: int
    """Of its data, from the start of the file."""
    size: int
    """Of its data in bytes, padding not counted."""


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """A checked GGUF header."""

    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    """In the order of the file's tensor infos, which need not be the order of their data."""
    alignment: int
    metadata_size: int
    """Where the tensor infos end."""
    data_offset: int
    """What the tensor offsets in the file are relative to; may lie past the end of a file without tensors."""
    size: int
    """Of the header extent: up to the data of the first tensor, or to the end of a file without tensors."""

    def in_file_order(self) -> tuple[TensorInfo, ...]:
        """The tensors as their data follows in the file."""
        return tuple(sorted(self.tensors, key=lambda tensor: tensor.offset))


def read_header_untrusted(buf: HeaderBuffer, *, file_size: int, name: str) -> GGUFHeader:
    """Read the header at the start of `buf`, the file `name` or a prefix of it.

    Raises MalformedGGUF or UnsupportedGGUF and nothing else, whatever the bytes are. When `buf`
    is shorter than the header, the MalformedGGUF says that it is truncated.
    """
    with memoryview(buf) as whole, whole[: min(file_size, LIMITS.header_bytes)] as view:
        cursor = _Cursor(view, file_size, name)
        try:
            return _read(cursor)
        except (struct.error, OverflowError):
            # The one place where running off the end shows: reads are not checked one by one.
            raise cursor.truncated() from None


@dataclass(slots=True)
class _Deferred:
    """An array whose bytes are not copied out yet."""

    key: str
    item_type: int
    begin: int
    end: int
    starts: array[int] | None = None
    """For strings: where each one's length field is."""


_Pending: TypeAlias = "bool | int | float | str | _Deferred | tuple[_Pending, ...]"


class _Cursor:
    """A position in the borrowed buffer, never past its end.

    Reading a number beyond the end raises struct.error or OverflowError.
    """

    __slots__ = ("_file_size", "_name", "arrays", "pos", "view")

    def __init__(self, view: memoryview, file_size: int, name: str) -> None:
        self.view = view
        self.pos = 0
        self.arrays = 0
        self._file_size = file_size
        self._name = name

    @property
    def file_size(self) -> int:
        return self._file_size

    def malformed(self, fault: str) -> MalformedGGUF:
        # A fault may quote a key of 64 KiB.
        shown = fault if len(fault) <= 400 else fault[:400] + "…"
        return MalformedGGUF(f"{self._name}: {shown}", remedy="The file is damaged or is not a GGUF model.")

    def unsupported(self, what: str, remedy: str | None = None) -> UnsupportedGGUF:
        return UnsupportedGGUF(f"{self._name}: {what}", remedy=remedy)

    def truncated(self) -> MalformedGGUF:
        given = len(self.view)
        if given == LIMITS.header_bytes:
            return self.malformed(f"the header is larger than {LIMITS.header_bytes >> 20} MiB")
        where = f"the file ends at byte {given}" if given >= self._file_size else f"{given} bytes were given"
        return self.malformed(f"truncated: the header goes on where {where}")

    def number(self, kind: struct.Struct) -> int:
        value: int = kind.unpack_from(self.view, self.pos)[0]
        self.pos += kind.size
        return value

    def take(self, size: int) -> bytes:
        begin, end = self.pos, self.pos + size
        if end > len(self.view):
            raise self.truncated()
        self.pos = end
        return bytes(self.view[begin:end])

    def text(self, what: str, limit: int) -> str:
        size = self.number(_U64)
        if size > limit:
            raise self.malformed(f"{what} is {size} bytes long (limit {limit})")
        raw = self.take(size)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.malformed(f"{what} is not UTF-8: {raw[:40]!r}") from None


def _read(cursor: _Cursor) -> GGUFHeader:
    version = _read_version(cursor)
    tensor_count = cursor.number(_U64)
    metadata_count = cursor.number(_U64)
    if tensor_count > LIMITS.tensors:
        raise cursor.malformed(f"claims {tensor_count} tensors (limit {LIMITS.tensors})")
    if metadata_count > LIMITS.metadata:
        raise cursor.malformed(f"claims {metadata_count} metadata keys (limit {LIMITS.metadata})")
    pending = _read_metadata(cursor, metadata_count)
    alignment = _alignment(cursor, pending)
    infos = [_read_tensor_info(cursor) for _ in range(tensor_count)]
    metadata_size = cursor.pos
    data_offset = -(-metadata_size // alignment) * alignment
    tensors = tuple(_place(cursor, info, data_offset, alignment) for info in infos)
    size = _check_data(cursor, tensors)
    # From here on nothing refers to the caller's buffer any more.
    header = bytes(cursor.view[:metadata_size])
    metadata = {key: _bind(value, header) for key, value in pending.items()}
    return GGUFHeader(
        version=version,
        metadata=MappingProxyType(metadata),
        tensors=tensors,
        alignment=alignment,
        metadata_size=metadata_size,
        data_offset=data_offset,
        size=size,
    )


def _read_version(cursor: _Cursor) -> int:
    magic = cursor.take(min(4, len(cursor.view)))
    if magic != MAGIC:
        if MAGIC.startswith(magic):
            raise cursor.truncated()
        raise cursor.malformed(f"not a GGUF file: it begins with {magic!r}")
    version = cursor.number(_U32)
    if version in VERSIONS:
        return version
    swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
    if swapped in VERSIONS or swapped == 1:
        raise cursor.unsupported(
            f"a big-endian GGUF (version {swapped})", "Convert it to little-endian with gguf-convert-endian."
        )
    if version == 1:
        raise cursor.unsupported("GGUF version 1", "Convert the model again with a current llama.cpp.")
    raise cursor.unsupported(f"GGUF version {version}; versions 2 and 3 are read")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, _Pending]:
    found: dict[str, _Pending] = {}
    for number in range(count):
        key = cursor.text(f"metadata key {number}", LIMITS.key_bytes)
        if key in found:
            raise cursor.malformed(f"metadata key {key!r} appears twice")
        found[key] = _read_value(cursor, key, cursor.number(_U32), depth=0)
    return found


def _read_value(cursor: _Cursor, key: str, kind: int, depth: int) -> _Pending:
    if kind == _STRING:
        return cursor.text(f"the value of {key!r}", LIMITS.header_bytes)
    if kind == _ARRAY:
        return _read_array(cursor, key, depth + 1)
    scalar = _SCALARS.get(kind)
    if scalar is None:
        raise cursor.malformed(f"metadata key {key!r} has unknown value type {kind}")
    value = cursor.number(scalar)
    if kind == _BOOL:
        if value > 1:
            raise cursor.malformed(f"metadata key {key!r}: {value} is not a bool")
        return bool(value)
    return value


def _read_array(cursor: _Cursor, key: str, depth: int) -> _Pending:
    if depth > LIMITS.nesting:
        raise cursor.malformed(f"metadata key {key!r} nests arrays deeper than {LIMITS.nesting}")
    cursor.arrays += 1
    if cursor.arrays > LIMITS.arrays:
        raise cursor.malformed(f"more than {LIMITS.arrays} metadata arrays")
    item_type = cursor.number(_U32)
    count = cursor.number(_U64)
    scalar = _SCALARS.get(item_type)
    least = scalar.size if scalar else 8 if item_type == _STRING else 12
    if count * least > len(cursor.view) - cursor.pos:
        raise cursor.malformed(
            f"truncated: array {key!r} claims {count} elements, more than there are bytes left"
        )
    if item_type == _ARRAY:
        return tuple(_read_array(cursor, key, depth + 1) for _ in range(count))
    begin = cursor.pos
    if item_type == _STRING:
        starts = _skip_strings(cursor, count)
        return _Deferred(key, item_type, begin, cursor.pos, starts)
    if scalar is None:
        raise cursor.malformed(f"array {key!r} has unknown element type {item_type}")
    cursor.pos += count * scalar.size
    if item_type == _BOOL and bytes(cursor.view[begin : cursor.pos]).strip(b"\0\1"):
        raise cursor.malformed(f"array {key!r} holds something other than bools")
    return _Deferred(key, item_type, begin, cursor.pos)


def _skip_strings(cursor: _Cursor, count: int) -> array[int]:
    """Note where each string starts: the loop that a large vocabulary's reading time is made of."""
    view, pos, unpack = cursor.view, cursor.pos, _U64.unpack_from
    starts = array("Q")
    append = starts.append
    for _ in range(count):
        append(pos)
        pos += 8 + unpack(view, pos)[0]
    if pos > len(view):
        raise cursor.truncated()
    cursor.pos = pos
    return starts


def _bind(value: _Pending, header: bytes) -> Value:
    if isinstance(value, tuple):
        return tuple(_bind(item, header) for item in value)
    if not isinstance(value, _Deferred):
        return value
    if value.starts is not None:
        return StringArray(value.key, header, value.starts, value.end)
    letter = "?" if value.item_type == _BOOL else _SCALARS[value.item_type].format[1:]
    if letter == "?":
        return memoryview(header)[value.begin : value.end].cast("?")
    # An array of its own rather than a cast view: a view into the middle of the header is unaligned.
    items = array(letter)
    items.frombytes(header[value.begin : value.end])
    if sys.byteorder == "big":
        items.byteswap()
    return memoryview(items).toreadonly()


def _alignment(cursor: _Cursor, metadata: Mapping[str, _Pending]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or isinstance(value, bool) or value < 8 or value & (value - 1):
        raise cursor.malformed(f"general.alignment is {value!r}, not a power of two of at least 8")
    return value


@dataclass(frozen=True, slots=True)
class _RawInfo:
    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    """From the start of the tensor data."""


def _read_tensor_info(cursor: _Cursor) -> _RawInfo:
    name = cursor.text("a tensor's name", LIMITS.name_bytes)
    dimensions = cursor.number(_U32)
    if dimensions > LIMITS.dimensions:
        raise cursor.malformed(f"tensor {name!r} claims {dimensions} dimensions (limit {LIMITS.dimensions})")
    shape = tuple(cursor.number(_U64) for _ in range(dimensions))
    return _RawInfo(name, shape, cursor.number(_U32), cursor.number(_U64))


def _place(cursor: _Cursor, raw: _RawInfo, data_offset: int, alignment: int) -> TensorInfo:
    kind = GGML_TYPES.get(raw.type_id)
    if kind is None:
        raise cursor.unsupported(f"tensor {raw.name!r} has unknown type {raw.type_id}")
    if 0 in raw.shape or prod(raw.shape) > LIMITS.elements:
        raise cursor.malformed(f"tensor {raw.name!r} has impossible shape {raw.shape}")
    if raw.offset % alignment:
        raise cursor.malformed(f"tensor {raw.name!r} is at offset {raw.offset}, not aligned to {alignment}")
    try:
        size = nbytes(kind, raw.shape)
    except ValueError as error:
        raise cursor.malformed(f"tensor {raw.name!r}: {error}") from None
    offset = data_offset + raw.offset
    if offset + size > cursor.file_size:
        raise cursor.malformed(
            f"truncated: tensor {raw.name!r} ends at byte {offset + size} of a file of {cursor.file_size}"
        )
    return TensorInfo(raw.name, kind, raw.shape, offset, size)


def _check_data(cursor: _Cursor, tensors: tuple[TensorInfo, ...]) -> int:
    """The size of the header extent, once no two tensors share a name or a byte."""
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise cursor.malformed(f"two tensors are called {tensor.name!r}")
        names.add(tensor.name)
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.size > after.offset:
            raise cursor.malformed(f"tensors {before.name!r} and {after.name!r} overlap")
    size = ordered[0].offset if ordered else cursor.file_size
    if size > LIMITS.header_bytes:
        raise cursor.malformed(f"the header is larger than {LIMITS.header_bytes >> 20} MiB")
    return size

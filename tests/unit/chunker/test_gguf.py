from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from gguf import GGUFReader

from omnistore.chunker.gguf import LIMITS, GGUFHeader, StringArray, read_header_untrusted
from omnistore.errors import MalformedGGUF
from omnistore.testing.bad_gguf import BadGGUF, bad_ggufs
from omnistore.testing.tiny_gguf import (
    RawValue,
    TinyGGUF,
    TinyTensor,
    Typed,
    block_tensors,
    tiny_model,
)


def read(data: bytes) -> GGUFHeader:
    return read_header_untrusted(data, file_size=len(data), name="x.gguf")


@pytest.mark.parametrize("bad", bad_ggufs(), ids=lambda bad: bad.fault)
def test_a_bad_file_is_refused_for_its_fault(bad: BadGGUF) -> None:
    with pytest.raises(bad.error) as caught:
        read(bad.data)
    assert type(caught.value) is bad.error
    assert bad.says in caught.value.message
    assert caught.value.message.startswith("x.gguf: ")
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("version", [2, 3])
def test_every_kind_of_value_is_read(version: int) -> None:
    values = {
        "u8": Typed("u8", 255),
        "i8": Typed("i8", -128),
        "u16": Typed("u16", 65535),
        "i16": Typed("i16", -2),
        "u32": 7,
        "i32": -7,
        "u64": Typed("u64", (1 << 64) - 1),
        "i64": Typed("i64", -(1 << 63)),
        "f32": 0.5,
        "f64": Typed("f64", 0.1),
        "yes": True,
        "no": False,
        "text": "Zoë ▁",
        "empty": "",
    }
    header = read(TinyGGUF((), values, version=version).build())
    expected = {key: value.value if isinstance(value, Typed) else value for key, value in values.items()}
    assert dict(header.metadata) == expected
    assert header.metadata["yes"] is True
    assert header.version == version


def test_arrays_are_sequences() -> None:
    strings = ["", "a", "▁word", "b" * 300]
    header = read(
        TinyGGUF(
            (),
            {
                "strings": strings,
                "ints": Typed("i32", [-1, 0, 1 << 30]),
                "floats": Typed("f32", [0.5, -2.0]),
                "bools": Typed("bool", [True, False, True]),
                "none": Typed("u64", []),
                "nested": RawValue(
                    9, struct.pack("<IQ", 9, 2) + struct.pack("<IQII", 4, 2, 5, 6) + struct.pack("<IQ", 8, 0)
                ),
            },
        ).build()
    )
    found = header.metadata["strings"]
    assert isinstance(found, StringArray)
    assert found == strings
    assert list(found) == strings
    assert (found[-1], found[1:3], found.raw(2)) == (strings[-1], tuple(strings[1:3]), strings[2].encode())
    with pytest.raises(IndexError):
        found[4]
    for key, expected in (("ints", [-1, 0, 1 << 30]), ("floats", [0.5, -2.0]), ("none", [])):
        numbers = header.metadata[key]
        assert isinstance(numbers, memoryview)
        assert numbers.readonly
        assert numbers.tolist() == expected
    bools = header.metadata["bools"]
    assert isinstance(bools, memoryview)
    assert bools.tolist() == [True, False, True]
    nested = header.metadata["nested"]
    assert isinstance(nested, tuple)
    assert [list(item) for item in nested if isinstance(item, Sequence | memoryview)] == [[5, 6], []]


def test_a_string_that_is_not_utf8_is_found_when_it_is_read() -> None:
    strings = read(TinyGGUF((), {"tokens": [b"ok", b"\xff"]}).build()).metadata["tokens"]
    assert isinstance(strings, StringArray)
    assert strings[0] == "ok"
    assert strings.raw(1) == b"\xff"
    with pytest.raises(MalformedGGUF, match="element 1 of tokens"):
        strings[1]
    with pytest.raises(MalformedGGUF, match="tokens"):
        list(strings)


def test_places_of_tensors_are_absolute_and_shapes_as_in_the_file() -> None:
    tensors = [TinyTensor("a", "F16", (3, 5)), TinyTensor("b", "Q8_0", (64, 2)), TinyTensor("c", "F64", ())]
    data = TinyGGUF(tensors, data_order=[2, 0, 1], alignment=64).build()
    header = read(data)
    assert [(t.name, t.type.name, t.shape) for t in header.tensors] == [
        ("a", "F16", (3, 5)),
        ("b", "Q8_0", (64, 2)),
        ("c", "F64", ()),
    ]
    for tensor, written in zip(header.tensors, tensors, strict=True):
        assert data[tensor.offset : tensor.offset + tensor.size] == written.payload()
    assert [tensor.name for tensor in header.in_file_order()] == ["c", "a", "b"]
    assert header.alignment == 64
    assert header.size == header.data_offset == header.tensors[2].offset
    assert 0 <= header.data_offset - header.metadata_size < 64


def test_the_header_of_a_file_without_tensors_is_the_file() -> None:
    data = TinyGGUF((), {"a": "b"}, tail=b"more").build()
    header = read(data)
    assert (header.size, header.tensors, header.metadata_size) == (len(data), (), len(data) - 4)


def test_the_data_may_begin_after_a_gap() -> None:
    data = TinyGGUF([TinyTensor("a", gap=bytes(96))]).build()
    header = read(data)
    assert header.size == header.data_offset + 96


def test_every_prefix_of_a_header_is_truncated() -> None:
    data = TinyGGUF(block_tensors(1), {"tokens": ["a", "b"], "n": Typed("u16", [1, 2, 3])}).build()
    whole = read(data)
    for size in range(whole.metadata_size):
        with pytest.raises(MalformedGGUF, match="truncated"):
            read_header_untrusted(data[:size], file_size=len(data), name="x.gguf")
    prefix = read_header_untrusted(data[: whole.metadata_size], file_size=len(data), name="x.gguf")
    assert prefix.tensors == whole.tensors
    assert prefix.size == whole.size


def test_a_header_beyond_the_limit_is_refused() -> None:
    tensor = TinyTensor("a", offset=LIMITS.header_bytes)
    data = TinyGGUF([tensor]).build()
    with pytest.raises(MalformedGGUF, match="larger than 256 MiB"):
        read_header_untrusted(data, file_size=LIMITS.header_bytes * 2, name="x.gguf")


def test_a_mapping_can_be_closed_while_the_metadata_lives_on(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_model(1).build())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        header = read_header_untrusted(mapped, file_size=len(mapped), name=path.name)
    # Leaving the block closed the mapping: an exported buffer would have made that a BufferError.
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, StringArray)
    assert tokens[1] == "<s>"


def test_a_refused_mapping_can_be_closed(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_model(1).build()[:5000])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        try:
            read_header_untrusted(mapped, file_size=len(mapped), name=path.name)
        except MalformedGGUF as error:
            kept = error  # its traceback keeps the reader's frames
    assert "truncated" in kept.message


def test_a_large_vocabulary_is_read_quickly(shared: Path) -> None:
    data = (shared / "vocab" / "ggml-vocab-llama-bpe.gguf").read_bytes()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        header = read(data)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, StringArray)
    assert len(tokens) == 128256
    assert tokens[128000] == "<|begin_of_text|>"


FILES = (
    "models/stories260K-F32.gguf",
    "models/stories260K-Q4_0.gguf",
    "parity/llama-Q4_K_M.gguf",
    "parity/llama-Q6_K.gguf",
    "parity/qwen2_bias.gguf",
    "vocab/ggml-vocab-llama-spm.gguf",
)


@pytest.mark.parametrize("name", FILES)
def test_we_read_what_the_gguf_package_reads(shared: Path, name: str) -> None:
    path = shared / name
    header = read(path.read_bytes())
    reader = GGUFReader(path)
    assert [(t.name, t.type.name, t.shape, t.offset, t.size) for t in header.tensors] == [
        (t.name, t.tensor_type.name, tuple(int(n) for n in t.shape), t.data_offset, t.n_bytes)
        for t in reader.tensors
    ]
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    ours = {
        key: value.tolist()
        if isinstance(value, memoryview)
        else list(value)
        if isinstance(value, StringArray)
        else value
        for key, value in header.metadata.items()
    }
    assert ours == theirs

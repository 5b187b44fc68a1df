from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from omnistore.block import BLOCK_SIZE, Block
from omnistore.chunker.cut import CutResult, cut, model_files, open_header
from omnistore.chunker.layout import Placement, resolve_untrusted
from omnistore.errors import InputError, MalformedGGUF, SourceChanged, UnsupportedGGUF
from omnistore.manifest import PartKey, manifest_untrusted
from omnistore.testing.tiny_gguf import TinyGGUF, TinyTensor, block_tensors, split_set, tiny_gguf, tiny_model


def write(directory: Path, data: bytes, name: str = "m.gguf") -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_bytes(data)
    return path


def cut_bytes(directory: Path, data: bytes, name: str = "m.gguf") -> CutResult:
    return cut([write(directory, data, name)])


def part_cids(result: CutResult) -> dict[str, str]:
    return {str(ref.key): str(ref.cid) for ref in result.manifest.parts}


def test_a_manifest_describes_the_model(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": "llama",
        "general.file_type": 7,
        "general.license": "apache-2.0",
        "general.size_label": "1B",
        "general.description": "d" * 4097,
        "llama.context_length": 4096,
        "llama.block_count": 2,
    }
    path = write(tmp_path, TinyGGUF(block_tensors(2), metadata).build(), "Tiny-1B-Q8_0.gguf")
    result = cut([path])
    manifest = result.manifest
    assert (manifest.name, manifest.architecture, manifest.quantisation) == ("Tiny-1B-Q8_0", "llama", "Q8_0")
    assert manifest.layers == 2
    assert manifest.facts == {
        "context_length": 4096,
        "license": "apache-2.0",
        "parameters": 32 * (8 + 2 * (8 + 8 + 1) + 1 + 8 + 1),
        "size_label": "1B",
    }
    assert [(f.name, f.size, f.sha256) for f in manifest.files] == [(path.name, path.stat().st_size, None)]
    assert [str(ref.key) for ref in manifest.parts] == [
        "header.0", "shared", "embed", "layer.0", "layer.1", "head",
    ]  # fmt: skip
    assert manifest_untrusted(result.node) == manifest
    assert [source.path for source in result.sources] == [path]


def test_the_sink_gets_every_block_in_file_order(tmp_path: Path) -> None:
    tensors = [TinyTensor(f"blk.{n}.w", "I8", (BLOCK_SIZE // 2 * 3,)) for n in range(40)]
    data = TinyGGUF(tensors).build()
    batches: list[Sequence[Placement]] = []
    counts: list[int] = []
    result = cut([write(tmp_path, data)], sink=batches.append, progress=counts.append)
    placements = [placement for batch in batches for placement in batch]
    assert len(batches) > 1
    assert sum(counts) == result.layout.size == sum(p.size for p in placements)
    for placement in placements:
        assert Block.raw(data[placement.offset : placement.offset + placement.size]).cid == placement.cid
    parts = {part.key: part for part, _ in result.parts}
    assert tuple(placements) == resolve_untrusted(result.manifest, parts, result.headers)


def test_the_same_file_gives_the_same_cids_and_its_name_matters_only_to_the_manifest(tmp_path: Path) -> None:
    data = tiny_model().build()
    first = cut_bytes(tmp_path / "a", data)
    again = cut_bytes(tmp_path / "b", data)
    renamed = cut_bytes(tmp_path / "c", data, "other.gguf")
    assert first.node.cid == again.node.cid
    assert first.node.cid != renamed.node.cid
    assert part_cids(first) == part_cids(renamed)


def test_a_changed_chat_template_shares_every_part_but_the_header(tmp_path: Path) -> None:
    tensors = block_tensors(3)
    old = part_cids(
        cut_bytes(tmp_path / "a", tiny_gguf(tensors, metadata={"tokenizer.chat_template": "old"}))
    )
    new = part_cids(
        cut_bytes(
            tmp_path / "b", tiny_gguf(tensors, metadata={"tokenizer.chat_template": "new, and longer" * 9})
        )
    )
    assert {key for key in old if old[key] != new[key]} == {"header.0"}


def test_a_changed_tensor_shares_every_other_part(tmp_path: Path) -> None:
    tensors = block_tensors(3)
    changed = [
        TinyTensor(t.name, t.type, t.shape, b"\x01" * 1024) if t.name == "blk.1.attn_q.weight" else t
        for t in tensors
    ]
    old = part_cids(cut_bytes(tmp_path / "a", tiny_gguf(tensors)))
    new = part_cids(cut_bytes(tmp_path / "b", tiny_gguf(changed)))
    assert {key for key in old if old[key] != new[key]} == {"layer.1"}


def test_order_alignment_padding_and_splitting_keep_every_tensor_part(tmp_path: Path) -> None:
    tensors = block_tensors(3)
    plain = part_cids(cut_bytes(tmp_path / "a", tiny_gguf(tensors)))
    variants = {
        "order": tiny_gguf(tensors[::-1], data_order=[3, 1, 4, 0, 5, 9, 2, 6, 8, 7, 10, 11, 12]),
        "alignment": tiny_gguf(tensors, alignment=4096),
        "padding": tiny_gguf(tensors, fill=0xAB, tail=b"x" * 99),
        "version": tiny_gguf(tensors, version=2),
    }
    for name, data in variants.items():
        found = part_cids(cut_bytes(tmp_path / name, data))
        assert {key for key in plain if plain[key] != found[key]} == {"header.0"}, name
    for name, data in split_set(TinyGGUF(tensors), "m", [5, 6]).items():
        member = write(tmp_path / "split", data, name)
    split = part_cids(cut(model_files(member)))
    assert {key for key in plain if plain[key] != split[key]} == {"header.0"}
    assert split.keys() - plain.keys() == {"header.1", "header.2"}


def test_name_sha256_and_base_are_the_publishers_choice(tmp_path: Path) -> None:
    path = write(tmp_path, tiny_model(1).build())
    first = cut([path])
    second = cut([path], name="A better name", sha256=True, base=first.node.cid)
    assert second.manifest.name == "A better name"
    assert second.manifest.files[0].sha256 == hashlib.sha256(path.read_bytes()).digest()
    assert second.manifest.base == first.node.cid
    assert part_cids(first) == part_cids(second)


def test_a_split_set_is_named_without_its_number(tmp_path: Path) -> None:
    for name, data in split_set(TinyGGUF(block_tensors(1)), "big-model", [2]).items():
        write(tmp_path, data, name)
    assert cut(model_files(tmp_path / "big-model-00002-of-00002.gguf")).manifest.name == "big-model"


def test_files_without_tensors_and_with_scalars_are_cut(tmp_path: Path) -> None:
    assert part_cids(cut_bytes(tmp_path / "a", tiny_gguf(metadata={"a": "b"}))).keys() == {"header.0"}
    scalar = cut_bytes(tmp_path / "b", tiny_gguf([TinyTensor("x", shape=())]))
    assert part_cids(scalar).keys() == {"header.0", "shared"}


def test_zero_padding_is_not_stored_and_other_padding_is(tmp_path: Path) -> None:
    tensors = [TinyTensor("a", shape=(3,)), TinyTensor("b", shape=(3,))]
    zero = cut_bytes(tmp_path / "a", tiny_gguf(tensors, tail=bytes(3 * BLOCK_SIZE)))
    other = cut_bytes(tmp_path / "b", tiny_gguf(tensors, tail=bytes(3 * BLOCK_SIZE) + b"\x01"))
    assert zero.layout.size == zero.headers[0].size + 24
    assert other.layout.size == other.headers[0].size + 24 + 20 + 3 * BLOCK_SIZE + 1
    assert part_cids(zero)["shared"] == part_cids(other)["shared"]


def test_a_header_beyond_the_first_read_is_found(tmp_path: Path) -> None:
    tokens = [f"token {n}" * 10 for n in range(30_000)]
    path = write(tmp_path, tiny_gguf(block_tensors(1), metadata={"tokenizer.ggml.tokens": tokens}))
    header = open_header(path)
    assert header.size > 2 * BLOCK_SIZE
    assert header.metadata["tokenizer.ggml.tokens"] == tokens
    assert cut([path]).manifest.part(PartKey("header")) is not None


# --- what can go wrong -------------------------------------------------------------------------


def test_a_file_that_is_rewritten_meanwhile_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, tiny_model(1).build())

    def rewrite(_: Sequence[Placement]) -> None:
        os.utime(path, ns=(1, 1))

    with pytest.raises(SourceChanged, match=r"m\.gguf changed while it was being read"):
        cut([path], sink=rewrite)


def test_a_file_that_is_replaced_meanwhile_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, tiny_model(1).build())
    with pytest.raises(SourceChanged, match=r"m\.gguf changed"):
        cut([path], sink=lambda _: path.unlink(missing_ok=True))


def test_a_file_that_is_truncated_meanwhile_is_refused(tmp_path: Path) -> None:
    tensors = [TinyTensor(f"blk.{n}.w", "I8", (BLOCK_SIZE,), b"w" * BLOCK_SIZE) for n in range(100)]
    path = write(tmp_path, tiny_gguf(tensors))
    with pytest.raises(SourceChanged, match=r"m\.gguf changed"):
        cut([path], sink=lambda _: os.truncate(path, 4096))


def test_a_file_shorter_than_it_was_when_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, tiny_model(1).build())
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(SourceChanged, match=r"m\.gguf changed"):
        open_header(path)


def test_a_caller_can_end_the_cut(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(_: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        cut([write(tmp_path, tiny_model(1).build())], progress=stop)


def test_whoever_takes_the_bytes_can_end_the_cut(tmp_path: Path) -> None:
    class Full(Exception):
        pass

    taken: list[int] = []

    def take(_: int, data: memoryview, offset: int) -> None:
        taken.append(offset)
        if len(taken) >= 10:
            raise Full

    tensors = [TinyTensor(f"blk.{n}.w", "I8", (BLOCK_SIZE,), b"w" * BLOCK_SIZE) for n in range(64)]
    with pytest.raises(Full):
        cut([write(tmp_path, tiny_gguf(tensors))], take=take)
    assert len(taken) < 20, "the other thread goes on for no more than a block"


def test_unreadable_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.gguf: No such file"):
        cut([tmp_path / "none.gguf"])
    with pytest.raises(InputError, match="not a regular file"):
        cut([tmp_path])
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(InputError, match=r"pipe\.gguf: not a regular file"):
        cut([tmp_path / "pipe.gguf"])
    with pytest.raises(MalformedGGUF, match=r"empty\.gguf: truncated"):
        cut([write(tmp_path, b"", "empty.gguf")])
    with pytest.raises(MalformedGGUF, match=r"text\.gguf: not a GGUF file"):
        cut([write(tmp_path, b"hello" * 1000, "text.gguf")])


@pytest.mark.parametrize("name", ["a\nb.gguf", b"\xff.gguf".decode("utf-8", "surrogateescape"), "n" * 201])
def test_a_file_name_that_no_manifest_can_carry_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, tiny_model(1).build(), name)
    with pytest.raises(InputError, match="file name can not be published"):
        cut([path])


@pytest.mark.parametrize("name", ["", "n" * 257, "\ud800"])
def test_a_model_name_that_no_manifest_can_carry_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, tiny_model(1).build())
    with pytest.raises(InputError, match="a model's name"):
        cut([path], name=name)


def test_a_part_too_large_for_one_node_is_refused(tmp_path: Path) -> None:
    tensors = [TinyTensor(f"{n:06}-{'x' * 240}", "I8", (1,), b"\x01") for n in range(7000)]
    path = write(tmp_path, tiny_gguf(tensors, alignment=8))
    with pytest.raises(UnsupportedGGUF, match=r"m\.gguf: this model can not be published: part shared"):
        cut([path])

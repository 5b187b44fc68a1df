from __future__ import annotations

from pathlib import Path

import pytest

from omnistore.chunker.cut import model_files, open_header
from omnistore.chunker.gguf import read_header_untrusted
from omnistore.chunker.split import check_split, parse_split_name, split_names, stem_of
from omnistore.errors import InputError
from omnistore.testing.tiny_gguf import TinyGGUF, Typed, block_tensors, split_set


def three(**metadata: int) -> dict[str, bytes]:
    return split_set(TinyGGUF(block_tensors(2), metadata), "m", [3, 6])


def check(files: dict[str, bytes]) -> None:
    headers = [read_header_untrusted(data, file_size=len(data), name=name) for name, data in files.items()]
    check_split(list(files), headers)


def test_names_go_both_ways() -> None:
    names = split_names("a-00001-of-b", 3)
    assert names[1] == "a-00001-of-b-00002-of-00003.gguf"
    assert [parse_split_name(name) for name in names] == [("a-00001-of-b", n, 3) for n in (1, 2, 3)]
    assert stem_of(names[0]) == "a-00001-of-b"
    assert stem_of("alone.gguf") == "alone"


@pytest.mark.parametrize(
    "name",
    [
        "m.gguf",
        "m-00000-of-00002.gguf",
        "m-00003-of-00002.gguf",
        "m-1-of-2.gguf",
        "m-00001-of-99999.gguf",
        "m-00001-of-00002.bin",
    ],
)
def test_other_names_stand_alone(name: str) -> None:
    assert parse_split_name(name) is None


def test_a_set_is_found_from_any_member(tmp_path: Path) -> None:
    for name, data in three().items():
        (tmp_path / name).write_bytes(data)
    expected = [tmp_path / name for name in split_names("m", 3)]
    for member in expected:
        assert model_files(member) == expected
    assert open_header(expected[2]).metadata["split.no"] == 2


def test_a_missing_member_is_named(tmp_path: Path) -> None:
    for name, data in three().items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(InputError, match=r"m-00002-of-00003\.gguf: no such file, which belongs to the same"):
        model_files(tmp_path / "m-00003-of-00003.gguf")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"alone\.gguf: no such file"):
        model_files(tmp_path / "alone.gguf")


def test_a_whole_set_passes() -> None:
    check(three())
    check({"m.gguf": TinyGGUF(block_tensors(1)).build()})
    check({"m.gguf": TinyGGUF(block_tensors(1), {"split.count": Typed("u16", 0)}).build()})


def test_files_out_of_order_are_refused() -> None:
    files = three()
    a, b, c = files
    with pytest.raises(InputError, match=r"m-00002-of-00003\.gguf says it is file 2 of its set, not 1"):
        check({b: files[b], a: files[a], c: files[c]})


def test_too_few_files_are_refused() -> None:
    files = three()
    with pytest.raises(InputError, match="one of 3 files, but 1 were given"):
        check({"m-00001-of-00003.gguf": files["m-00001-of-00003.gguf"]})


def test_a_member_of_another_set_is_refused() -> None:
    files = three()
    other = split_set(TinyGGUF(block_tensors(3)), "m", [3, 6])
    with pytest.raises(InputError, match=r"m-00001-of-00003\.gguf says its set has 10 tensors"):
        check(files | {"m-00003-of-00003.gguf": other["m-00003-of-00003.gguf"]})


def test_a_tensor_in_two_files_is_refused() -> None:
    tensors = block_tensors(1)
    model = TinyGGUF([*tensors, tensors[0]])
    with pytest.raises(InputError, match=r"'token_embd.weight' is in m-00001-of-00002\.gguf and in m-00002"):
        check(split_set(model, "m", [3]))


def test_a_count_that_is_no_count_is_refused() -> None:
    with pytest.raises(InputError, match=r"m\.gguf: split\.no is -1"):
        check({"m.gguf": TinyGGUF((), {"split.no": -1}).build()})

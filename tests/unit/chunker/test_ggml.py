from __future__ import annotations

import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from omnistore.chunker.ggml import GGML_TYPES, by_name, file_type_name, nbytes

# The gguf package keeps the float fields that block_q8_1 had before ggml made them halves (36 bytes).
STALE_IN_GGUF_PACKAGE = {"Q8_1"}


def test_the_table_agrees_with_the_gguf_package() -> None:
    theirs = {
        kind.name: (int(kind), *GGML_QUANT_SIZES[kind])
        for kind in GGMLQuantizationType
        if kind.name not in STALE_IN_GGUF_PACKAGE
    }
    ours = {t.name: (t.id, t.block_size, t.type_size) for t in GGML_TYPES.values()}
    missing = theirs.keys() - ours.keys()
    assert not missing, f"the gguf package knows types that we lack: {missing}"
    assert {name: ours[name] for name in theirs} == theirs


def test_file_types_agree_with_the_gguf_package() -> None:
    for kind in LlamaFileType:
        if kind is not LlamaFileType.GUESSED:
            assert file_type_name(int(kind)) == kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")


def test_a_guessed_file_type_has_the_same_name() -> None:
    assert file_type_name(1024 + 15) == file_type_name(15) == "Q4_K_M"
    assert file_type_name(4711) is None


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("F32", (3,), 12),
        ("F16", (), 2),
        ("Q4_0", (64, 3), 2 * 18 * 3),
        ("Q4_K", (4096, 4096), 4096 * 16 * 144),
        ("MXFP4", (32, 2, 5), 170),
    ],
)
def test_nbytes(name: str, shape: tuple[int, ...], size: int) -> None:
    assert nbytes(by_name(name), shape) == size


def test_nbytes_refuses_a_row_that_is_not_whole_blocks() -> None:
    with pytest.raises(ValueError, match="not a multiple of Q8_0's 32"):
        nbytes(by_name("Q8_0"), (48, 2))

"""Quantised blocks come apart into exactly the weights that ggml's reference says they hold."""

from __future__ import annotations

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from omninfer.engines.checks import PackedTensor
from omninfer.engines.fields import Room
from omninfer.engines.mlx_weights import HalvedQuantMatrix, Matrix, QuantMatrix, load_matrix
from omninfer.engines.packing import FORMS, LATTICES, PLAIN, QUANTISED, SUPPORTED, decode, unpack
from omninfer.testing.noise import NoiseSource
from omnistore.chunker.ggml import GGMLType, by_name

QUANTISERS = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Types for which the gguf package has a quantiser, not only a dequantiser."""


HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
    "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip
"""Where the halfs of a block lie."""


UNEVEN = ("IQ4_NL", "IQ4_XS", "MXFP4")


def random_blocks(kind: str, rows: int = 32, blocks: int = 3) -> np.ndarray:
    """Every bit at random; not-a-numbers in the halfs are made finite."""
    data = np.random.default_rng(7).integers(0, 256, (rows, blocks * by_name(kind).type_size), dtype=np.uint8)
    if kind in PLAIN:
        return np.random.default_rng(7).standard_normal((rows, 96)).astype("<f4").view(np.uint8)
    whole = data.reshape(rows, blocks, -1)
    for field in HALVES.get(kind, ()):
        whole[..., field + 1] &= 0xBF
    if kind == "MXFP4":
        whole[..., 0] &= 0x7F
    if kind == "IQ1_M":  # its one half lies in the top bits of four words
        whole[..., 55] &= 0xBF
    return data


def reference(kind: str, packed: np.ndarray) -> np.ndarray:
    return dequantize(packed, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", QUANTISED + LATTICES)
def test_random_blocks_decode_to_the_same_bits(kind: str) -> None:
    packed = random_blocks(kind)
    ours, theirs = decode(kind, packed), reference(kind, packed)
    assert np.isfinite(theirs).all()
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("kind", QUANTISERS)
def test_quantised_numbers_decode_to_the_same_bits(kind: str) -> None:
    numbers = np.random.default_rng(3).standard_normal((16, 256)).astype(np.float32)
    packed = quantize(numbers, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    assert np.array_equal(decode(kind, packed), reference(kind, packed))
    assert np.abs(decode(kind, packed) - numbers).max() < 0.6


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_a_room_is_used_again_and_need_not_be_large_enough(kind: str, size: int) -> None:
    packed, room = random_blocks(kind), Room(size)
    other = np.ascontiguousarray(packed[::-1])
    for rows in (packed, other, packed):
        room.clear()
        assert decode(kind, rows, room).tobytes() == decode(kind, rows).tobytes()


@pytest.mark.parametrize("kind", QUANTISED)
def test_forms_are_known_before_the_data(kind: str) -> None:
    groups = unpack(kind, random_blocks(kind))
    assert (groups.bits, groups.group) == FORMS[kind]
    # Uneven steps leave codes unused: 241 is the last for IQ4 and 24 for MXFP4.
    assert groups.codes.max() == {8: 241, 5: 24}.get(groups.bits if kind in UNEVEN else 0, 2**groups.bits - 1)


class OneTensor(NoiseSource):
    """A source of a single tensor with given bytes."""

    def __init__(self, kind: str, packed: np.ndarray) -> None:
        self.kind, self.packed = kind, packed.tobytes()

    def info(self, name: str) -> tuple[GGMLType, tuple[int, ...]]:
        raise KeyError(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        return memoryview(self.packed)[start:stop]


def mlx_matrix(kind: str, packed: np.ndarray, compute: object = mx.float32) -> tuple[Matrix, np.ndarray]:
    weights = decode(kind, packed)
    tensor = PackedTensor("w", kind, *weights.shape, is_vector=False, nbytes=packed.size)
    return load_matrix(tensor, OneTensor(kind, packed), compute), weights


def quantised(kind: str, rows: int = 48, columns: int = 512) -> np.ndarray:
    """Blocks as real weights have them: scales of one magnitude."""
    source = NoiseSource({"w": (columns, rows)}, {"w": kind})
    return np.frombuffer(source.read("w"), np.uint8).reshape(rows, -1)


@pytest.mark.parametrize("kind", SUPPORTED)
def test_mlx_holds_the_same_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omninfer.engines.checks.SLAB_BYTES", 2000)
    matrix, weights = mlx_matrix(kind, quantised(kind))
    rows = np.array(matrix.rows(mx.arange(48)))
    limit = 2**-10 * np.abs(weights).max() if kind.endswith(("_K", "_XS")) else 1e-7
    assert np.abs(rows - weights).max() <= limit
    x = np.random.default_rng(1).standard_normal((5, 512)).astype(np.float32)
    product = np.array(matrix.product(mx.array(x)))
    assert np.abs(product - x @ weights.T).max() < (0.01 if kind.endswith(("_K", "_XS")) else 4e-5)


@pytest.mark.parametrize("kind", [k for k in SUPPORTED if k != "F32"])
def test_mlx_computes_in_halfs_as_on_a_gpu(kind: str) -> None:
    matrix, weights = mlx_matrix(kind, quantised(kind), mx.float16)
    x = np.random.default_rng(1).standard_normal((5, 512)).astype(np.float32)
    product = np.array(matrix.product(mx.array(x)))
    assert product.dtype == np.float32
    # MLX's CPU build sums in halfs too, which a GPU does not.
    assert np.abs(product - x @ weights.T).max() < (0.3 if kind == "Q2_K" else 0.1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_scales_beyond_halfs_stay_floats(kind: str) -> None:
    packed = quantised(kind).copy()
    blocks = packed.reshape(48, -1, by_name(kind).type_size)
    half = np.array([60000], "<f2").view(np.uint8)
    offset = 208 if kind == "Q6_K" else 0
    blocks[40, 0, offset : offset + 2] = half
    matrix, weights = mlx_matrix(kind, packed)
    part = matrix.first if isinstance(matrix, HalvedQuantMatrix) else matrix
    assert isinstance(part, QuantMatrix) and part.scales.dtype == mx.float32
    rows = np.array(matrix.rows(mx.arange(48)))
    assert np.isfinite(rows).all()
    np.testing.assert_allclose(rows, weights, rtol=2e-6, atol=1e-6 * np.abs(weights).max())


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q6_K"])
def test_converted_slabs_join_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omninfer.engines.mlx_weights.CONVERTED_BYTES", 1000)
    matrix, weights = mlx_matrix(kind, quantised(kind, rows=47))
    x = np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)
    product = np.array(matrix.product(mx.array(x)))
    assert np.abs(product - x @ weights.T).max() < (0.01 if kind == "Q6_K" else 2e-5)

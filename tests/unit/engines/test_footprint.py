"""What plans think that weights take is what engines really allocate for them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from omninfer.arch import HEAD, Feature, ModelSpec
from omninfer.engines import StageSpec, get_engine
from omninfer.engines.footprint import SLACK, held_bytes
from omninfer.engines.packing import DECODABLE, LATTICES, SUPPORTED
from omninfer.testing.noise import NoiseSource, noise_model
from omnistore.chunker.ggml import by_name, nbytes


def arrays(found: Any) -> list[Any]:
    """Every array that a matrix is made of, each once."""
    if isinstance(found, mx.array | np.ndarray):
        return [found]
    fields = [getattr(found, name) for name in getattr(found, "__slots__", ())]
    return list({id(one): one for field in fields for one in arrays(field)}.values())


def stated(engine: str, model: tuple[ModelSpec, NoiseSource], names: list[str]) -> int:
    sizes = [held_bytes(engine, model[1].types[name], model[1].shapes[name]) for name in names]
    assert all(size is not None for size in sizes)
    return sum(size for size in sizes if size is not None)


@pytest.mark.parametrize("extra", [Feature.NONE, Feature.EXPERTS])
@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("engine", ["mlx", "numpy"])
def test_matrices_take_what_is_stated(
    engine: str, kind: str, extra: Feature, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omninfer.engines.numpy_engine.DECODED_LIMIT", 0)
    model = noise_model(kind=kind, block_count=1, extra=extra)
    stage: Any = get_engine(engine).load(StageSpec.whole(model[0]), model[1], context=8)
    allocated = {name: sum(a.nbytes for a in arrays(matrix)) for name, matrix in stage.matrices.items()}
    assert allocated == {name: stated(engine, model, [name]) for name in allocated}


@pytest.mark.parametrize("kind", LATTICES)
def test_lattice_types_take_what_they_take_in_the_file(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omninfer.engines.numpy_engine.DECODED_LIMIT", 0)
    model = noise_model(kind=kind, block_count=1)
    stage: Any = get_engine("numpy").load(StageSpec.whole(model[0]), model[1], context=8)
    assert sum(a.nbytes for a in arrays(stage.matrices[HEAD])) == stated("numpy", model, [HEAD])
    assert held_bytes("mlx", kind, (256, 8)) is None


def test_where_mlx_takes_more_than_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of the README."""
    ratios = {
        kind: held_bytes("mlx", kind, (512, 64)) / nbytes(by_name(kind), (512, 64)) for kind in SUPPORTED
    }  # type: ignore[operator]  # none of these is refused
    assert {kind for kind, ratio in ratios.items() if ratio > 1.3} == {
        "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"
    }  # fmt: skip
    assert max(ratios.values()) == pytest.approx(2.118, abs=0.001)


def test_ort_and_engines_that_are_not_known() -> None:
    """Against what `bench_engine_memory` measured of whole stages, the interpreter not counted."""
    for kind, shape, head, measured in (
        ("Q6_K", (2048, 5632), False, 1.88),
        ("F16", (2048, 5632), False, 1.97),
        ("Q6_K", (2048, 400_000), True, 2.19),
    ):
        packed = nbytes(by_name(kind), shape)
        stated_bytes = held_bytes("ort", kind, shape, head=head)
        assert stated_bytes is not None and measured <= stated_bytes * SLACK / packed < measured + 0.25
    assert held_bytes("ort", "IQ1_S", (256, 8)) is None
    for kind in DECODABLE:
        assert held_bytes("abacus", kind, (256, 8)) is None

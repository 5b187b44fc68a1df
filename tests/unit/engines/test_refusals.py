"""What an engine can not run is refused by name before a weight is read."""

from __future__ import annotations

import pytest

from omninfer.arch import Feature
from omninfer.engines import StageSpec, get_engine
from omninfer.engines.checks import check_features
from omninfer.engines.packing import LATTICES
from omninfer.testing.noise import noise_model
from omnistore.errors import UnsupportedModel


def test_a_feature_that_an_engine_lacks() -> None:
    spec, _ = noise_model("gemma2")
    check_features(spec, ~Feature.NONE, "any")
    with pytest.raises(UnsupportedModel, match=r"engine some has no WINDOW, which gemma2 needs"):
        check_features(spec, ~Feature.WINDOW, "some")


@pytest.mark.parametrize("kind", LATTICES)
def test_lattice_types_are_for_numpy_alone(kind: str) -> None:
    spec, source = noise_model(block_count=1)
    source.types["blk.0.ffn_up.weight"] = kind
    get_engine("numpy").load(StageSpec.whole(spec), source, context=8).close()
    with pytest.raises(UnsupportedModel, match=rf"blk\.0\.ffn_up\.weight has type {kind}.*numpy"):
        get_engine("mlx").load(StageSpec.whole(spec), source, context=8)

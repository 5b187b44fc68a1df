"""Every engine keeps the contract of engines."""

from __future__ import annotations

import pytest

from omninfer.engines import Engine, get_engine
from omninfer.testing.engine_contract import EngineContract


class TestNumpyEngine(EngineContract):
    @pytest.fixture
    def engine(self) -> Engine:
        return get_engine("numpy")


class TestNumpyEngineWithPackedWeights(EngineContract):
    """As it is with models that are too large to be decoded at load."""

    @pytest.fixture
    def engine(self, monkeypatch: pytest.MonkeyPatch) -> Engine:
        monkeypatch.setattr("omninfer.engines.numpy_engine.DECODED_LIMIT", 0)
        monkeypatch.setattr("omninfer.engines.numpy_weights.SLAB_WEIGHTS", 10_000)
        return get_engine("numpy")


class TestMlxEngine(EngineContract):
    @pytest.fixture
    def engine(self) -> Engine:
        return get_engine("mlx")


class TestOrtEngine(EngineContract):
    quantised_tolerance = 0.08  # activations are 8 bits wide: 0.055 was seen (MXFP4) on logits of about 1

    @pytest.fixture
    def engine(self) -> Engine:
        return get_engine("ort")

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
    # Activations are 8 bits wide, and one token is multiplied by other kernels than many: where their last
    # bits differ, a code may fall to the other side. 0.03 to 0.055 was seen for that with half of the types,
    # on logits of about 1; nothing above 1e-5 where none falls. Operands are exact: test_ort_packed.
    quantised_tolerance = 0.08

    @pytest.fixture
    def engine(self) -> Engine:
        return get_engine("ort")

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


HALFS = 0.01
"""Tolerance with products of halfs: nothing above 0.004 was seen on MLX's CPU build."""


class TestMlxEngine(EngineContract):
    """On the GPU where there is one, with halfs."""

    @pytest.fixture
    def engine(self) -> Engine:
        engine = get_engine("mlx")
        if engine.accelerated():
            self.tolerance = self.quantised_tolerance = HALFS
            self.kv_itemsize = 2
        return engine


@pytest.mark.slow
class TestMlxEngineWithHalfs(EngineContract):
    """A GPU's arithmetic on the CPU, which is slow at it."""

    tolerance = quantised_tolerance = HALFS
    kv_itemsize = 2

    @pytest.fixture
    def engine(self) -> Engine:
        # Imported here: nothing else in this file needs MLX to be installed.
        import mlx.core as mx

        from omninfer.engines.mlx_engine import MlxEngine

        return MlxEngine(mx.float16)

    @pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "MXFP4"])
    def test_experts_of_every_form(self, engine: Engine, kind: str) -> None:
        """But F16: MLX's gather_mm knows float32 alone on a CPU."""
        super().test_experts_of_every_form(engine, kind)


class TestOrtEngine(EngineContract):
    # Activations are 8 bits wide, and one token is multiplied by other kernels than many: where their last
    # bits differ, a code may fall to the other side. 0.03 to 0.055 was seen for that with half of the types,
    # on logits of about 1; nothing above 1e-5 where none falls. Operands are exact: test_ort_packed.
    quantised_tolerance = 0.08

    @pytest.fixture
    def engine(self) -> Engine:
        return get_engine("ort")

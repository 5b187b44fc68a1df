"""Engines: what multiplies the matrices, behind the seam of `interface`.

`ENGINES` names the modules; each has `engine() -> Engine` and is imported only when picked, so that
importing this package imports neither mlx nor any other engine. A further engine is a line here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Final, cast

from omninfer.arch import ModelSpec
from omninfer.engines.files import FileTensorSource
from omninfer.engines.interface import (
    Engine,
    Stage,
    StageSpec,
    TensorSource,
    tensors_needed,
)
from omnistore.errors import BadConfig

__all__ = [
    "ENGINES",
    "Engine",
    "FileTensorSource",
    "Stage",
    "StageSpec",
    "TensorSource",
    "get_engine",
    "pick_engine",
    "tensors_needed",
]

ENGINES: Final[Mapping[str, str]] = {
    "mlx": "omninfer.engines.mlx_engine",
    "ort": "omninfer.engines.ort_engine",
    "numpy": "omninfer.engines.numpy_engine",
}


def get_engine(name: str) -> Engine:
    """The engine of that name, imported now; raises `BadConfig` if it can not run on this machine."""
    if name not in ENGINES:
        raise BadConfig(f"no engine is called {name!r}", remedy=f"engines: auto, {', '.join(ENGINES)}")
    try:
        engine = cast(Engine, importlib.import_module(ENGINES[name]).engine())
    except ImportError as error:
        raise BadConfig(f"the engine {name} can not be loaded: {error}", remedy="try --engine auto") from None
    reason = engine.unavailable()
    if reason is not None:
        raise BadConfig(f"the engine {name} can not run here: {reason}", remedy="try --engine auto")
    return engine


def pick_engine(name: str = "auto", model: ModelSpec | None = None) -> Engine:
    """The engine to use: `name`, or for "auto" mlx where a GPU answers, ort elsewhere, and numpy where
    neither can be loaded, or has not what `model` needs.

    Without a GPU, MLX's CPU build multiplies with one thread and a reference BLAS: 1 to 2 tokens a second of
    a 1.1B model, where numpy does as well and ort a multiple (spec/decisions/0007-onnx-runtime-on-cpus).
    """
    if name != "auto":
        return get_engine(name)
    for candidate in ("mlx", "ort"):
        try:
            engine = get_engine(candidate)
        except BadConfig:
            continue
        known = model is None or not model.features & ~engine.features
        if known and (candidate != "mlx" or engine.accelerated()):
            return engine
    return get_engine("numpy")

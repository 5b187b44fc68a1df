"""Engines: what multiplies the matrices, behind the seam of `interface`.

`ENGINES` names the modules; each has `engine() -> Engine` and is imported only when picked, so that
importing this package imports neither mlx nor any other engine. A further engine is a line here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Final, cast

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


def pick_engine(name: str = "auto") -> Engine:
    """The engine to use: `name`, or for "auto" mlx where a GPU answers and numpy elsewhere.

    Without a GPU, MLX's CPU build multiplies with one thread and a reference BLAS. Tokens a second, both
    engines in one run on two busy cores:

        shape of a 1.1B model       prefill 16       decode
                                  numpy    mlx    numpy    mlx
        Q4_K, 590 MB                8.7    1.2      1.4    2.0
        Q8_0, 1.1 GB               12.3    1.2      2.4    2.0
        F32, 1.2 MB (260K)                          2300   560
    """
    if name != "auto":
        return get_engine(name)
    try:
        mlx = get_engine("mlx")
    except BadConfig:
        return get_engine("numpy")
    return mlx if mlx.accelerated() else get_engine("numpy")

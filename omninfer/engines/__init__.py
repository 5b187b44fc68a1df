"""Engines: what multiplies the matrices, behind the seam of `interface`.

`ENGINES` names the modules; each has `engine() -> Engine` and is imported only when picked, so that
importing this package imports neither mlx nor any other engine. A further engine is a line here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, cast

from omninfer.arch import KVKind, ModelSpec
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
    "Verdict",
    "choose_engine",
    "get_engine",
    "pick_engine",
    "tensors_needed",
    "weigh_engines",
]

ENGINES: Final[Mapping[str, str]] = {
    "mlx": "omninfer.engines.mlx_engine",
    "ort": "omninfer.engines.ort_engine",
    "numpy": "omninfer.engines.numpy_engine",
}
"""Those that `--engine auto` prefers come first."""
LAST_RESORT: Final = "numpy"
"""Taken when nothing else can be; what it lacks too, it refuses by name as it loads."""
_FOR: Final = {
    "mlx": "a GPU answers to it",
    "ort": "it is the fastest engine on CPUs",
    LAST_RESORT: "no other engine can be taken",
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


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `--engine auto` makes of one engine."""

    name: str
    engine: Engine | None
    """None where it can not run on this machine."""
    taken: bool
    reason: str
    """Why it is taken, or is not."""


def weigh_engines(model: ModelSpec | None = None, kv: KVKind = "full") -> Iterator[Verdict]:
    """What auto makes of each engine, best first: mlx where a GPU answers, ort elsewhere, and numpy where
    neither can be loaded, or has what `model` needs, or keeps keys and values as `kv`. Exactly one is taken;
    engines are imported as asked for.

    Without a GPU, MLX's CPU build multiplies with one thread and a reference BLAS: 1 to 2 tokens a second of
    a 1.1B model, where numpy does as well and ort a multiple (spec/decisions/0007-onnx-runtime-on-cpus).
    Raises `BadConfig` if not even numpy can be loaded.
    """
    passed: list[str] = []
    taken = ""
    for name in ENGINES:
        try:
            engine = get_engine(name)
        except BadConfig as error:
            if name == LAST_RESORT and not taken:
                raise
            passed.append(error.message)
            yield Verdict(name, None, False, error.message)
            continue
        against = f"{taken} is faster here" if taken else _against(name, engine, model, kv)
        if against is None:
            taken = name
            yield Verdict(name, engine, True, "; ".join([_FOR[name], *passed]))
        else:
            passed.append(f"{name}: {against}")
            yield Verdict(name, engine, False, against)


def _against(name: str, engine: Engine, model: ModelSpec | None, kv: KVKind) -> str | None:
    """What speaks against an engine that runs here."""
    if name == LAST_RESORT:
        return None
    if name == "mlx" and not engine.accelerated():
        return "no GPU answers to it, and its CPU build is slow"
    missing = model.features & ~engine.features if model is not None else None
    if missing:
        return "it lacks " + ", ".join(str(one.name) for one in missing) + ", which the model needs"
    if kv not in engine.kv_kinds:
        return f"it does not keep keys and values as {kv}"
    return None


def choose_engine(
    name: str = "auto", model: ModelSpec | None = None, kv: KVKind = "full"
) -> tuple[Engine, str]:
    """The engine to use, and why: `name`, or for "auto" what `weigh_engines` takes. Raises `BadConfig`."""
    if name != "auto":
        return get_engine(name), "it was asked for"
    for verdict in weigh_engines(model, kv):
        if verdict.taken and verdict.engine is not None:
            return verdict.engine, verdict.reason
    raise AssertionError("one engine is always taken")


def pick_engine(name: str = "auto", model: ModelSpec | None = None, kv: KVKind = "full") -> Engine:
    """The engine to use, without the reason: see `choose_engine`."""
    return choose_engine(name, model, kv)[0]

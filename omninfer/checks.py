"""What `omni doctor` says about inference: the engines, and which one `--engine auto` picks."""

from __future__ import annotations

from collections.abc import Iterable

from omninfer.engines import ENGINES, get_engine, pick_engine
from omnistore.doctor import Finding
from omnistore.errors import BadConfig


def check_engines() -> Iterable[Finding]:
    """Each engine: whether it runs here."""
    usable = 0
    for name in ENGINES:
        try:
            engine = get_engine(name)
        except BadConfig as error:
            yield Finding(f"engine {name}", "unknown", error.message)
            continue
        usable += 1
        picked = pick_engine().name == engine.name
        yield Finding(f"engine {name}", "ok", "runs here" + ("; --engine auto takes it" if picked else ""))
    if not usable:
        yield Finding("engines", "warning", "no engine runs here", "This machine can store and seed only.")

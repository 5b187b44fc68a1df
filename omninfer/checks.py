"""What `omni doctor` says about inference: the engines, and why `--engine auto` takes one and not another."""

from __future__ import annotations

from collections.abc import Iterable

from omninfer.engines import weigh_engines
from omnistore.doctor import Finding
from omnistore.errors import BadConfig


def check_engines() -> Iterable[Finding]:
    """Each engine: whether it runs here, whether auto takes it, and why."""
    try:
        for verdict in weigh_engines():
            if verdict.engine is None:
                yield Finding(f"engine {verdict.name}", "unknown", verdict.reason)
                continue
            what = "takes it" if verdict.taken else "does not take it"
            yield Finding(
                f"engine {verdict.name}", "ok", f"runs here; --engine auto {what}: {verdict.reason}"
            )
    except BadConfig as error:
        yield Finding("engines", "warning", error.message, "This machine can store and seed only.")

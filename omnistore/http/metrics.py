"""The Prometheus text format, version 0.0.4 (pure): counts in, one text out. Counts nothing itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family."""

    name: str
    """Ends in its unit; in `_total` for a counter."""
    kind: Literal["counter", "gauge"]
    help: str
    value: float = 0
    """When there are no labels."""
    label: str = ""
    by_label: Mapping[str, float] = field(default_factory=dict)
    """One sample for each value of `label`."""


def render(metrics: Iterable[Metric]) -> str:
    """The text that Prometheus reads."""
    lines = []
    for metric in metrics:
        lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
        if not metric.label:
            lines.append(f"{metric.name} {_number(metric.value)}")
        for value, count in metric.by_label.items():
            lines.append(f'{metric.name}{{{metric.label}="{_escaped(value)}"}} {_number(count)}')
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

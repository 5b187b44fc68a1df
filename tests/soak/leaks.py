"""What long-lived processes take, over time, and whether it only grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from omnistore.http.client import running_seed

BOUNDS: Final = {
    # Python gives memory back to the system in arenas: a level swings by some megabytes.
    "rss_mb": (16.0, 0.12),
    # A connection more or less is three tasks and one descriptor, and nobody's fault.
    "fds": (24.0, 0.25),
    "tasks": (60.0, 0.25),
}
"""Growth over the measured time that counts as noise: absolute, or a share of the level if that is more."""


@dataclass(frozen=True)
class Sample:
    """One look at one process."""

    at: float
    """Seconds since the soak began."""
    rss_mb: float
    fds: float
    tasks: float
    sent: float
    """Bytes of the transfer protocol since its start."""
    cpu: float
    received: float = 0.0
    """The same, received."""


@dataclass
class Watched:
    """All looks at one process."""

    name: str
    samples: list[Sample] = field(default_factory=list)


def look_at(pid: int) -> tuple[float, float]:
    """Resident megabytes and open descriptors, by the kernel."""
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    return kilobytes * 1024 / 1e6, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


async def sample(home: Path, pid: int, at: float) -> tuple[Sample, str | None]:
    """One look, by the kernel and by the seed's own metrics; and what is wrong if they disagree."""
    rss, fds = look_at(pid)
    seed = await running_seed(home)
    assert seed is not None, f"the seed of {home} does not answer on its socket"
    values = values_of(await seed.text("/metrics"))
    told = values["process_resident_memory_bytes"] / 1e6
    # Read a moment apart; a transfer moves it by some megabytes.
    wrong = None if abs(told - rss) < 64 else f"/metrics says {told:.0f} MB, the kernel {rss:.0f} MB"
    return (
        Sample(
            at,
            rss,
            fds,
            values["omni_tasks"],
            values["omni_transfer_sent_bytes_total"],
            values["process_cpu_seconds_total"],
            values["omni_transfer_received_bytes_total"],
        ),
        wrong,
    )


def values_of(text: str) -> dict[str, float]:
    """The metrics without labels."""
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs if "{" not in name}


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Theil-Sen: the median slope over all pairs, which single peaks do not move. Units a second."""
    pairs = [
        (values[j] - values[i]) / (times[j] - times[i])
        for i in range(len(times))
        for j in range(i + 1, len(times))
        if times[j] > times[i]
    ]
    return median(pairs) if pairs else 0.0


@dataclass(frozen=True)
class Trend:
    """One quantity of one process after warm-up."""

    name: str
    quantity: str
    level: float
    """Median of the first quarter after warm-up."""
    growth: float
    """Over the time after warm-up, by its slope."""
    hours: float
    allowed: float

    @property
    def leaks(self) -> bool:
        return self.growth > self.allowed


def trends(watched: Watched, warm_up: float) -> list[Trend]:
    """How each quantity went after `warm_up` seconds."""
    samples = [one for one in watched.samples if one.at >= warm_up]
    if len(samples) < 8:
        return []
    # Pairs grow as the square: two hundred looks are enough for a slope.
    samples = samples[:: max(1, len(samples) // 200)]
    times = [one.at for one in samples]
    took = times[-1] - times[0]
    found = []
    for quantity, (absolute, share) in BOUNDS.items():
        values = [float(getattr(one, quantity)) for one in samples]
        level = median(values[: max(1, len(values) // 4)])
        found.append(
            Trend(
                watched.name,
                quantity,
                level,
                slope(times, values) * took,
                took / 3600,
                max(absolute, share * level),
            )
        )
    return found

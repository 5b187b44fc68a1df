"""What this process takes of the machine, as metrics under the names that every Prometheus client uses.

A seed that is left running is watched by these: descriptors, memory and tasks that only grow are a leak.
"""

from __future__ import annotations

import ctypes
import sys

import psutil
import trio

from omnistore.http.metrics import Metric


def process_metrics() -> list[Metric]:
    """Memory, descriptors, processor time and trio tasks, now; called from inside trio."""
    this = psutil.Process()
    with this.oneshot():
        used = this.cpu_times()
        memory = int(this.memory_info().rss)
    return [
        Metric("process_resident_memory_bytes", "gauge", "Memory in use, in bytes.", memory),
        Metric("process_open_fds", "gauge", "Files, sockets and pipes open.", this.num_fds()),
        Metric("process_cpu_seconds_total", "counter", "Processor time used, in seconds.",
               used.user + used.system),
        Metric("omni_tasks", "gauge", "Tasks alive: a few for each connection and stream.",
               trio.lowlevel.current_statistics().tasks_living),
    ]  # fmt: skip


def give_memory_back() -> None:
    """Have the allocator return to the system what is free: of what a pin took it keeps more each time.

    Takes milliseconds. Does nothing where the C library is not glibc.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

"""The `omni` command, with a window into it: `watched.py ARGS` is `omni ARGS`.

SIGUSR1 has it write where every thread and every trio task is to stderr, and go on; SIGUSR2 a line of
JSON to the file `SOAK_OBJECTS`: how many objects of each type there are, what was allocated where if
tracemalloc runs, and the resident memory before and after the allocator gave back what it could.
`SOAK_USAGE` names a file to which it adds, at its end, the most memory that it had, in bytes. Not a test.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import resource
import signal
import sys
import tracemalloc
import weakref
from collections import Counter
from pathlib import Path
from types import FrameType

import psutil
import trio
from trio._core._run import GLOBAL_RUN_CONTEXT  # for what its public interface does not show

from omnistore.cli.main import main


def tell_tasks(signum: int, frame: FrameType | None) -> None:
    """Where every task waits, nested as they are."""
    root = trio.lowlevel.current_root_task()
    if root is not None:
        _tell(root, 0)
    sys.stderr.flush()


def _tell(task: trio.lowlevel.Task, depth: int) -> None:
    frames = [f"{at.f_code.co_qualname if sys.version_info >= (3, 11) else at.f_code.co_name}:{line}"
              for at, line in task.iter_await_frames()]  # fmt: skip
    print("  " * depth + f"task {task.name}: " + " > ".join(frames), file=sys.stderr)
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            _tell(child, depth + 1)


def tell_objects(signum: int, frame: FrameType | None) -> None:
    """What there is in memory."""
    # trio keeps deadlines that were called off until there are a thousand of them: they are no leak.
    GLOBAL_RUN_CONTEXT.runner.deadlines._prune()
    gc.collect()
    traced = tracemalloc.take_snapshot().statistics("lineno") if tracemalloc.is_tracing() else []
    found: dict[str, object] = {
        "objects": Counter(
            f"{type(one).__module__}.{type(one).__qualname__}"
            for one in gc.get_objects()
            # SQLite's connections drop references to cursors that are gone at every two hundredth.
            if not (type(one) is weakref.ReferenceType and one() is None)
        ),
        "python_blocks": sys.getallocatedblocks(),
        "traced": {str(line.traceback): line.size for line in traced[:2000]},
        "rss": _rss(),
    }
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    found["trimmed"] = _rss()
    with Path(os.environ["SOAK_OBJECTS"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")


def _rss() -> int:
    return int(psutil.Process().memory_info().rss)


def run() -> int:
    """The command."""
    signal.signal(signal.SIGUSR1, tell_tasks)
    if "SOAK_OBJECTS" in os.environ:
        signal.signal(signal.SIGUSR2, tell_objects)
    # Its own comes first, then ours, which waits until Python runs again: a thread stuck in C shows, too.
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=True)
    try:
        return main()
    finally:
        usage = os.environ.get("SOAK_USAGE")
        if usage:
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with Path(usage).open("a", encoding="ascii") as file:
                file.write(f"{most if sys.platform == 'darwin' else most * 1024}\n")


if __name__ == "__main__":
    sys.exit(run())

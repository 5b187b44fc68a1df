"""The `omni` command, with a window into it: `watched.py ARGS` is `omni ARGS`.

SIGUSR1 has it write where every thread and every trio task is to stderr, and go on. `SOAK_USAGE` names a file
to which it adds, at its end, the most memory that it had, in bytes. Not a test.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
from pathlib import Path
from types import FrameType

import trio

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


def run() -> int:
    """The command."""
    signal.signal(signal.SIGUSR1, tell_tasks)
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

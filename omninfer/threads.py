"""A thread of its own for whatever computes, called from trio.

One `ComputeThread` per stage: calls run one after the other, in order, always in the same thread.
A caller that is cancelled stops waiting at once; what it started runs to its end behind it and later calls
queue up after that, so that a stage is never called twice at a time. Nothing here knows what is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import trio

T = TypeVar("T")


class ComputeThread:
    """One worker thread; `close` it."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._closed = False

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """`work(*args)` in the thread; raises what it raises."""
        token = trio.lowlevel.current_trio_token()
        done = trio.Event()

        def wake(_: Future[T]) -> None:
            # The loop may have ended while the thread was still at work.
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(done.set)

        future = self._pool.submit(work, *args)
        future.add_done_callback(wake)
        await done.wait()
        return future.result()

    def submit(self, work: Callable[..., object], *args: Any) -> None:
        """Run `work(*args)` after everything asked so far; nobody waits for it. Nothing once closed."""
        if not self._closed:
            self._pool.submit(work, *args)

    def close(self) -> None:
        """No further calls; what was asked for still runs."""
        self._closed = True
        self._pool.shutdown(wait=False)

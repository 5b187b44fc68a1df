"""Memory for blocks on their way from a stream to the disk, used again and again (pure).

Memory that is new for every block costs more than filling it: the kernel clears each page, and takes
it back when the block is written. How many are lent at once is bounded by whoever borrows.
"""

from __future__ import annotations

from typing import Final

from omnistore.block import BLOCK_SIZE

SPARE: Final = 16
"""Buffers kept for the next blocks: what one fetch has on its way when the disk is slow."""


class Buffers:
    """Lends buffers. For one thread; a buffer that never comes back is merely replaced."""

    def __init__(self, spare: int = SPARE) -> None:
        """`spare`: most buffers kept while nobody uses them."""
        self._most = spare
        self._spare: list[bytearray] = []

    def lend(self, size: int) -> memoryview:
        """Room for `size` bytes, with any contents."""
        if size > BLOCK_SIZE:
            # Larger than anything we cut: rare, and not worth keeping memory for.
            return memoryview(bytearray(size))
        buffer = self._spare.pop() if self._spare else bytearray(BLOCK_SIZE)
        return memoryview(buffer)[:size]

    def take_back(self, lent: memoryview) -> None:
        """Take back what `lend` gave: `lent` can not be read from now on, rather than read wrongly."""
        buffer = lent.obj
        lent.release()
        if isinstance(buffer, bytearray) and len(buffer) == BLOCK_SIZE and len(self._spare) < self._most:
            self._spare.append(buffer)

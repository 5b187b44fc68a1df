"""What leaves a server: how fast, and which blocks it gave how often.

From the rate follows how much is worth having read ahead: no more than the link takes in half a
second, so that which block goes next is decided late. Who was given a block can give it to others,
so what was given least goes first. Pure: the time is an argument. Implements spec/05-transfer, section
"The server".
"""

from __future__ import annotations

from collections import deque
from typing import Final

from omnistore.block import MAX_BLOCK_SIZE
from omnistore.cid import CID, RAW

SAMPLE: Final = 0.1
"""Seconds over which a rate is measured, at least."""
SAMPLES: Final = 8
"""Rates remembered; the highest counts, since a requester that pauses is not a slow link."""
AHEAD: Final = 0.5
"""Seconds of the rate to have read. Above the time from a read to the next, or it could never grow."""
AHEAD_LEAST: Final = 2 * MAX_BLOCK_SIZE
"""One block being sent, one being read."""
STUCK: Final = 2.0
"""Seconds in which a requester takes in nothing after which what is read for it no longer counts."""
STUCK_MOST: Final = 5.0
"""The same where all are slow: then it can not be told from a long queue, and more is read ahead."""
REMEMBERED: Final = 65536
"""Blocks whose copies are counted, those given last: some 10 MB."""


class Outflow:
    """The rate of one server."""

    def __init__(self, most: int) -> None:
        """`most`: bytes that may be read ahead at whatever rate."""
        self._most = most
        self._rates: deque[float] = deque(maxlen=SAMPLES)
        self._since = 0.0
        self._bytes = 0

    @property
    def room(self) -> int:
        """Bytes worth having read and not yet sent."""
        if not self._rates:
            return min(self._most, 2 * AHEAD_LEAST)
        return min(self._most, max(AHEAD_LEAST, int(max(self._rates) * AHEAD)))

    @property
    def stuck(self) -> float:
        """Seconds without progress after which a requester counts as not reading."""
        return STUCK if not self._rates else min(STUCK_MOST, max(STUCK, 3 * self.room / max(self._rates)))

    def began(self, now: float) -> None:
        """There is something to send again."""
        self._since, self._bytes = now, 0

    def sent(self, size: int, now: float) -> None:
        """`size` bytes were handed to the network."""
        self._bytes += size
        if now - self._since >= SAMPLE:
            self._rates.append(self._bytes / (now - self._since))
            self._since, self._bytes = now, 0


class Given:
    """How often each block was given to anybody."""

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most = most
        self._times: dict[bytes, int] = {}

    def times(self, cid: CID) -> int:
        """How often; 0 for nodes, which a newcomer can begin nothing without."""
        return self._times.get(cid.binary, 0) if cid.codec == RAW else 0

    def add(self, cid: CID) -> None:
        """The block is given once more."""
        if cid.codec == RAW:
            self._times[cid.binary] = self._times.pop(cid.binary, 0) + 1
            if len(self._times) > self._most:
                del self._times[next(iter(self._times))]

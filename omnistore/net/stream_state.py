"""What is kept of one Yamux stream, and what a connection may take of this machine (pure: values only).

Who changes these fields, and when, is `muxing`'s.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from omnistore.net import frames as f
from omnistore.net.interface import NextRoom


@dataclass(frozen=True, slots=True)
class MuxLimits:
    """What one connection may take of this machine."""

    inbound: int = 256
    """Streams the peer may have open: what its own side would open at most."""
    window: int = 16 << 20
    """Bytes a stream's window grows to: what other implementations stop at; 320 MB/s over 50 ms."""
    growth: int = 24 << 20
    """Bytes that all windows together may grow by."""
    buffered: int = 40 << 20
    """Bytes received and not taken by anybody, over all streams."""
    control: int = 64 << 10
    """Bytes of answers owed to a peer that does not read them."""
    small: int = 16 << 10
    """A stream with no more than this to send goes first."""
    batch: int = f.MAX_PAYLOAD
    """Bytes sent in one go: a frame of one stream, where no other has any."""
    least: int = 64 << 10
    """Bytes that a turn may be in any case, however little is left of a batch."""
    prompt: float = 0.01
    """Seconds after which a reader that lent room hears of what is in it, though it is not full."""
    linger: float = 120.0
    """Seconds that a stream we closed may wait for the peer's end without a byte arriving."""
    growth_trips: float = 1.5
    """A window grows when half of it was used within so many round trips: up to some four times what
    the path holds. More would only be queued on the way, and what comes after it would wait."""
    growth_least: float = 0.003
    """Seconds in which half of a window may go in any case: within them either side may do something else,
    such as hash a block, and the other stands still once it has used up its window."""
    bridge: int = 4 << 20
    """Bytes that a window grows to by that rule: more than a pause takes only fills memory."""
    far: float = 0.01
    """Seconds of a round trip from which a path is a long one, on which packets get lost: what comes
    behind a lost one waits for a round trip or more until that was sent again."""
    growth_trips_far: float = 4.0
    """The same on a long path: while half of a window waits for what was lost, the rest keeps it busy. There
    the sender's own socket, not the window, bounds what is queued on the way."""


LIMITS: Final = MuxLimits()


@dataclass(slots=True, eq=False)
class Pending:
    """Bytes on their way out."""

    views: deque[memoryview]
    left: int
    """Bytes that are in no frame yet."""
    done: bool = False
    """Whether the last of them is in a frame."""

    def move(self, size: int, found: list[bytes | memoryview]) -> None:
        """Move `size` bytes from the front to `found`."""
        self.left -= size
        while size:
            view = self.views[0]
            if len(view) > size:
                self.views[0] = view[size:]
                view = view[:size]
            else:
                self.views.popleft()
            found.append(view)
            size -= len(view)


@dataclass(slots=True, eq=False)
class StreamState:
    """One stream. Its owner reads these fields and changes none."""

    id: int
    received: deque[memoryview] = field(default_factory=deque)
    """Bytes nobody took yet."""
    buffered: int = 0
    """How many those are."""
    send_window: int = f.INITIAL_WINDOW
    """Bytes the peer still takes."""
    ended: bool = False
    """The peer will send no more."""
    closing: bool = False
    """We will send no more than is pending."""
    closed: bool = False
    """The peer was told so."""
    broken: str | None = None
    """Reset, or lost with the connection: why."""
    receive_window: int = f.INITIAL_WINDOW
    """Bytes the peer may still send."""
    target: int = f.INITIAL_WINDOW
    """What the window is opened to."""
    opened_at: float = 0.0
    """When the window was opened last."""
    room: memoryview | None = None
    """Where its reader wants what arrives next; what is filled is cut off. None: nobody lent any."""
    more: NextRoom | None = None
    """Says where the next room is."""
    lent_at: float = 0.0
    active_at: float = 0.0
    pending: deque[Pending] = field(default_factory=deque)
    queued: bool = False
    """Whether its turn to send will come."""
    forgotten: bool = False
    """Over, and no longer counted: what it has received is its owner's."""

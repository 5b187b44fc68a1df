"""`FrameLink`: one stream of frames, checked on both ways (spec/06-pipeline, section "Conversation").

The thin trio shell around `framing` and `conversation`. It owns the rule of liveness: whoever waits
for a frame gives a number of seconds of silence after which the peer counts as gone, because a stopped or
unplugged machine never closes its connections.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Literal

import trio

from omninfer.conversation import Conversation
from omninfer.frames import Error, Frame
from omninfer.framing import Decoder, encode
from omnistore.errors import PeerUnreachable
from omnistore.net.interface import Stream

READ_SIZE: Final = 1 << 18
"""Bytes asked of a stream at once."""


class FrameLink:
    """Frames over one stream. One task receives; any number send."""

    def __init__(
        self,
        stream: Stream,
        side: Literal["coordinator", "lender"],
        *,
        silence: float,
        caching: bool = False,
    ) -> None:
        """`silence`: seconds without a byte, or to get rid of one, before the peer counts as gone; `caching`:
        the protocol's version is 1.1.0."""
        self.peer = stream.peer
        self.conversation = Conversation(side, caching=caching)
        self._stream = stream
        self._decoder = Decoder(
            self.conversation.accepts("lender" if side == "coordinator" else "coordinator")
        )
        self._frames: deque[Frame] = deque()
        self._sending = trio.Lock()
        self._silence = silence
        self._broken = False

    async def send(self, frame: Frame) -> None:
        """Raises `PeerUnreachable`, or `LocalProtocolError` before anything is sent."""
        async with self._sending:
            if self._broken:
                raise PeerUnreachable(f"the stream to {self.peer} broke")
            self.conversation.sending(frame)
            data = encode(frame)
            # Whoever interrupts a sender must not leave half a frame behind: no other could follow it.
            self._broken = True
            with trio.move_on_after(self._silence) as limit:
                limit.shield = True
                await self._stream.send_all(data)
                self._broken = False
            if limit.cancelled_caught:
                raise PeerUnreachable(f"{self.peer} took nothing for {self._silence:.0f} s")

    async def receive(self, *, silence: float | None = None) -> Frame | None:
        """The next frame; None at a clean end. Raises `PeerUnreachable` or `RemoteProtocolError`."""
        allowed = self._silence if silence is None else silence
        while not self._frames:
            data = None
            with trio.move_on_after(allowed):
                data = await self._stream.receive_some(READ_SIZE)
            if data is None:
                raise PeerUnreachable(f"{self.peer} was silent for {allowed:.0f} s")
            if not data:
                if self._decoder.between_frames:
                    return None
                raise PeerUnreachable(f"{self.peer} went away in the middle of a frame")
            self._frames += self._decoder.feed_untrusted(data)
        frame = self._frames.popleft()
        self.conversation.received_untrusted(frame)
        return frame

    async def fail(self, reason: str) -> None:
        """As a lender: say why the stream ends, if that still can be said, and end it."""
        try:
            await self.send(Error(reason))
        except PeerUnreachable:
            await self.reset()
        else:
            await self.aclose()

    async def aclose(self) -> None:
        """Close cleanly; never raises."""
        with trio.move_on_after(1) as limit:
            limit.shield = True
            await self._stream.aclose()
        if limit.cancelled_caught:
            await self.reset()

    async def reset(self) -> None:
        """Abort; never raises."""
        self._broken = True
        with trio.CancelScope(shield=True):
            await self._stream.reset()

"""Which frame may come when on one pipeline stream: a table, and two sides of it. Pure.

Both ends keep a `Conversation` and show it every frame they send and receive, so that each finds the
other's fault (`RemoteProtocolError`) or its own (`LocalProtocolError`) before acting on the frame. It also
holds what can be told from earlier frames: slots, context, the order and shape of answers. Values that
depend on the model (width, vocabulary) are the engine's and the pipeline's to check. Implements
spec/06-pipeline, section "Conversation", whose diagram is drawn from `TABLE`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import Enum
from typing import Final, Literal

from omninfer.frames import (
    LIMITS,
    Activations,
    Drop,
    Forward,
    Frame,
    Load,
    Output,
    Ping,
    Pong,
    Trim,
    name_of,
)
from omnistore.errors import LocalProtocolError, ProtocolError, RemoteProtocolError


class State(Enum):
    """What a stream is for at the moment."""

    IDLE = "idle"
    ASKED = "asked"
    LOADING = "loading"
    READY = "ready"
    OVER = "over"


_I, _A, _L, _R, _O = State.IDLE, State.ASKED, State.LOADING, State.READY, State.OVER

TABLE: Final[Mapping[str, Mapping[State, State]]] = {
    # from the coordinator
    "ask": {_I: _A},
    "load": {_I: _L},
    "forward": {_R: _R},
    "trim": {_R: _R},
    "drop": {_R: _R},
    "ping": {_I: _I, _A: _A, _L: _L, _R: _R},
    "bye": {_I: _O, _A: _O, _L: _O, _R: _O},
    # from the lender
    "profile": {_A: _I},
    "refuse": {_A: _I, _L: _I},
    "progress": {_I: _I, _A: _A, _L: _L, _R: _R},  # idle: a beat that an answer overtook
    "ready": {_L: _R},
    "output": {_R: _R},
    "pong": {_I: _I, _A: _A, _L: _L, _R: _R},
    "error": {_I: _O, _A: _O, _L: _O, _R: _O},
}
"""frame → state in which it may come → state afterwards."""


class Conversation:
    """One stream, as one of its sides follows it."""

    def __init__(self, side: Literal["coordinator", "lender"]) -> None:
        self.side = side
        self.state = State.IDLE
        self.load: Load | None = None
        """What was asked to be loaded last."""
        self._unanswered: deque[Forward] = deque()
        self._pings: deque[int] = deque()
        self.next_seq = 0
        """Number of the next forward."""

    def sending(self, frame: Frame) -> None:
        """Take note of a frame of ours. Raises `LocalProtocolError`."""
        self._follow(frame, LocalProtocolError)

    def received_untrusted(self, frame: Frame) -> None:
        """Take note of a frame of theirs. Raises `RemoteProtocolError`."""
        self._follow(frame, RemoteProtocolError)

    @property
    def unanswered(self) -> int:
        """Forwards whose output has not come."""
        return len(self._unanswered)

    def _follow(self, frame: Frame, fault: type[ProtocolError]) -> None:
        name = name_of(frame)
        after = TABLE[name].get(self.state)
        if after is None:
            raise fault(f"a {name!r} frame in state {self.state.value}")
        match frame:
            case Forward():
                self._forward(frame, fault)
            case Output():
                self._output(frame, fault)
            case Load():
                self.load = frame
            case Trim(slot) | Drop(slot):
                self._slot(slot, fault)
            case Ping(data):
                if len(self._pings) == LIMITS.forwards:
                    raise fault(f"more than {LIMITS.forwards} pings unanswered")
                self._pings.append(len(data))
            case Pong(data):
                if not self._pings or self._pings.popleft() != len(data):
                    raise fault(f"a pong of {len(data)} bytes answers no ping")
            case _:
                pass
        self.state = after

    def _slot(self, slot: int, fault: type[ProtocolError]) -> Load:
        assert self.load is not None  # the table: no slot before a load
        if slot >= self.load.slots:
            raise fault(f"slot {slot} of {self.load.slots}")
        return self.load

    def _forward(self, frame: Forward, fault: type[ProtocolError]) -> None:
        load = self._slot(frame.slot, fault)
        if frame.seq != self.next_seq:
            raise fault(f"forward {frame.seq} where {self.next_seq} is next")
        if len(self._unanswered) == LIMITS.forwards:
            raise fault(f"more than {LIMITS.forwards} forwards unanswered")
        if isinstance(frame.input, Activations) == load.embed:
            raise fault("a stage takes tokens if it has the embedding, hidden states if not")
        if frame.position + frame.rows > load.context:
            raise fault(f"position {frame.position} + {frame.rows} is beyond a context of {load.context}")
        self.next_seq += 1
        self._unanswered.append(frame)

    def _output(self, frame: Output, fault: type[ProtocolError]) -> None:
        assert self.load is not None  # the table: no output before a load
        if not self._unanswered or self._unanswered[0].seq != frame.seq:
            raise fault(f"output {frame.seq} answers no forward, or not the oldest")
        asked = self._unanswered.popleft()
        rows = int(asked.logits) if self.load.head else asked.rows
        if frame.values.rows != rows:
            raise fault(f"output {frame.seq} has {frame.values.rows} rows, not {rows}")

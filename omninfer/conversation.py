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
    CACHING_COORDINATOR,
    CACHING_LENDER,
    COORDINATOR,
    LABEL_TOKENS,
    LENDER,
    LIMITS,
    Activations,
    Cache,
    Drop,
    Fork,
    Forward,
    Frame,
    Held,
    Keep,
    Load,
    Output,
    Ping,
    Pong,
    Recall,
    Trim,
    name_of,
)
from omninfer.prefixes import STEP, room_for
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
    "cache": {_I: _I},
    "fork": {_R: _R},
    "recall": {_R: _R},
    "keep": {_R: _R},
    "ping": {_I: _I, _A: _A, _L: _L, _R: _R},
    "bye": {_I: _O, _A: _O, _L: _O, _R: _O},
    # from the lender
    "profile": {_A: _I},
    "refuse": {_A: _I, _L: _I},
    "progress": {_I: _I, _A: _A, _L: _L, _R: _R},  # idle: a beat that an answer overtook
    "ready": {_L: _R},
    "output": {_R: _R},
    "held": {_R: _R},
    "pong": {_I: _I, _A: _A, _L: _L, _R: _R},
    "error": {_I: _O, _A: _O, _L: _O, _R: _O},
}
"""frame → state in which it may come → state afterwards."""


class Conversation:
    """One stream, as one of its sides follows it."""

    def __init__(self, side: Literal["coordinator", "lender"], *, caching: bool = False) -> None:
        """`caching`: of version 1.1.0."""
        self.side = side
        self.caching = caching
        self.cache: Cache | None = None
        """How slots are to be kept, if that was said."""
        self.state = State.IDLE
        self.load: Load | None = None
        """What was asked to be loaded last."""
        self._unanswered: deque[Forward] = deque()
        self._pings: deque[int] = deque()
        self._recalls: deque[Recall] = deque()
        self._void: set[int] = set()
        """Slots that were emptied after their recall, whose answer is still to come."""
        self._rooms: dict[int, int] = {}
        """Tokens that each slot which is not empty has memory for."""
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

    @property
    def room_left(self) -> int:
        """Tokens that one more slot may take memory for."""
        assert self.load is not None  # asked about slots, after a load
        used = sum(self._rooms.values())
        left = self.load.context if self.cache is None else self.cache.tokens - used
        return min(self.load.context, left - left % STEP if left < self.load.context else left)

    def room(self, slot: int) -> int:
        """Tokens that a slot takes memory for."""
        return self._rooms.get(slot, 0)

    def _follow(self, frame: Frame, fault: type[ProtocolError]) -> None:
        name = name_of(frame)
        known = name in self.accepts("coordinator") | self.accepts("lender")
        after = TABLE[name].get(self.state) if known else None
        if after is None:
            raise fault(f"a {name!r} frame in state {self.state.value}")
        match frame:
            case Forward():
                self._forward(frame, fault)
            case Output():
                self._output(frame, fault)
            case Load():
                self.load = frame
            case Cache():
                self.cache = frame
            case Drop(slot):
                self._slot(slot, fault)
                self._rooms.pop(slot, None)
                self._void |= {slot} & {asked.slot for asked in self._recalls}
            case Trim(slot):
                self._slot(slot, fault)
            case Fork() | Recall() | Held() | Keep():
                self._caching(frame, fault)
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

    def accepts(self, side: Literal["coordinator", "lender"]) -> frozenset[str]:
        """Names of the frames that `side` sends in this version."""
        if side == "coordinator":
            return CACHING_COORDINATOR if self.caching else COORDINATOR
        return CACHING_LENDER if self.caching else LENDER

    def _caching(self, frame: Fork | Recall | Held | Keep, fault: type[ProtocolError]) -> None:
        load = self._slot(frame.slot, fault)
        match frame:
            case Fork(slot, into, length):
                self._slot(into, fault)
                self._empty(into, fault)
                if length > self._rooms.get(slot, 0):
                    raise fault(f"slot {slot} holds no {length} tokens")
                self._grow(into, length, load, fault)
            case Recall(slot):
                self._empty(slot, fault)
                if len(self._recalls) == LIMITS.slots:
                    raise fault(f"more than {LIMITS.slots} recalls unanswered")
                self._recalls.append(frame)
            case Held(slot, length):
                asked = self._recalls.popleft() if self._recalls else None
                if asked is None or asked.slot != slot or length > len(asked.labels) * LABEL_TOKENS:
                    raise fault(f"{length} tokens held in slot {slot} answer no recall")
                if slot in self._void:
                    self._void.discard(slot)
                else:
                    self._grow(slot, length, load, fault)
            case Keep(slot, labels):
                if len(labels) * LABEL_TOKENS > self._rooms.get(slot, 0):
                    raise fault(f"{len(labels)} labels are more than slot {slot} holds")

    def _empty(self, slot: int, fault: type[ProtocolError]) -> None:
        if slot in self._rooms or slot in self._recalled:
            raise fault(f"slot {slot} is not empty")

    @property
    def _recalled(self) -> set[int]:
        """Slots of which it is not known yet what they hold."""
        return {asked.slot for asked in self._recalls} - self._void

    def _grow(self, slot: int, length: int, load: Load, fault: type[ProtocolError]) -> None:
        """Count the memory of a slot that is to hold `length` tokens."""
        if length > load.context:
            raise fault(f"{length} tokens are beyond a context of {load.context}")
        if length:
            self._rooms[slot] = max(self._rooms.get(slot, 0), room_for(length, load.context))
        if self.cache is not None and sum(self._rooms.values()) > self.cache.tokens:
            raise fault(
                f"slots of {sum(self._rooms.values())} tokens, and {self.cache.tokens} were asked for"
            )

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
        if frame.slot in self._recalled:
            raise fault(f"slot {frame.slot} is being recalled")
        self._grow(frame.slot, frame.position + frame.rows, load, fault)
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

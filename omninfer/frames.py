"""The frames of `/omni/pipeline`, 1.0.0 and 1.1.0: what they say, and limits (spec/06-pipeline, "Frames").

Pure values. Their bytes are `omninfer.framing`'s, which may come when is `omninfer.conversation`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omninfer.arch import MAX_CONTEXT, MAX_LAYERS, MAX_VOCAB, KVKind
from omnistore import dagcbor
from omnistore.block import Block
from omnistore.cid import CID
from omnistore.net.interface import Provider

PROTOCOL: Final = "/omni/pipeline/1.0.0"
CACHING: Final = "/omni/pipeline/1.1.0"
"""The same, and frames about what slots hold: `Cache`, `Fork`, `Recall`, `Keep`, `Held`."""
LABEL_TOKENS: Final = 64
"""Tokens that one label stands for."""
LABEL_SIZE: Final = 16
"""Bytes of a label."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one side may send to the other. Both sides of version 1.0.0 know these numbers."""

    frame: int = 64 << 10
    """Bytes of one frame without length and payload: 1024 tokens take 5 KiB, a full `load` 40 KiB."""
    payload: int = 64 << 20
    """Bytes of activations behind a frame: 1024 tokens of a model of width 16384."""
    rows: int = 1024
    """Tokens of one forward: enough to keep any machine busy; longer prompts go in pieces."""
    columns: int = MAX_VOCAB
    """Numbers of one row: logits are the widest."""
    forwards: int = 16
    """Forwards of one stream that may be unanswered: pieces of a prompt following each other."""
    slots: int = 64
    """KV caches of one stage for one coordinator."""
    context: int = MAX_CONTEXT
    """Tokens that a slot holds."""
    tokens: int = 1 << 31
    """Tokens that all slots hold together: 64 slots of any context."""
    labels: int = 2048
    """Labels of a slot's beginning, 64 tokens each: 131,072 tokens in 35 KiB."""
    layers: int = MAX_LAYERS
    providers: int = 16
    """Peers that a `load` names as holding the model."""
    addresses: int = 16
    """Addresses of one provider."""
    address: int = 256
    """Characters of an address or peer ID."""
    text: int = 512
    """Characters of a reason or remedy: a line for a person."""
    ping: int = 1 << 20
    """Bytes that a `ping` or `pong` carries: what a link's bandwidth is measured with."""
    number: int = 1 << 53
    """Byte counts and sequence numbers stay below: every language's integers reach it."""


LIMITS: Final = Limits()

LENDERS: Final = Block.node(dagcbor.encode({"omni": "compute"})).cid
"""What lenders announce in the DHT, so that coordinators find them."""

PHASES: Final = frozenset({"fetch", "load", "compute"})
REFUSALS: Final = frozenset({"not-allowed", "memory", "engine", "model", "fetch", "busy"})

Tokens: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Activations:
    """Rows of float32, as they travel."""

    rows: int
    columns: int
    data: bytes
    """rows × columns little-endian float32."""

    @classmethod
    def of(cls, array: NDArray[np.float32]) -> Activations:
        """Wrap a two-dimensional array."""
        rows, columns = array.shape
        return cls(rows, columns, np.ascontiguousarray(array, dtype="<f4").tobytes())

    def array(self) -> NDArray[np.float32]:
        """[rows, columns], read-only."""
        flat = np.frombuffer(self.data, dtype="<f4")
        return flat.reshape(self.rows, self.columns).astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class Ask:
    """Coordinator: what could you lend, computing with this engine?"""

    engine: str


@dataclass(frozen=True, slots=True)
class Load:
    """Coordinator: hold this range of this model for me."""

    model: CID
    first: int
    last: int
    """Exclusive."""
    embed: bool
    head: bool
    engine: str
    context: int
    slots: int
    providers: tuple[Provider, ...]
    """Peers to fetch it from, beside whoever the lender knows or finds."""


@dataclass(frozen=True, slots=True)
class Forward:
    """Coordinator: append these to a slot and answer what comes out."""

    seq: int
    """Counts up from 0 on a stream; the `output` repeats it."""
    slot: int
    position: int
    """Tokens the slot must already hold."""
    input: Tokens | Activations
    logits: bool
    """From a stage with the head: answer the last token's logits, or nothing."""

    @property
    def rows(self) -> int:
        """Tokens that are appended."""
        return self.input.rows if isinstance(self.input, Activations) else len(self.input)


@dataclass(frozen=True, slots=True)
class Trim:
    """Coordinator: forget all but the first tokens of a slot. Not answered."""

    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Coordinator: empty a slot. Not answered."""

    slot: int


@dataclass(frozen=True, slots=True)
class Cache:
    """Coordinator, before `load`: how its slots are to be kept. 1.1.0."""

    tokens: int
    """Most that the slots hold together, each counted as the specification says."""
    kv: KVKind


@dataclass(frozen=True, slots=True)
class Fork:
    """Coordinator: copy the first tokens of a slot into an empty one. Not answered. 1.1.0."""

    slot: int
    into: int
    length: int


@dataclass(frozen=True, slots=True)
class Recall:
    """Coordinator: fill an empty slot with what was kept under the most of these labels. 1.1.0."""

    slot: int
    labels: tuple[bytes, ...]
    """One for each `LABEL_TOKENS` tokens, which stands for all tokens up to its end."""


@dataclass(frozen=True, slots=True)
class Keep:
    """Coordinator: when the stream ends, keep a slot's labelled beginning for me. Not answered. 1.1.0."""

    slot: int
    labels: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Ping:
    """Coordinator: answer with a `pong` of as many bytes."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Bye:
    """Coordinator: nothing more will come; let go of everything that is mine."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Lender: answers `ask`."""

    engine: str
    memory: int
    """Bytes that it lends now."""
    speed: int
    """Packed weight bytes a second that it multiplies with one token."""
    footprint: int
    """Thousandths of a byte of memory that one packed byte takes once loaded."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Lender: still at work. Sent at least every second while it fetches, loads or computes."""

    phase: str
    """One of `PHASES`."""
    done: int
    total: int
    """Bytes; both 0 while computing."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Lender: the stage is loaded."""

    size: int
    """Packed bytes of its weights."""
    fetched: int
    """Bytes that had to come over the network for it."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Lender: answers `ask` or `load`; the stream goes on."""

    code: str
    """One of `REFUSALS`."""
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Output:
    """Lender: answers one forward, in order."""

    seq: int
    values: Activations
    """Hidden states, a row a token; from a stage with the head, logits: one row, or none if not asked for."""


@dataclass(frozen=True, slots=True)
class Held:
    """Lender: answers `recall`. 1.1.0."""

    slot: int
    length: int
    """Tokens that the slot holds now: a multiple of `LABEL_TOKENS`, 0 for none."""


@dataclass(frozen=True, slots=True)
class Pong:
    """Lender: answers `ping`."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Error:
    """Lender: the stream ends here, and why."""

    reason: str


FromCoordinator: TypeAlias = Ask | Cache | Load | Forward | Trim | Drop | Fork | Recall | Keep | Ping | Bye
FromLender: TypeAlias = Profile | Progress | Ready | Refuse | Output | Held | Pong | Error
Frame: TypeAlias = FromCoordinator | FromLender

COORDINATOR: Final = frozenset({"ask", "load", "forward", "trim", "drop", "ping", "bye"})
"""Names of what a coordinator sends in 1.0.0."""
LENDER: Final = frozenset({"profile", "progress", "ready", "refuse", "output", "pong", "error"})
"""Names of what a lender sends in 1.0.0."""
CACHING_COORDINATOR: Final = COORDINATOR | {"cache", "fork", "recall", "keep"}
CACHING_LENDER: Final = LENDER | {"held"}
"""The same in 1.1.0."""


def name_of(frame: Frame) -> str:
    """The frame's name on the wire."""
    return type(frame).__name__.lower()

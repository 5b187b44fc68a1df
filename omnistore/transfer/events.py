"""What happens to a session and what it commands: the vocabulary of `session.Session`. Pure values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from omnistore.cid import CID
from omnistore.transfer.demand import Wanted

# --- events ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WantsAdded:
    """These blocks are wanted from now on."""

    part: CID | None
    """The part they are of; None for nodes, which every peer is assumed to hold until it says `missing`."""
    blocks: tuple[Wanted, ...]
    """All links of the part, in its order, or the nodes."""
    wanted: int
    """Mask of those that are wanted; 0 only asks peers what they hold."""
    urgent: bool = False
    """Wanted before what is not: somebody waits for this part."""


@dataclass(frozen=True, slots=True)
class PartsNamed:
    """Blocks of these parts will be wanted, once it is known which: peers can be asked what they hold."""

    parts: tuple[CID, ...]


@dataclass(frozen=True, slots=True)
class PeerJoined:
    """A stream to a peer is open and its hello arrived."""

    peer: str
    asks: int
    queries: int


@dataclass(frozen=True, slots=True)
class PeerLeft:
    """The stream to a peer ended, whoever ended it."""

    peer: str


@dataclass(frozen=True, slots=True)
class PeerBroke:
    """A peer broke the protocol."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class HoldsReceived:
    """A peer said which blocks of a part it holds."""

    peer: str
    part: CID
    blocks: bytes | None


@dataclass(frozen=True, slots=True)
class BytesReceived:
    """A peer showed life in mid-block, or it is our own side that holds it up."""

    peer: str
    held_up: bool = False
    """Nothing is received from it for now: our own disk is behind."""


@dataclass(frozen=True, slots=True)
class BlockReceived:
    """All bytes of a block arrived; they are not verified yet."""

    peer: str
    cid: CID
    size: int


@dataclass(frozen=True, slots=True)
class MissingReceived:
    """A peer will not send these blocks."""

    peer: str
    cids: tuple[CID, ...]


@dataclass(frozen=True, slots=True)
class BlockVerified:
    """A block that `Verify` was commanded for matched its CID and is kept."""

    cid: CID


@dataclass(frozen=True, slots=True)
class BlockRefused:
    """A block that `Verify` was commanded for is not what its CID says."""

    peer: str
    cid: CID


@dataclass(frozen=True, slots=True)
class SourcesExhausted:
    """No peer can join any more: there is no discovery, and every given peer is banned."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed. Sent every tenth of a second or so while anything is wanted."""


Event: TypeAlias = (
    WantsAdded
    | PartsNamed
    | PeerJoined
    | PeerLeft
    | PeerBroke
    | HoldsReceived
    | BytesReceived
    | BlockReceived
    | MissingReceived
    | BlockVerified
    | BlockRefused
    | SourcesExhausted
    | Tick
)

# --- commands -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendWant:
    """Ask the peer for these blocks."""

    peer: str
    blocks: tuple[Wanted, ...]


@dataclass(frozen=True, slots=True)
class SendCancel:
    """Tell the peer that these blocks are no longer needed from it."""

    peer: str
    cids: tuple[CID, ...]


@dataclass(frozen=True, slots=True)
class AskHave:
    """Ask the peer which blocks of these parts it holds."""

    peer: str
    parts: tuple[CID, ...]


@dataclass(frozen=True, slots=True)
class Verify:
    """Check the block just received and keep it; answer with `BlockVerified` or `BlockRefused`."""

    peer: str
    cid: CID


@dataclass(frozen=True, slots=True)
class DropPeer:
    """Reset the stream to the peer. A banned peer is not dialled again; another may come back later."""

    peer: str
    reason: str
    banned: bool


@dataclass(frozen=True, slots=True)
class Done:
    """Everything wanted so far is verified."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The session is over: nobody delivers what is missing."""

    kind: Literal["no-providers", "timed-out"]
    missing: tuple[CID, ...]


Command: TypeAlias = SendWant | SendCancel | AskHave | Verify | DropPeer | Done | Failed

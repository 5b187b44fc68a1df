"""`Block`: verified bytes and their CID. Holding one is the proof that its digest was checked."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import Final

from blake3 import blake3

from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.errors import DigestMismatch

BLOCK_SIZE: Final = 1 << 20
"""Payload of the blocks we cut, in bytes (the last of an extent is shorter)."""
MAX_BLOCK_SIZE: Final = 2 << 20
"""Largest block we accept from anybody, in bytes: what other IPFS implementations accept."""

_seal: Final = object()


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes whose BLAKE3-256 digest is the one in `cid`. Made only by the class methods."""

    cid: CID
    data: bytes | memoryview
    _proof: InitVar[object]

    def __post_init__(self, _proof: object) -> None:
        if _proof is not _seal:
            raise TypeError("a Block is made by Block.raw, Block.node or Block.verify_untrusted")

    @classmethod
    def raw(cls, data: bytes | memoryview) -> Block:
        """Address weights or header bytes (codec `raw`)."""
        return cls(CID.of_digest(RAW, blake3(data).digest()), data, _seal)

    @classmethod
    def node(cls, data: bytes) -> Block:
        """Address an encoded dag-cbor node."""
        return cls(CID.of_digest(DAG_CBOR, blake3(data).digest()), data, _seal)

    @classmethod
    def verify_untrusted(cls, cid: CID, data: bytes | memoryview) -> Block:
        """Check `data` against the CID it was asked under. Raises `DigestMismatch`."""
        if len(data) > MAX_BLOCK_SIZE:
            raise DigestMismatch(f"block {cid} has {len(data)} bytes; at most {MAX_BLOCK_SIZE} are allowed")
        if blake3(data).digest() != cid.digest:
            raise DigestMismatch(f"{len(data)} bytes do not match block {cid}")
        return cls(cid, data, _seal)

    def kept(self) -> Block:
        """The same in memory of its own, for whoever keeps what lay in a lent buffer."""
        return Block(self.cid, bytes(self.data), _seal)

    def __len__(self) -> int:
        return len(self.data)

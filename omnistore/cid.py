"""Content identifiers: the one CIDv1 profile of spec/01-cid.

A `CID` is 36 bytes: version 1, codec (`raw` 0x55 or `dag-cbor` 0x71), multihash BLAKE3-256 (0x1e,
length 32). Hot paths compare those bytes; text (multibase base32, lower case) is for people.
Other multihashes, codecs and CID versions are refused: nothing here could verify them.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Final

from omnistore.errors import MalformedCID

RAW: Final = 0x55
"""Multicodec of opaque bytes: weights and headers."""
DAG_CBOR: Final = 0x71
"""Multicodec of deterministic CBOR with links: parts, manifests, signed manifests."""

DIGEST_SIZE: Final = 32
CID_SIZE: Final = 36

_PREFIX_OF_CODEC: Final = {codec: bytes((0x01, codec, 0x1E, DIGEST_SIZE)) for codec in (RAW, DAG_CBOR)}
_PREFIXES: Final = frozenset(_PREFIX_OF_CODEC.values())
_TEXT_SIZE: Final = 59
"""Characters of a CID of this profile, its multibase prefix included."""
_TEXT_LIMIT: Final = 256
"""Longest text looked at, in characters."""
_BASE32: Final = re.compile("b[a-z2-7]*|B[A-Z2-7]*")
"""Multibase base32, or base32upper (QR codes); never a mixture, never a letter outside ASCII."""


@dataclass(frozen=True, slots=True, order=True)
class CID:
    """A content identifier of this project's profile; hashable, ordered by its bytes.

    Build one with `of_digest` or parse one with `parse_untrusted` / `from_bytes_untrusted`;
    the plain constructor trusts its argument.
    """

    binary: bytes
    """The 36 bytes of the binary form."""

    def __hash__(self) -> int:
        # Sets of a quarter of a million are common, and bytes know their hash.
        return hash(self.binary)

    @classmethod
    def of_digest(cls, codec: int, digest: bytes) -> CID:
        """The CID of a BLAKE3-256 `digest` (32 bytes) under `codec` (`RAW` or `DAG_CBOR`)."""
        return cls(_PREFIX_OF_CODEC[codec] + digest)

    @classmethod
    def from_bytes_untrusted(cls, data: bytes) -> CID:
        """Check and wrap a binary CID. Raises `MalformedCID`."""
        if len(data) != CID_SIZE or data[:4] not in _PREFIXES:
            raise MalformedCID(
                f"not a CIDv1 of BLAKE3-256 with codec raw or dag-cbor: {data[:8].hex()}… ({len(data)} bytes)"
            )
        return cls(bytes(data))

    @classmethod
    def parse_untrusted(cls, text: str) -> CID:
        """Parse what a person pasted: base32 text, perhaps behind `ipfs://` or `/ipfs/`.

        Raises `MalformedCID` saying what the text looks like instead.
        """
        bare = text.strip().removeprefix("ipfs://").removeprefix("/ipfs/")
        shown = bare if len(bare) <= 80 else bare[:77] + "…"
        if bare[:1] not in ("b", "B") or len(bare) > _TEXT_LIMIT:
            raise MalformedCID(f"{shown!r} is not a CID this network uses", remedy=_explain(bare))
        body = bare[1:].upper()
        if not _BASE32.fullmatch(bare):
            raise MalformedCID(f"{shown!r} is not base32", remedy=_explain(""))
        if len(body) % 8 in (1, 3, 6):
            raise MalformedCID(
                f"{shown!r} has {len(bare)} characters, and a CID of this network {_TEXT_SIZE}",
                remedy="Copy the whole CID.",
            )
        data = base64.b32decode(body + "=" * (-len(body) % 8))
        if base64.b32encode(data).rstrip(b"=") != body.encode():
            raise MalformedCID(f"{shown!r} is not canonical base32 (stray bits at its end)")
        if len(data) != CID_SIZE or data[:4] not in _PREFIXES:
            raise MalformedCID(f"{shown!r} is a CID of another profile", remedy=_explain(bare))
        return cls(data)

    @property
    def codec(self) -> int:
        """`RAW` or `DAG_CBOR`."""
        return self.binary[1]

    @property
    def digest(self) -> bytes:
        """The BLAKE3-256 digest, 32 bytes."""
        return self.binary[4:]

    @property
    def multihash(self) -> bytes:
        """The multihash, 34 bytes: what the DHT's provider records are keyed by."""
        return self.binary[2:]

    def __str__(self) -> str:
        return "b" + base64.b32encode(self.binary).decode("ascii").rstrip("=").lower()

    def __repr__(self) -> str:
        return f"CID({self})"


def _explain(text: str) -> str:
    """Say what a text that is no CID of ours probably is."""
    wanted = "A model's CID starts with 'bafyr4i' (dag-cbor, BLAKE3-256); `omni add` prints it."
    if text.startswith("Qm") and len(text) == 46:
        return f"It is a CIDv0 (SHA-256). {wanted}"
    if text.startswith("12D3Koo"):
        return f"It is a peer ID. {wanted}"
    if text.startswith(("z", "f", "m", "u", "k", "b", "B")) and len(text) <= _TEXT_LIMIT:
        # multiformats costs 60 ms to import and only ever explains a mistake here.
        from multiformats import CID as AnyCID

        try:
            other = AnyCID.decode(text)
        except (ValueError, LookupError, TypeError, AssertionError):
            return wanted
        return f"It is a CIDv{other.version} with {other.codec.name} and {other.hashfun.name}. {wanted}"
    return wanted

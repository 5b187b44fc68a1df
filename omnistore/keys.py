"""Ed25519 keys, peer IDs and signed envelopes (libp2p peer-ids spec; libp2p RFC 0002).

Pure: reading and creating the key file is `omnistore.config`'s. Nothing here imports libp2p, so a
manifest can be checked without a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from omnistore.errors import BadConfig, BadSignature

PUBLIC_KEY_PREFIX: Final = bytes((0x08, 0x01, 0x12, 0x20))
"""Protobuf of libp2p's PublicKey{Type: Ed25519, Data: 32 bytes}, up to the data."""
SEED_SIZE: Final = 32

_FIELD: Final = 2**255 - 19
# y of the points of order 1, 2, 4 and 8. A key there has signatures that verify for most messages,
# so "signed by" would mean nobody; libraries differ in whether they notice.
_SMALL_ORDER: Final = frozenset(
    {
        0,
        1,
        _FIELD - 1,
        2707385501144840649318225287225658788936804267575313519463743609750303402022,
        _FIELD - 2707385501144840649318225287225658788936804267575313519463743609750303402022,
    }
)

_BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """An Ed25519 public key."""

    raw: bytes
    """32 bytes."""

    @classmethod
    def from_protobuf_untrusted(cls, data: bytes) -> PublicKey:
        """Parse libp2p's protobuf form; any key type but Ed25519 is refused with `BadSignature`."""
        if len(data) != len(PUBLIC_KEY_PREFIX) + 32 or not data.startswith(PUBLIC_KEY_PREFIX):
            raise BadSignature(
                "the publisher's key is not an Ed25519 public key in libp2p's protobuf form",
                remedy="Only Ed25519 publishers are supported.",
            )
        raw = bytes(data[len(PUBLIC_KEY_PREFIX) :])
        y = int.from_bytes(raw, "little") & (1 << 255) - 1
        if y >= _FIELD or y in _SMALL_ORDER:
            raise BadSignature("the publisher's key is not one that anybody can hold: a point of small order")
        return cls(raw)

    @property
    def protobuf(self) -> bytes:
        """libp2p's protobuf form, 36 bytes."""
        return PUBLIC_KEY_PREFIX + self.raw

    @property
    def peer_id(self) -> str:
        """The libp2p peer ID: base58btc of the identity multihash of the protobuf form."""
        return base58(bytes((0x00, len(self.protobuf))) + self.protobuf)

    def verify_untrusted(self, signature: bytes, *, domain: str, payload_type: bytes, payload: bytes) -> None:
        """Check an envelope's signature (RFC 0002). Raises `BadSignature`."""
        signed = envelope_bytes(domain, payload_type, payload)
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, signed)
        except (InvalidSignature, ValueError):
            raise BadSignature(f"the signature of {self.peer_id} does not verify") from None


class PrivateKey:
    """An Ed25519 private key. Its `repr` never shows it."""

    __slots__ = ("_key", "public")

    def __init__(self, seed: bytes) -> None:
        """`seed`: 32 secret bytes (RFC 8032). Raises `BadConfig` for any other length."""
        if len(seed) != SEED_SIZE:
            raise BadConfig(f"an Ed25519 seed has {SEED_SIZE} bytes, not {len(seed)}")
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = PublicKey(self._key.public_key().public_bytes_raw())

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes, for the key file and for libp2p's handshake only."""
        return self._key.private_bytes_raw()

    def sign(self, *, domain: str, payload_type: bytes, payload: bytes) -> bytes:
        """The 64-byte signature of a signed envelope (RFC 0002)."""
        return self._key.sign(envelope_bytes(domain, payload_type, payload))

    def __repr__(self) -> str:
        return f"PrivateKey(<secret of {self.public.peer_id}>)"


def envelope_bytes(domain: str, payload_type: bytes, payload: bytes) -> bytes:
    """What an envelope's signature covers: each of the three, length-prefixed (RFC 0002)."""
    fields = (domain.encode(), payload_type, payload)
    return b"".join(_uvarint(len(field)) + field for field in fields)


def _uvarint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def base58(data: bytes) -> str:
    """base58btc, for peer IDs (the libraries that have it cost 60 ms to import)."""
    number = int.from_bytes(data, "big")
    text = ""
    while number:
        number, digit = divmod(number, 58)
        text = _BASE58[digit] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text

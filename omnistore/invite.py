"""Invitations to a private swarm, and their text form (pure; spec/08-private-swarms §2).

A token holds the swarm's secret: whoever reads it can join until the swarm gets another key. It is
deterministic dag-cbor signed by the inviter, as base32 behind a prefix, with a checksum for mistakes in
copying. Storing a membership is `membership`'s; what the key does on a wire is `net.private`'s.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from typing import Any, Final

from blake3 import blake3

from omnistore import dagcbor
from omnistore.errors import BadConfig, BadSignature, InputError
from omnistore.keys import PrivateKey, PublicKey

FORMAT_VERSION: Final = 1
PREFIX: Final = "omniswarm1"
SIGNATURE_DOMAIN: Final = "omni-invite"
SIGNATURE_PAYLOAD_TYPE: Final = b"/omni/invite/1"
PSK_SIZE: Final = 32
CHECKSUM_SIZE: Final = 4
MAX_ADDRESSES: Final = 16
"""Bootstrap addresses in a token: people paste it."""
MAX_ADDRESS: Final = 256
"""Characters of an address; a DNS name has at most 253."""
MAX_TOKEN: Final = 8192
"""Bytes of a token's body; sixteen addresses of the longest kind need under 5 KiB."""
MAX_NUMBER: Final = 1 << 53

_FIELDS: Final = frozenset({"omni", "psk", "bootstrap", "not-after", "inviter", "signature"})


@dataclass(frozen=True, slots=True)
class Invitation:
    """An invitation whose signature was checked, or made here."""

    psk: bytes = field(repr=False)
    """The swarm's pre-shared key, 32 bytes: a secret."""
    bootstrap: tuple[str, ...]
    """Multiaddrs ending in `/p2p/…`."""
    not_after: int
    """Unix seconds; afterwards it is refused."""
    inviter: PublicKey
    signature: bytes

    def encode(self) -> str:
        """The token."""
        signed = _signed_fields(self.psk, self.bootstrap, self.not_after)
        body = dagcbor.encode({**signed, "inviter": self.inviter.protobuf, "signature": self.signature})
        text = base64.b32encode(body + _checksum(body)).decode("ascii")
        return PREFIX + text.rstrip("=").lower()


def invite(key: PrivateKey, psk: bytes, bootstrap: tuple[str, ...], not_after: int) -> Invitation:
    """Make an invitation. Raises `InputError` for what can not be in one."""
    if len(psk) != PSK_SIZE or not 0 < not_after < MAX_NUMBER:
        raise InputError(f"a pre-shared key has {PSK_SIZE} bytes, and an expiry is a time")
    if len(bootstrap) > MAX_ADDRESSES or any(len(addr) > MAX_ADDRESS for addr in bootstrap):
        raise InputError(f"an invitation names at most {MAX_ADDRESSES} addresses")
    payload = dagcbor.encode(_signed_fields(psk, bootstrap, not_after))
    signature = key.sign(domain=SIGNATURE_DOMAIN, payload_type=SIGNATURE_PAYLOAD_TYPE, payload=payload)
    return Invitation(psk, bootstrap, not_after, key.public, signature)


def token_untrusted(text: str, now: float) -> Invitation:
    """The invitation in a token, its signature and expiry checked. Raises `BadConfig`."""
    bare = "".join(text.split())
    if not bare.lower().startswith(PREFIX):
        raise BadConfig("this is no invitation", remedy=f"It begins with {PREFIX}; `omni invite` prints it.")
    letters = bare[len(PREFIX) :].upper()
    if len(letters) > 2 * MAX_TOKEN:
        raise BadConfig(f"an invitation of {len(bare)} characters is too long to be one")
    try:
        data = base64.b32decode(letters + "=" * (-len(letters) % 8))
    except (binascii.Error, ValueError):
        raise _damaged() from None
    body, checksum = data[:-CHECKSUM_SIZE], data[-CHECKSUM_SIZE:]
    # Compared as text: the last letter of base32 may have bits to spare.
    if checksum != _checksum(body) or base64.b32encode(data).rstrip(b"=").decode() != letters:
        raise _damaged()
    invitation = _opened(body)
    if invitation.not_after < now:
        raise BadConfig(
            "the invitation has expired",
            remedy="Ask for a new one; `omni invite --expires` says for how long it is good.",
        )
    return invitation


def _opened(body: bytes) -> Invitation:
    node = dagcbor.decode_untrusted(body, limit=MAX_TOKEN, error=BadConfig, what="the invitation")
    if not isinstance(node, dict) or type(node.get("omni")) is not int or node["omni"] != FORMAT_VERSION:
        raise BadConfig("the invitation is of a version not known here", remedy="A newer omni may read it.")
    if node.keys() != _FIELDS:
        raise BadConfig("the invitation has other fields than its own")
    psk, not_after, signature = node["psk"], node["not-after"], node["signature"]
    if not isinstance(psk, bytes) or len(psk) != PSK_SIZE:
        raise BadConfig(f"the invitation's key has not {PSK_SIZE} bytes")
    if type(not_after) is not int or not 0 < not_after < MAX_NUMBER:
        raise BadConfig("the invitation's expiry is no time")
    bootstrap = _addresses(node["bootstrap"])
    if not isinstance(node["inviter"], bytes) or not isinstance(signature, bytes) or len(signature) != 64:
        raise BadConfig("the invitation's inviter and signature are no byte strings of their lengths")
    payload = dagcbor.encode(_signed_fields(psk, bootstrap, not_after))
    try:
        inviter = PublicKey.from_protobuf_untrusted(node["inviter"])
        inviter.verify_untrusted(
            signature, domain=SIGNATURE_DOMAIN, payload_type=SIGNATURE_PAYLOAD_TYPE, payload=payload
        )
    except BadSignature as error:
        raise BadConfig(f"the invitation is forged: {error.message}") from None
    return Invitation(psk, bootstrap, not_after, inviter, signature)


def _addresses(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_ADDRESSES:
        raise BadConfig(f"the invitation's addresses are no list of at most {MAX_ADDRESSES}")
    if not all(isinstance(addr, str) and len(addr) <= MAX_ADDRESS for addr in value):
        raise BadConfig(f"an address of the invitation is no text of at most {MAX_ADDRESS} characters")
    return tuple(value)


def _signed_fields(psk: bytes, bootstrap: tuple[str, ...], not_after: int) -> dict[str, dagcbor.Value]:
    """What the signature covers."""
    return {"omni": FORMAT_VERSION, "psk": psk, "bootstrap": list(bootstrap), "not-after": not_after}


def _checksum(body: bytes) -> bytes:
    return bytes(blake3(body).digest()[:CHECKSUM_SIZE])


def _damaged() -> BadConfig:
    return BadConfig("the invitation is damaged: its checksum is wrong", remedy="Copy the whole of it.")

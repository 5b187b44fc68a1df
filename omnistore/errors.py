"""The one tree of errors that the product raises on purpose.

    OmniError
    ├── InputError          what a person or a file gave us is wrong
    │   ├── MalformedCID
    │   ├── MalformedGGUF
    │   ├── UnsupportedGGUF
    │   └── BadConfig
    ├── IntegrityError
    │   └── DigestMismatch  bytes do not match the CID they were asked under
    ├── TrustError
    │   ├── MalformedManifest
    │   ├── BadSignature
    │   ├── UnknownSigner
    │   └── BadNameRecord
    ├── StoreError
    │   ├── BlockMissing
    │   ├── StoreFull
    │   ├── StoreLocked
    │   └── SourceChanged   a file referenced in place moved or changed
    ├── ProtocolError
    │   ├── LocalProtocolError   our bug
    │   └── RemoteProtocolError  theirs: drop the peer
    ├── NetworkError
    │   ├── NoProviders
    │   ├── PeerUnreachable
    │   └── FetchTimedOut
    └── InferenceError
        ├── PlanInfeasible
        ├── StageLost
        └── UnsupportedModel

Each class carries the exit code of the command line (`exit_code`) and the status of the HTTP
API (`http_status`). A message names the culprit (file, peer, argument) and, in `remedy`, what
to do about it. The command line catches `OmniError` once, in `omnistore.cli.main`; everything
else that escapes is a bug and exits with 1. Errors of other libraries are translated where
their library is called.
"""

from __future__ import annotations

from typing import ClassVar


class OmniError(Exception):
    """Base of every error raised on purpose.

    `remedy`, when given, is one sentence that tells a person what to do next.
    """

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def diagnosis(self) -> str:
        """The message and its remedy, as the command line prints them."""
        return self.message if self.remedy is None else f"{self.message}\n  {self.remedy}"


class InputError(OmniError):
    """An argument, a configuration value or an input file is wrong."""

    exit_code = 2
    http_status = 400


class MalformedCID(InputError):
    """A text or byte string is not a CID of the profile of spec/01-cid."""


class MalformedGGUF(InputError):
    """A file claims to be GGUF but breaks the format."""

    exit_code = 3
    http_status = 422


class UnsupportedGGUF(InputError):
    """A valid GGUF file that uses something we do not read (big-endian, version 1, …)."""

    exit_code = 3
    http_status = 422


class BadConfig(InputError):
    """A configuration value, an address or an environment variable is unusable."""


class IntegrityError(OmniError):
    """Bytes are not what their address says."""

    exit_code = 4
    http_status = 502


class DigestMismatch(IntegrityError):
    """The BLAKE3 digest of some bytes is not the one in the CID they were asked under."""


class TrustError(OmniError):
    """A manifest can not be believed."""

    exit_code = 5
    http_status = 403


class MalformedManifest(TrustError):
    """A manifest, signed manifest or part node breaks spec/03-manifest."""


class BadSignature(TrustError):
    """The signature of a signed manifest does not verify under its publisher's key."""


class UnknownSigner(TrustError):
    """The publisher is not one that the caller asked for."""


class BadNameRecord(TrustError):
    """A name's record is malformed, forged, expired, or older than one seen before."""


class StoreError(OmniError):
    """The local store can not do what was asked."""

    exit_code = 6
    http_status = 500


class BlockMissing(StoreError):
    """A block, node or model is not held here."""

    http_status = 404


class StoreFull(StoreError):
    """The disk, or the store's own limit, has no room."""

    http_status = 507


class StoreLocked(StoreError):
    """Another process holds what this one needs to write."""

    exit_code = 7
    http_status = 423


class SourceChanged(StoreError):
    """A file referenced in place was moved, truncated or rewritten."""

    http_status = 410


class ProtocolError(OmniError):
    """A wire protocol was broken."""

    exit_code = 8
    http_status = 502


class LocalProtocolError(ProtocolError):
    """We broke it: a bug in the caller of a protocol core."""


class RemoteProtocolError(ProtocolError):
    """The other side broke it; the peer is to be dropped."""


class NetworkError(OmniError):
    """The network can not deliver."""

    exit_code = 9
    http_status = 504


class NoProviders(NetworkError):
    """Nobody reachable holds what is needed."""

    exit_code = 10


class PeerUnreachable(NetworkError):
    """A peer can not be dialled, or its connection broke."""


class FetchTimedOut(NetworkError):
    """Nothing useful arrived within the deadline."""


class InferenceError(OmniError):
    """A model can not be run."""

    exit_code = 11
    http_status = 503


class PlanInfeasible(InferenceError):
    """The machines at hand can not hold the layers asked for."""


class StageLost(InferenceError):
    """A stage of a running pipeline went away."""


class UnsupportedModel(InferenceError):
    """An architecture, tensor type or tokenizer that no engine here can run."""

    exit_code = 12
    http_status = 501

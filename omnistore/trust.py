"""Publishers known by name: `trust.json` in the home (spec/07-names §4).

A name here is one person's own: it means a peer ID on this machine and nothing anywhere else. Who is not
in it is not distrusted, merely unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from omnistore.dht.names import publisher_untrusted
from omnistore.documents import Document, read_document, update
from omnistore.errors import BadConfig, InputError, UnknownSigner
from omnistore.keys import PublicKey

FILE_NAME: Final = "trust.json"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")


def is_publisher_name(text: str) -> bool:
    """Whether a text could be a publisher's name, or peer ID."""
    return _NAME.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class TrustStore:
    """The publishers that this home's owner knows."""

    home: Path

    def publishers(self) -> dict[str, str]:
        """Name to peer ID, by name. Raises `BadConfig`."""
        return _checked(read_document(self._path), self._path)

    def add(self, name: str, peer_id: str) -> None:
        """Know a publisher by `name`. Raises `InputError`, also when the name means somebody else."""
        if not is_publisher_name(name) or name.startswith("12D3KooW"):
            raise InputError(
                f"{name[:80]!r} can not be a publisher's name",
                remedy="Use 1 to 63 letters, digits, '.', '_', '@' and '-'; not what looks like a peer ID.",
            )
        publisher_untrusted(peer_id)

        def change(document: Document) -> Document:
            known = _checked(document, self._path)
            if known.get(name, peer_id) != peer_id:
                raise InputError(
                    f"{name!r} is {known[name]} already",
                    remedy=f"Run `omni trust rm {name}` first, if that publisher has a new key.",
                )
            return {**known, name: peer_id}

        update(self._path, change)

    def remove(self, name: str) -> None:
        """Forget a publisher. Raises `InputError` when there is none of that name."""

        def change(document: Document) -> Document:
            known = _checked(document, self._path)
            if name not in known:
                raise InputError(
                    f"no publisher is called {name[:80]!r} here", remedy="`omni trust ls` lists them."
                )
            return {other: peer for other, peer in known.items() if other != name}

        update(self._path, change)

    def resolve(self, text: str) -> PublicKey:
        """The publisher that a person means by a peer ID or a name. Raises `UnknownSigner`, `InputError`."""
        known = self.publishers()
        if text in known:
            return publisher_untrusted(known[text])
        if text.startswith("12D3KooW"):
            return publisher_untrusted(text)
        raise UnknownSigner(
            f"no publisher is called {text[:80]!r} here",
            remedy="Give a peer ID, or tell who that is: `omni trust add NAME PEERID`.",
        )

    def describe(self, publisher: PublicKey | None) -> str:
        """Whose signature it is, for people."""
        if publisher is None:
            return "nobody (no signature)"
        names = [name for name, peer in self.publishers().items() if peer == publisher.peer_id]
        return f"{names[0]} ({publisher.peer_id})" if names else f"unknown publisher {publisher.peer_id}"

    @property
    def _path(self) -> Path:
        return self.home / FILE_NAME


def _checked(document: Document, path: Path) -> dict[str, str]:
    """Name to peer ID. Raises `BadConfig`."""
    for name, peer_id in document.items():
        try:
            publisher_untrusted(peer_id if isinstance(peer_id, str) else "")
        except InputError as error:
            raise BadConfig(
                f"{path} is damaged: {name[:80]!r}: {error.message}", remedy=error.remedy
            ) from None
    return dict(sorted(document.items()))

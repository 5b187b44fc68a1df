"""The tree of errors: drawn in the docstring, complete, and with codes that scripts rely on."""

from __future__ import annotations

import re

import pytest

from omnistore import errors
from omnistore.errors import OmniError

CLASSES = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, OmniError)
]
EXIT_CODES = {
    "InputError": 2, "MalformedCID": 2, "BadConfig": 2, "MalformedGGUF": 3, "UnsupportedGGUF": 3,
    "IntegrityError": 4, "DigestMismatch": 4, "TrustError": 5, "MalformedManifest": 5, "BadSignature": 5,
    "UnknownSigner": 5, "BadNameRecord": 5, "StoreError": 6, "BlockMissing": 6, "StoreFull": 6,
    "SourceChanged": 6, "StoreLocked": 7, "ProtocolError": 8, "LocalProtocolError": 8,
    "RemoteProtocolError": 8,
    "NetworkError": 9, "PeerUnreachable": 9, "FetchTimedOut": 9, "NoProviders": 10, "InferenceError": 11,
    "PlanInfeasible": 11, "StageLost": 11, "UnsupportedModel": 12, "OmniError": 1,
}  # fmt: skip


def test_exit_codes_are_pinned() -> None:
    assert {error.__name__: error.exit_code for error in CLASSES} == EXIT_CODES


def test_the_docstring_draws_the_tree() -> None:
    drawn: dict[str, str | None] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ((?:│   |    )*)(├── |└── )?([A-Z]\w+)", line)
        if match and match[3] in EXIT_CODES:
            level = len(match[1]) // 4 + bool(match[2])
            path[level:] = [match[3]]
            drawn[match[3]] = path[level - 1] if level else None
    assert drawn == {
        error.__name__: error.__bases__[0].__name__ if error is not OmniError else None for error in CLASSES
    }


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_class(error: type[OmniError]) -> None:
    assert error.__doc__
    assert 0 < error.exit_code < 64
    assert 400 <= error.http_status < 600
    raised = error("the culprit", remedy="Do this.")
    assert str(raised) == raised.message == "the culprit"
    assert raised.diagnosis() == "the culprit\n  Do this."
    assert error("the culprit").diagnosis() == "the culprit"

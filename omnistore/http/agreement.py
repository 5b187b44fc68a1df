"""What both ends of a home's socket know: where it is, and how an error is told there.

Who asks imports this and `client`, not `local`: a seed is most of omni, and takes 0.1 s to import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from omnistore import errors
from omnistore.errors import OmniError

SOCKET: Final = "api.sock"
"""In the home."""
MAX_PATH: Final = 103
"""Bytes of a socket's name that every system takes."""


def socket_path(home: Path) -> Path:
    """Where a seed of this home answers."""
    return home / SOCKET


def error_document(error: OmniError) -> dict[str, Any]:
    """An error for another process, as the command line prints it with `--json`."""
    return {
        "event": "error",
        "error": type(error).__name__,
        "message": error.message,
        "remedy": error.remedy,
    }


def error_untrusted(document: dict[str, Any]) -> OmniError:
    """The error in a document; an `OmniError` when its class is not one of ours."""
    kind = getattr(errors, str(document.get("error")), None)
    if not (isinstance(kind, type) and issubclass(kind, OmniError)):
        kind = OmniError
    remedy = document.get("remedy")
    return kind(str(document.get("message")), remedy=remedy if isinstance(remedy, str) else None)

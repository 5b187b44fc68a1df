"""Importing py-libp2p without the HTTP clients that one part of it, which we leave off, would bring.

Its hosts can get certificates from a service (AutoTLS): for that it imports two HTTP clients with
everything below them, a fifth of the time that it takes to import and 9 MB.
tests/system/test_upstream.py shows it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, Final

_UNUSED: Final = ("httpx", "requests")


class _Placeholder(ModuleType):
    """Stands for a module while others are imported that only want to name what is in it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def import_libp2p() -> None:
    """Import the library if nobody has; whoever imports one of those clients afterwards gets it."""
    if "libp2p" in sys.modules:
        return
    absent = [name for name in _UNUSED if name not in sys.modules]
    for name in absent:
        sys.modules[name] = _Placeholder(name)
    try:
        importlib.import_module("libp2p")
    finally:
        for name in absent:
            del sys.modules[name]

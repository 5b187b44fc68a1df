"""The life of a wanted block: its states and everything that can happen to it (spec/05-transfer)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final


class BlockState(Enum):
    """Where a wanted block is in its life."""

    WANTED = "wanted"
    ASKED = "asked"
    VERIFYING = "verifying"
    DONE = "done"


TRANSITIONS: Final[Mapping[tuple[BlockState, str], BlockState]] = {
    (BlockState.WANTED, "asked"): BlockState.ASKED,
    (BlockState.WANTED, "arrived"): BlockState.VERIFYING,
    (BlockState.ASKED, "asked"): BlockState.ASKED,
    (BlockState.ASKED, "released"): BlockState.WANTED,
    (BlockState.ASKED, "arrived"): BlockState.VERIFYING,
    (BlockState.VERIFYING, "refused"): BlockState.WANTED,
    (BlockState.VERIFYING, "verified"): BlockState.DONE,
}
"""Everything that can happen to a block; anything else is a bug of the shell."""

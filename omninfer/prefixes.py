"""Which slot a prompt goes into: a table of the tokens that slots hold. Pure: `now` comes in as an argument.

A prompt takes the slot that holds its longest beginning, so that this beginning is not computed twice. The
slot is **continued** where it is idle and little of it would be lost; where another prompt's end would be
lost, a copy of the beginning is **forked** into another slot. Memory comes out of a budget: the idle slots
that were used least recently are emptied until there is room, never one in use, and a slot whose turn it
would be gives its beginning away by being continued instead of copied. (What vLLM calls automatic prefix
caching, with whole prompts instead of pages; as in llama.cpp's server.)

A slot takes memory for the most tokens that it held since it was empty, in steps of `STEP`: engines
grow their caches so, and keep what was trimmed. The table only decides; its owner empties, copies and trims
the real slots, and says what was fed. Implements spec/06-pipeline, section "Prompt cache".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from omnistore.errors import InferenceError, LocalProtocolError

STEP: Final = 256
"""Tokens by which the memory of a slot grows."""
TAIL: Final = 32
"""A slot whose end is shorter than this is continued: computing so few again costs less than a copy."""


def room_for(tokens: int, context: int) -> int:
    """Tokens that a slot of `tokens` has memory for; a slot never holds more than `context`."""
    return min(context, -(-tokens // STEP) * STEP)


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items two sequences begin with together."""
    if len(a) <= len(b) and list(a) == list(b[: len(a)]):
        return len(a)
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a prompt goes: empty `dropped`, then copy `source` or trim `slot`, then feed from `start`."""

    slot: int
    start: int
    """Tokens of the prompt that need not be computed; the last token always is."""
    source: int | None
    """The slot whose first `start` tokens are copied into `slot`, which is empty."""
    lost: int
    """Tokens that `slot` is to be trimmed by."""
    dropped: tuple[int, ...]
    """Slots to be emptied, least recently used first."""


@dataclass(slots=True)
class _Held:
    tokens: list[int] = field(default_factory=list)
    room: int = 0
    used: float = 0.0
    busy: bool = False


class SlotTable:
    """The slots of one pipeline."""

    def __init__(self, slots: int, *, context: int, token_bytes: int, budget: int) -> None:
        """`token_bytes`: keys and values of one token; `budget`: bytes that all slots may take together."""
        self.context = context
        self.token_bytes = token_bytes
        self.budget = budget
        self._held = [_Held() for _ in range(slots)]

    @property
    def bytes(self) -> int:
        """What the slots take."""
        return self.token_bytes * sum(held.room for held in self._held)

    def tokens(self, slot: int) -> Sequence[int]:
        """What a slot holds."""
        return self._held[slot].tokens

    def by_age(self) -> Sequence[int]:
        """The slots that hold something, least recently used first."""
        found = [n for n, held in enumerate(self._held) if held.tokens]
        return sorted(found, key=lambda n: (self._held[n].used, n))

    def place(self, prompt: Sequence[int], now: float) -> Placement:
        """Choose a slot for a prompt, which is in use from now until `release`.

        The slot then counts as holding the first `start` tokens. Raises `InferenceError`, having changed
        nothing, when the prompt does not fit into the budget, or not beside the slots in use.
        """
        room = room_for(len(prompt), self.context)
        self._check_size(len(prompt), room)
        best, start = self._longest(prompt[:-1])
        lost = 0 if best is None else len(self._held[best].tokens) - start
        continued = best is not None and not self._held[best].busy and lost < TAIL
        dropped: list[int] = []
        while True:
            left = [n for n, held in enumerate(self._held) if n not in dropped]
            reused = best if continued else None
            empty = [
                n for n, held in enumerate(self._held) if (n in dropped or not held.room) and not held.busy
            ]
            if (continued or empty) and self._taken(left, reused, room) <= self.budget:
                break
            victim = self._oldest([n for n in left if n != reused])
            if victim is None:
                raise InferenceError(
                    f"{len(prompt)} tokens need a slot, and all {len(self._held)} are in use",
                    remedy="Wait for another prompt to end, or raise kv_memory in config.toml.",
                )
            if victim == best:  # a copy is too dear: its end goes instead, and nothing else need have gone
                continued = True
                dropped.clear()
            else:
                dropped.append(victim)
        return self._enter(prompt[:start], room, best, continued, empty, dropped, now)

    def append(self, slot: int, tokens: Sequence[int]) -> None:
        """Take note of tokens that were fed to a slot in use."""
        held = self._held[slot]
        if not held.busy or len(held.tokens) + len(tokens) > held.room:
            raise LocalProtocolError(f"{len(tokens)} tokens for slot {slot}, which has no room for them")
        held.tokens += tokens

    def release(self, slot: int, now: float) -> None:
        """A slot is no longer in use; it keeps what it holds."""
        held = self._held[slot]
        held.busy, held.used = False, now

    def forget(self, slot: int) -> None:
        """What a slot holds is not known any more; it counts as empty, and keeps being in use."""
        self._held[slot].tokens.clear()

    # --- inside -----------------------------------------------------------------------------

    def _check_size(self, count: int, room: int) -> None:
        if count > self.context:
            raise InferenceError(
                f"{count} tokens do not fit in a context of {self.context}",
                remedy="Give a larger --context, or a shorter prompt.",
            )
        if room * self.token_bytes > self.budget:
            raise InferenceError(
                f"{count} tokens take {room * self.token_bytes} bytes of keys and values,"
                f" and kv_memory is {self.budget}",
                remedy="Raise kv_memory in config.toml, or shorten the prompt.",
            )

    def _longest(self, prompt: Sequence[int]) -> tuple[int | None, int]:
        """The slot that holds the longest beginning, and its length; of equals one that can be continued."""
        best, most = None, (0, False, 0, 0.0)
        for n, held in enumerate(self._held):
            shared = common_prefix(held.tokens, prompt)
            rank = (shared, not held.busy, shared - len(held.tokens), held.used)
            if shared and (best is None or rank > most):
                best, most = n, rank
        return best, most[0]

    def _taken(self, left: Sequence[int], reused: int | None, room: int) -> int:
        """Bytes of the slots that are left and of a prompt that takes `room`, in `reused` or in one more."""
        own = 0 if reused is None else self._held[reused].room
        total = sum(self._held[n].room for n in left) - own + max(own, room)
        return total * self.token_bytes

    def _oldest(self, slots: Sequence[int]) -> int | None:
        idle = [n for n in slots if self._held[n].room and not self._held[n].busy]
        return min(idle, key=lambda n: (self._held[n].used, n), default=None)

    def _enter(
        self,
        kept: Sequence[int],
        room: int,
        best: int | None,
        continued: bool,
        empty: Sequence[int],
        dropped: Sequence[int],
        now: float,
    ) -> Placement:
        for n in dropped:
            self._held[n] = _Held()
        slot = best if continued and best is not None else empty[0]
        held = self._held[slot]
        lost = len(held.tokens) - len(kept) if continued else 0
        held.tokens, held.room = list(kept), max(held.room if continued else 0, room)
        held.busy, held.used = True, now
        return Placement(slot, len(kept), None if continued else best, lost, tuple(dropped))

"""What a session still wants, and who says they hold it: groups of blocks as bit masks.

A group is the blocks of one part, in the order of the part's links, so that a `holds` bitmap is a
mask over it; or some nodes, of which nobody is asked beforehand. Masks are Python integers: "the
wanted blocks that this peer holds and nobody else" is two operations whatever the size of the part.
How many hold a block is counted for whole groups at once, again only when something changed. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from omnistore.cid import CID
from omnistore.errors import LocalProtocolError

_INDEX_BITS: Final = 32
"""Of a place written as one number: the group's number above the block's index."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One block of a group."""

    cid: CID
    size: int
    """Payload bytes; for a node, whose size nothing says beforehand, an estimate."""
    exact: bool = True


@dataclass(slots=True, eq=False)
class Group:
    """The blocks of one part, or some nodes."""

    part: CID | None
    """The part's CID, under which peers are asked what they hold; None for nodes."""
    blocks: tuple[Wanted, ...]
    tie: float
    """Breaks ties between equally rare groups, differently in every session of a swarm."""
    number: int = 0
    """By which the demand knows it."""
    pending: int = 0
    """Blocks wanted and asked of nobody."""
    unfinished: int = 0
    """Blocks wanted and not yet verified."""
    rarity: int = 0
    """Copies known among the joined peers, in thousandths of the group."""
    levels: tuple[int, ...] = ()
    """Masks of the blocks that one joined peer holds, that two hold, that three hold, and of all."""
    stale: bool = True
    """Whether somebody's holdings changed since the copies were counted."""
    shared: bool = False
    """Whether some joined peer lacks blocks of it: it may be fetching the same as we."""
    urgent: bool = False
    """Wanted before everything that is not."""

    @property
    def all(self) -> int:
        """The mask of every block."""
        return (1 << len(self.blocks)) - 1

    def count(self, everyone: Iterable[Holdings]) -> None:
        """Count the copies of each block among `everyone`."""
        one = two = three = four = copies = 0
        self.shared = False
        for peer in everyone:
            mask = peer.masks.get(self, 0)
            four |= three & mask
            three |= two & mask
            two |= one & mask
            one |= mask
            copies += mask.bit_count()
            self.shared |= mask != self.all
        self.rarity = copies * 1000 // len(self.blocks)
        self.levels = (one & ~two, two & ~three, three & ~four, self.all)
        self.stale = False

    def first(self, mask: int, rng: Callable[[], float]) -> Wanted:
        """A block of `mask`. Any of them where others fetch too: in one order, all would ask for the same."""
        start = int(rng() * len(self.blocks)) if self.shared else 0
        mask = mask >> start << start or mask
        return self.blocks[(mask & -mask).bit_length() - 1]

    def mask_untrusted(self, bitmap: bytes | None) -> int | None:
        """A `holds` bitmap as a mask; None when its length or its last bits are wrong."""
        if bitmap is None:
            return 0
        if len(bitmap) != -(-len(self.blocks) // 8):
            return None
        mask = int.from_bytes(bitmap, "little")
        return mask if mask <= self.all else None


def chosen(blocks: Sequence[Wanted], mask: int) -> Iterator[tuple[int, Wanted]]:
    """Index and block of each that is in `mask`."""
    every = mask == (1 << len(blocks)) - 1
    return ((index, block) for index, block in enumerate(blocks) if every or mask >> index & 1)


def _index(place: int) -> int:
    return place & (1 << _INDEX_BITS) - 1


Places = list[tuple[Group, int]]
"""Where one CID lies: groups and the bit in each, as a mask of one bit."""


@dataclass(slots=True)
class Holdings:
    """What one peer says it holds."""

    masks: dict[Group, int] = field(default_factory=dict)
    denied: dict[Group, int] = field(default_factory=dict)
    """Blocks it answered `missing` for: not believed again while it stays."""

    def learn(self, group: Group, mask: int) -> None:
        """Take over an answer for one group."""
        self.masks[group] = mask & ~self.denied.get(group, 0)

    def told(self, group: Group) -> int:
        """What nothing new can be learned of: what it holds, and what it is not believed about."""
        return self.masks.get(group, 0) | self.denied.get(group, 0)

    def holds(self, places: Places) -> bool:
        """Whether the block at `places` can be asked of this peer."""
        return any(self.masks.get(group, 0) & bit for group, bit in places)

    def deny(self, places: Places) -> None:
        """The block at `places` is not to be asked of this peer, whatever it says later."""
        for group, bit in places:
            self.denied[group] = self.denied.get(group, 0) | bit
            self.masks[group] = self.masks.get(group, 0) & ~bit

    def allow(self, places: Places) -> None:
        """Undo `deny`: the block may be asked of this peer again."""
        for group, bit in places:
            self.denied[group] = self.denied.get(group, 0) & ~bit
            self.masks[group] = self.masks.get(group, 0) | bit


class Demand:
    """All groups of a session, rarest first."""

    def __init__(self, rng: Callable[[], float] = lambda: 0.0) -> None:
        """`rng` gives floats in [0, 1)."""
        self._rng = rng
        self._groups: list[Group] = []
        self._by_part: dict[CID, Group] = {}
        self._numbers = count()
        self._numbered: dict[int, Group] = {}
        # A number for each block, not an object: there may be a quarter of a million, and the collector of
        # garbage would look through them all, again and again.
        self._place: dict[CID, int] = {}
        self._more: dict[CID, list[int]] = {}
        """The further places of blocks that lie in several."""
        self._everyone: Sequence[Holdings] = ()
        self._sorted = True
        self._tiers: tuple[_Tier, ...] = ()

    def add(self, part: CID | None, blocks: Sequence[Wanted], wanted: int, tie: float) -> Group | None:
        """Want the blocks of `wanted` (a mask); the group, when it is a new one.

        Blocks already wanted, under whatever group, are wanted once.
        """
        group = None if part is None else self._by_part.get(part)
        new = group is None
        self._sorted = False
        if group is None:
            group = Group(part, tuple(blocks), tie, next(self._numbers))
            self._groups.append(group)
            self._numbered[group.number] = group
            if part is not None:
                self._by_part[part] = group
        elif group.blocks != tuple(blocks):
            raise LocalProtocolError(f"part {part} was given with other blocks before")
        at, known = group.number << _INDEX_BITS, []
        for index, block in chosen(group.blocks, wanted):
            if self._place.setdefault(block.cid, at | index) != at | index or group.unfinished >> index & 1:
                known.append(index)
        for index in known:
            wanted &= ~(1 << index)
        group.unfinished |= wanted
        group.pending |= wanted
        for index in known:
            self._also(group, index)
        return group if new else None

    def _also(self, group: Group, index: int) -> None:
        """Want a block here too that is wanted already, be it here."""
        cid, bit, places = group.blocks[index].cid, 1 << index, self.places(group.blocks[index].cid)
        if (group, bit) not in places:
            self._more.setdefault(cid, []).append(group.number << _INDEX_BITS | index)
            group.unfinished |= bit
            group.pending |= bit if any(other.pending & at for other, at in places) else 0

    def hurry(self, part: CID | None) -> None:
        """Want this part before those that nobody waits for."""
        if part is not None:
            self._by_part[part].urgent = True
            self._sorted = False

    @property
    def groups(self) -> Sequence[Group]:
        """Every group, in no particular order."""
        return self._groups

    @property
    def pending(self) -> bool:
        """Whether any block is asked of nobody."""
        return any(group.pending for group in self._groups)

    def group(self, part: CID) -> Group | None:
        """The group of a part."""
        return self._by_part.get(part)

    def wanted(self, cid: CID) -> Wanted | None:
        """What is known of a block that is wanted."""
        place = self._place.get(cid)
        return None if place is None else self._numbered[place >> _INDEX_BITS].blocks[_index(place)]

    def places(self, cid: CID) -> Places:
        """Where a wanted block lies."""
        place = self._place.get(cid)
        if place is None:
            return []
        return [
            (self._numbered[at >> _INDEX_BITS], 1 << _index(at)) for at in (place, *self._more.get(cid, ()))
        ]

    def missing(self) -> list[CID]:
        """Every block wanted and not finished."""
        return list(self._place)

    def take(self, cid: CID) -> None:
        """The block was asked of somebody."""
        for group, bit in self.places(cid):
            group.pending &= ~bit

    def release(self, cid: CID) -> None:
        """Nobody is being asked for the block any more."""
        for group, bit in self.places(cid):
            group.pending |= bit

    def finish(self, cid: CID) -> None:
        """The block was verified."""
        places = self.places(cid)
        del self._place[cid]
        self._more.pop(cid, None)
        for group, bit in places:
            group.pending &= ~bit
            group.unfinished &= ~bit
            if not group.unfinished:
                for tier in self._tiers:
                    tier.forget(group)
                if group.part is None:
                    self._groups.remove(group)
                    del self._numbered[group.number]

    def weigh(self, everyone: Iterable[Holdings]) -> None:
        """Take note of who is joined: call when somebody joined or left."""
        self._everyone = list(everyone)
        for group in self._groups:
            self.recount(group)

    def recount(self, group: Group) -> None:
        """Somebody's holdings of a group changed."""
        group.stale = True
        self._sorted = False

    def choose(self, peer: Holdings) -> Iterator[Wanted]:
        """Blocks to ask of `peer`; the caller takes each before asking for the next.

        Those of urgent parts first, then those that fewest joined peers hold, and of these the ones of
        the rarest part.
        """
        if not self._sorted:
            self._put_in_order()
        for tier in self._tiers:
            for level, groups in enumerate(tier.levels):
                # Equally rare blocks: in the order of the groups, or at random where others fetch them too.
                for group in self._any_order(groups, peer) if tier.shared and level < 3 else groups:
                    while mask := group.pending & peer.masks.get(group, 0) & group.levels[level]:
                        yield group.first(mask, self._rng)

    def _any_order(self, groups: Sequence[Group], peer: Holdings) -> list[Group]:
        mine = [group for group in groups if group.pending & peer.masks.get(group, 0)]
        start = int(self._rng() * len(mine))
        return mine[start:] + mine[:start]

    def _put_in_order(self) -> None:
        """Count what changed, and sort: once for many choices, which then look at little."""
        for group in self._groups:
            if group.stale and group.unfinished:
                group.count(self._everyone)
        self._groups.sort(key=lambda group: (group.rarity, group.tie))
        self._sorted = True
        left = [group for group in self._groups if group.unfinished]
        halves = [group for group in left if group.urgent], [group for group in left if not group.urgent]
        self._tiers = tuple(_Tier(half) for half in halves if half)


class _Tier:
    """Unfinished groups that are equally urgent, the rarest first."""

    __slots__ = ("levels", "shared")

    def __init__(self, groups: Sequence[Group]) -> None:
        self.shared = any(group.shared for group in groups)
        self.levels = tuple([group for group in groups if group.levels[level]] for level in range(4))
        """Those that have blocks of each of `Group.levels`."""

    def forget(self, group: Group) -> None:
        """It is finished."""
        for groups in self.levels:
            if group in groups:
                groups.remove(group)

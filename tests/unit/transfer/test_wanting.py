"""Wanting a great many blocks: what is known of where each lies, and that nothing else has to wait for it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import trio

from omnistore.block import Block
from omnistore.cid import CID
from omnistore.net.interface import Provider
from omnistore.transfer import events as e
from omnistore.transfer.demand import Demand, Wanted
from omnistore.transfer.session import Session
from omnistore.transfer.swarm import Swarm
from tests.unit.transfer.test_unverified import BLOCKS, HANG, LIMITS, PART, WANTED, Peer, Peers

PARTS = [Block.node(bytes((number,))).cid for number in range(6)]


@pytest.mark.parametrize("seed", range(40))
def test_blocks_of_several_places_are_wanted_once(seed: int) -> None:
    """Against sets and lists: parts that share blocks, or have one twice, wanted bit by bit, in any order."""
    rng = random.Random(seed)
    parts = {part: [WANTED[rng.randrange(12)] for _ in range(rng.randint(1, 9))] for part in PARTS}
    demand = Demand()
    places: dict[CID, list[tuple[CID, int]]] = {}
    asked: set[CID] = set()
    for _ in range(120):
        part = rng.choice(PARTS)
        if rng.random() < 0.4:
            mask = rng.getrandbits(len(parts[part]))
            demand.add(part, parts[part], mask, 0.5)
            for index, block in enumerate(parts[part]):
                here = places.setdefault(block.cid, []) if mask >> index & 1 else [(part, index)]
                here += [] if (part, index) in here else [(part, index)]
        elif places:
            cid = rng.choice(list(places))
            if cid not in asked:
                demand.take(cid)
                asked.add(cid)
            elif rng.random() < 0.5:
                demand.release(cid)
                asked.remove(cid)
            else:
                demand.finish(cid)
                asked.remove(cid)
                del places[cid]
        check(demand, parts, places, asked)


def check(
    demand: Demand, parts: dict[CID, list[Wanted]], places: dict[CID, list[tuple[CID, int]]], asked: set[CID]
) -> None:
    assert set(demand.missing()) == places.keys()
    for part in parts:
        group = demand.group(part)
        if group is None:
            continue
        unfinished = {index for where in places.values() for at, index in where if at == part}
        pending = {i for cid, where in places.items() if cid not in asked for at, i in where if at == part}
        assert group.unfinished == sum(1 << index for index in unfinished)
        assert group.pending == sum(1 << index for index in pending)
    for block in WANTED:
        found = demand.places(block.cid)
        assert [(g.part, bit) for g, bit in found] == [
            (part, 1 << index) for part, index in places.get(block.cid, [])
        ]
        assert demand.wanted(block.cid) == (block if block.cid in places else None)


@pytest.mark.trio
async def test_others_run_between_two_parts() -> None:
    swarm = Swarm(Peers({}), Session(lambda: 0.5), LIMITS)
    ran = 0

    async def other() -> None:
        nonlocal ran
        while True:
            await trio.lowlevel.checkpoint()
            ran += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await swarm.fetch((e.WantsAdded(part, WANTED, 0) for part in PARTS * 20), lambda _: None)
        nursery.cancel_scope.cancel()
    assert ran >= 10 * len(PARTS)


class SlowToWant(Swarm):
    """The first half is here before it wants the second."""

    held_up = 2

    async def _let_others_run(self) -> None:
        await super()._let_others_run()
        self.held_up -= 1
        while self.held_up >= 0 and self.session.missing():  # noqa: ASYNC110  the session tells nobody
            await trio.sleep(0.001)


@pytest.mark.trio
async def test_a_part_that_is_here_before_the_next_is_wanted_ends_no_fetch() -> None:
    """What looks like the end of all that was wanted is only that of what was wanted so far."""
    kept: list[CID] = []
    half = (1 << len(WANTED) // 2) - 1

    def wants() -> Iterator[e.WantsAdded]:
        yield e.WantsAdded(PART, WANTED, half)
        assert len(kept) == len(WANTED) // 2
        yield e.WantsAdded(PART, WANTED, 0)
        yield e.WantsAdded(PART, WANTED, half << len(WANTED) // 2)
        yield e.WantsAdded(PART, WANTED, 0)

    peer = Peer("peer")
    peer.gate.set()
    swarm = SlowToWant(Peers({"peer": peer}), Session(lambda: 0.5), LIMITS)
    swarm.add(Provider("peer"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(swarm.run)
        with trio.fail_after(HANG):
            await swarm.fetch(wants(), lambda blocks: kept.extend(block.cid for block in blocks))
        nursery.cancel_scope.cancel()
    assert sorted(kept) == sorted(block.cid for block in BLOCKS)

"""Parts of lending by themselves: the memory budget, the thread, the link, weights out of a store."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from omninfer import frames
from omninfer.engines import FileTensorSource, Stage, StageSpec
from omninfer.link import FrameLink
from omninfer.sources import StoreTensorSource, describe_untrusted, header_parts, stage_parts
from omninfer.testing.cluster import KEY, LAYERS, write_noise_gguf
from omninfer.threads import ComputeThread
from omninfer.warm import IDLE_SECONDS, Lease, Need, StageKey, ToKeep, WarmStages
from omnistore.block import BLOCK_SIZE, Block
from omnistore.chunker.layout import part_of
from omnistore.errors import (
    BlockMissing,
    DigestMismatch,
    LocalProtocolError,
    PeerUnreachable,
    PlanInfeasible,
    RemoteProtocolError,
)
from omnistore.manifest import PartKey
from omnistore.net.interface import Provider, Stream
from omnistore.store.memory import MemoryStore
from omnistore.testing.network import LinkModel, VirtualNetwork
from omnistore.testing.seeding import seeded
from omnistore.testing.tiny_gguf import TinyTensor, tiny_gguf

pytestmark = pytest.mark.trio

MODEL = Block.node(b"\xa0").cid


# --- the budget -----------------------------------------------------------------------------


class FakeStage:
    """Remembers what was dropped."""

    def __init__(self) -> None:
        self.dropped: list[int] = []
        self.forked: list[tuple[int, int, int]] = []
        self.closed = threading.Event()

    def drop(self, slot: int) -> None:
        self.dropped.append(slot)

    def fork(self, src: int, dst: int, length: int) -> None:
        self.forked.append((src, dst, length))

    def close(self) -> None:
        self.closed.set()


class Loader:
    """Loads fake stages and counts them."""

    def __init__(self) -> None:
        self.made: list[FakeStage] = []

    async def __call__(self, thread: ComputeThread) -> Stage:
        await trio.lowlevel.checkpoint()
        self.made.append(FakeStage())
        return cast(Stage, self.made[-1])


def key(first: int) -> StageKey:
    return StageKey(MODEL, first, first + 1, False, False, "numpy", 16)


async def lease(stages: WarmStages, loader: Loader, first: int, weights: int = 40, slots: int = 1) -> Lease:
    return await stages.lease(key(first), slots, Need(weights, 5 * slots), loader)


async def test_a_lease_takes_memory_and_gives_it_back() -> None:
    stages, loader = WarmStages(100), Loader()
    one = await lease(stages, loader, 0, slots=2)
    assert (stages.available, one.slots) == (50, (0, 1))
    two = await lease(stages, loader, 0)
    assert (stages.available, two.slots, len(loader.made)) == (45, (2,), 1)
    stages.release(one)
    assert stages.available == 55
    stages.release(two)
    assert stages.available == 100
    stages.close()
    assert loader.made[0].closed.wait(5)
    assert loader.made[0].dropped == [0, 1, 2]


async def test_idle_stages_make_room_longest_idle_first(autojump_clock: trio.testing.MockClock) -> None:
    stages, loader = WarmStages(100), Loader()
    for first in (0, 1):
        stages.release(await lease(stages, loader, first))
        await trio.sleep(1)
    stages.release(await lease(stages, loader, 0))  # used again: now 1 is idle for longer
    await lease(stages, loader, 2)
    assert loader.made[1].closed.wait(5)
    assert not loader.made[0].closed.is_set()
    assert len(loader.made) == 3


async def test_what_is_leased_is_not_dropped_for_anybody() -> None:
    stages, loader = WarmStages(100), Loader()
    await lease(stages, loader, 0)
    with pytest.raises(PlanInfeasible, match="65 bytes are needed and 55 of 100"):
        await lease(stages, loader, 1, weights=60)
    with pytest.raises(PlanInfeasible, match="slots were asked for"):
        await lease(stages, loader, 0, slots=frames.LIMITS.slots)
    assert len(loader.made) == 1


async def test_a_stage_idle_for_long_is_let_go(autojump_clock: trio.testing.MockClock) -> None:
    stages, loader = WarmStages(100), Loader()
    stages.release(await lease(stages, loader, 0))
    await trio.sleep(IDLE_SECONDS - 1)
    stages.expire(trio.current_time())
    assert not loader.made[0].closed.is_set()
    await trio.sleep(2)
    stages.expire(trio.current_time())
    assert loader.made[0].closed.wait(5)


async def test_a_load_that_fails_leaves_no_trace_and_two_at_once_load_once() -> None:
    stages, loader = WarmStages(100), Loader()

    async def failing(thread: ComputeThread) -> Stage:
        raise DigestMismatch("rotten")

    with pytest.raises(DigestMismatch):
        await stages.lease(key(0), 1, Need(40, 5), failing)
    assert stages.available == 100
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lease, stages, loader, 0)
        nursery.start_soon(lease, stages, loader, 0)
    assert len(loader.made) == 1
    assert stages.available == 50


async def test_kept_slots_hold_memory_until_somebody_needs_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stages, loader = WarmStages(100, kept_per_peer=20), Loader()
    one = await lease(stages, loader, 0, slots=2)
    stages.release(one, "anna", {1: ToKeep((b"a", b"b"), 5)})
    assert stages.available == 100  # what is kept goes when it is asked for
    two = await lease(stages, loader, 0)
    assert two.slots == (0,)
    assert stages.recall(two, 0, "bob", (b"a", b"b")) == 0
    assert stages.recall(two, 0, "anna", (b"a", b"c")) == frames.LABEL_TOKENS
    await two.warm.thread.run(lambda: None)
    assert loader.made[0].forked == [(1, 0, frames.LABEL_TOKENS)]
    with pytest.raises(PlanInfeasible):
        await lease(stages, loader, 1, weights=60)
    await lease(stages, loader, 1, weights=47)  # 45 + 5 kept + 52: the kept prompt has to go
    await two.warm.thread.run(lambda: None)
    assert loader.made[0].dropped == [0, 1]
    assert stages.recall(two, 0, "anna", (b"a", b"b")) == 0


async def test_kept_slots_are_given_up_for_a_lease_that_wants_all(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stages, loader = WarmStages(1000, kept_per_peer=1000), Loader()
    for name in ("a", "b"):
        one = await lease(stages, loader, 0)
        stages.release(one, "anna", {0: ToKeep((name.encode(),), 5)})
        await trio.sleep(1)
    one = await lease(stages, loader, 0, slots=frames.LIMITS.slots - 1)
    assert stages.recall(one, 0, "anna", (b"a",)) == 0
    assert stages.recall(one, 0, "anna", (b"b",)) == frames.LABEL_TOKENS


# --- the thread -----------------------------------------------------------------------------


async def test_work_runs_in_order_in_one_thread_and_a_cancelled_caller_does_not_wait() -> None:
    thread, go, seen = ComputeThread("test"), threading.Event(), list[tuple[str, int]]()

    def work(name: str) -> int:
        if name == "first":
            assert go.wait(10)
        seen.append((name, threading.get_ident()))
        return len(seen)

    with trio.move_on_after(0.01) as scope:
        await thread.run(work, "first")
    assert scope.cancelled_caught
    go.set()
    assert await thread.run(work, "second") == 2
    assert [name for name, _ in seen] == ["first", "second"]
    assert len({ident for _, ident in seen}) == 1
    with pytest.raises(ZeroDivisionError):
        await thread.run(lambda: 1 // 0)
    thread.close()
    thread.submit(work, "never")


# --- the link -------------------------------------------------------------------------------


async def linked(nursery: trio.Nursery) -> tuple[FrameLink, Stream]:
    """A coordinator's link, and the bare stream at its other end."""
    network = VirtualNetwork(nursery, random.Random(1), LinkModel(delay=0.001))
    here, there = network.node("me"), network.node("lender")
    arrived: list[Stream] = []
    met = trio.Event()

    async def serve(stream: Stream) -> None:
        arrived.append(stream)
        met.set()
        await trio.sleep_forever()

    there.serve(frames.PROTOCOL, serve)
    link = FrameLink(await here.open_stream(Provider("lender"), frames.PROTOCOL), "coordinator", silence=5)
    await met.wait()
    return link, arrived[0]


async def test_silence_and_a_peer_that_reads_nothing_count_as_gone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        link, _ = await linked(nursery)
        with pytest.raises(PeerUnreachable, match="lender was silent for 5 s"):
            await link.receive()
        link, _ = await linked(nursery)
        with pytest.raises(PeerUnreachable, match="took nothing for 5 s"):
            while True:
                await link.send(frames.Ping(bytes(frames.LIMITS.ping)))
        with pytest.raises(PeerUnreachable, match="broke"):
            await link.send(frames.Bye())
        nursery.cancel_scope.cancel()


async def test_an_end_in_the_middle_of_a_frame_is_no_end(autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        link, stream = await linked(nursery)
        await stream.aclose()
        assert await link.receive() is None
        link, stream = await linked(nursery)
        await stream.send_all(b"\0\0")
        await stream.aclose()
        with pytest.raises(PeerUnreachable, match="middle of a frame"):
            await link.receive()
        link, stream = await linked(nursery)
        await stream.send_all(bytes(4))
        with pytest.raises(RemoteProtocolError):
            await link.receive()
        with pytest.raises(LocalProtocolError):
            await link.send(frames.Drop(0))
        nursery.cancel_scope.cancel()


# --- weights --------------------------------------------------------------------------------


async def test_a_store_gives_the_bytes_that_the_file_has(noise_file: Path) -> None:
    store, cid = seeded(noise_file, KEY)
    about = describe_untrusted(store, cid)
    file = FileTensorSource(noise_file)
    assert about.spec == file.model()
    source = StoreTensorSource(store, about.model, about.model.parts)
    assert set(source.names()) == set(file.names())
    for name in file.names():
        assert source.info(name) == file.info(name)
        assert source.read(name) == file.read(name)


async def test_any_range_of_a_tensor_of_several_blocks(tmp_path: Path) -> None:
    data = random.Random(3).randbytes(3 * BLOCK_SIZE - 100)
    path = tmp_path / "wide.gguf"
    path.write_bytes(tiny_gguf([TinyTensor("blk.0.wide.weight", "I8", (len(data),), data)]))
    store, cid = seeded(path, KEY)
    model = store.model(cid)
    source = StoreTensorSource(store, model, model.parts)
    edges = (0, 1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE, len(data) - 1, len(data))
    for start in edges:
        for stop in (*edges, None):
            assert source.read("blk.0.wide.weight", start, stop) == data[start:stop]
    assert source.read("blk.0.wide.weight", 5, len(data) + 99) == data[5:]


async def test_a_stage_needs_its_parts_and_a_tied_head_the_embedding(noise_file: Path) -> None:
    store, cid = seeded(noise_file, KEY)
    about = describe_untrusted(store, cid)
    manifest, spec = about.model.manifest, about.spec

    def parts(first: int, last: int) -> set[str]:
        stage = StageSpec(spec, first, last, embed=first == 0, head=last == LAYERS)
        return {str(part) for part in stage_parts(manifest, stage)}

    assert parts(0, 2) == {"header.0", "embed", "layer.0", "layer.1"}
    assert parts(2, 3) == {"header.0", "layer.2"}
    assert parts(5, 6) == {"header.0", "embed", "layer.5", "head"}
    assert {str(part) for part in header_parts(manifest)} == {"header.0"}


async def test_missing_and_rotten_blocks_are_never_computed_with(tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    write_noise_gguf(path, layers=1)
    store, cid = seeded(path, KEY, parts={PartKey("header", 0), PartKey("embed")})
    about = describe_untrusted(store, cid)
    source = StoreTensorSource(store, about.model, about.model.parts)
    with pytest.raises(BlockMissing):
        source.read("blk.0.attn_q.weight")
    embed = about.model.parts[part_of("token_embd.weight")]
    store._blocks[embed.links()[0][0]] = bytes(10)
    with pytest.raises(DigestMismatch):
        source.read("token_embd.weight")
    with pytest.raises(BlockMissing):
        describe_untrusted(MemoryStore(), cid)

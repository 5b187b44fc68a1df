"""A block read for a stream that broke the protocol meanwhile: that stream's end is nobody else's."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from omnistore.block import Block
from omnistore.cid import CID
from omnistore.keys import PrivateKey
from omnistore.net.interface import NextRoom, StreamServer
from omnistore.store.memory import MemoryStore
from omnistore.testing.seeding import seeded
from omnistore.testing.tiny_gguf import tiny_model
from omnistore.transfer import server
from omnistore.transfer.messages import Want, encode


class Gated:
    """A store whose reads take until the gate is open."""

    def __init__(self, inner: MemoryStore) -> None:
        self.inner = inner
        self.began, self.gate, self.read_all = threading.Event(), threading.Event(), threading.Event()

    def read(self, cid: CID, room: memoryview | None = None) -> Block:
        self.began.set()
        assert self.gate.wait(10)
        block = self.inner.read(cid, room)
        self.read_all.set()
        return block


class OverAsker:
    """Asks, reads nothing, and breaks the protocol while its block is being read."""

    peer = "over-asker"
    superseded = False

    def __init__(self, store: Gated, cid: CID) -> None:
        self.store = store
        self.said = [encode(Want(0, (cid,))), encode(Want(7, (cid,)))]
        self.was_reset = False

    async def send_all(self, *data: bytes | bytearray | memoryview) -> None:
        await trio.sleep_forever()

    async def receive_some(self, max_bytes: int) -> bytes:
        if len(self.said) == 1:
            await trio.to_thread.run_sync(self.store.began.wait)
            # Let the reader come back only when the stream is already ending.
            trio.lowlevel.current_trio_token().run_sync_soon(self.store.gate.set)
        return self.said.pop(0)

    async def receive_into(self, room: memoryview, more: NextRoom | None = None) -> int:
        raise AssertionError("the server reads as it comes")

    async def receive_exactly(self, count: int) -> bytes:
        raise AssertionError("the server reads as it comes")

    async def aclose(self) -> None:
        raise AssertionError("a stream that broke the protocol is reset")

    async def reset(self) -> None:
        self.was_reset = True


class Listening:
    """As much of a network as a server needs."""

    peer_id = "seed"

    def __init__(self) -> None:
        self.servers: dict[str, StreamServer] = {}

    def serve(self, protocol: str, serve: StreamServer) -> None:
        self.servers[protocol] = serve

    def addrs(self) -> Sequence[str]:
        return ()


def test_a_read_that_ends_after_its_stream_broke_the_protocol_hurts_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LAST_WORDS", 0.3)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_model(1).build())
    inner, cid = seeded(path, PrivateKey(bytes(32)))
    store, network = Gated(inner), Listening()
    events: list[server.ServeEvent] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:

            async def serve(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
                await server.serve_transfer(network, store, events=events.append, task_status=task_status)  # type: ignore[arg-type]

            await nursery.start(serve)
            stream = OverAsker(store, cid)
            await network.servers[server.PROTOCOL](stream)
            assert store.read_all.is_set(), "the read ended before the stream did, or the test shows nothing"
            assert stream.was_reset
            # The readers would have taken the server with them.
            await trio.sleep(0.05)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert [event.reason for event in events if isinstance(event, server.Served)] == [
        "asks numbered from 7; the next is 1"
    ]


class Deaf:
    """Asks for one block and takes in nothing of it."""

    peer = "deaf"
    superseded = False

    def __init__(self, cid: CID) -> None:
        self.said = [encode(Want(0, (cid,)))]
        self.was_reset = self.greeted = False

    async def send_all(self, *data: bytes | bytearray | memoryview) -> None:
        if self.greeted:
            await trio.sleep_forever()
        self.greeted = True

    async def receive_some(self, max_bytes: int) -> bytes:
        if not self.said:
            await trio.sleep_forever()
        return self.said.pop()

    async def receive_into(self, room: memoryview, more: NextRoom | None = None) -> int:
        raise AssertionError("the server reads as it comes")

    async def receive_exactly(self, count: int) -> bytes:
        raise AssertionError("the server reads as it comes")

    async def aclose(self) -> None:
        raise AssertionError("a stream that takes in nothing is reset")

    async def reset(self) -> None:
        self.was_reset = True


def test_a_requester_that_takes_in_nothing_is_left_within_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SEND_PATIENCE", 8.0)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_model(1).build())
    store, cid = seeded(path, PrivateKey(bytes(32)))
    network, events = Listening(), list[server.ServeEvent]()
    took = 0.0

    async def main() -> None:
        nonlocal took
        async with trio.open_nursery() as nursery:

            async def serve(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
                await server.serve_transfer(network, store, events=events.append, task_status=task_status)  # type: ignore[arg-type]

            await nursery.start(serve)
            stream, started = Deaf(cid), trio.current_time()
            await network.servers[server.PROTOCOL](stream)
            took = trio.current_time() - started
            assert stream.was_reset
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.05))
    (served,) = [event for event in events if isinstance(event, server.Served)]
    assert served.reason == "asked and then took in nothing for 8 s"
    assert 8 <= took < 10

"""What a server says when it ends a stream on purpose: every code of spec/05-transfer that ours sends."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from omnistore.cid import CID, RAW
from omnistore.errors import PeerUnreachable
from omnistore.net.interface import Provider
from omnistore.store.memory import MemoryStore
from omnistore.testing.network import LinkModel, VirtualNetwork
from omnistore.transfer.messages import LIMITS, PROTOCOL, SERVER, Cancel, Decoder, Error, Have, Want, encode
from omnistore.transfer.serve import UNUSED, ServeLimits
from omnistore.transfer.server import IDLE_PATIENCE, Served, ServeEvent, serve_transfer

SEED = Provider("seed")


def link(number: int) -> CID:
    return CID.of_digest(RAW, number.to_bytes(32, "big"))


def virtually(test: Callable[[VirtualNetwork], Awaitable[None]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await test(VirtualNetwork(nursery, random.Random(1), LinkModel()))
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.005))


async def serving(network: VirtualNetwork, limits: ServeLimits, events: list[ServeEvent]) -> None:
    async def serve(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await serve_transfer(
            network.node("seed"), MemoryStore(), limits=limits, events=events.append, task_status=task_status
        )

    await network._nursery.start(serve)


async def last_word(network: VirtualNetwork, name: str, said: bytes) -> Error:
    """What the server's last message is, once the stream has ended."""
    stream = await network.node(name).open_stream(SEED, PROTOCOL)
    decoder, found = Decoder(SERVER), []
    try:
        await stream.send_all(said)
        while data := await stream.receive_some(64 << 10):
            found += decoder.feed_untrusted(data)
    except PeerUnreachable:
        pass  # It is reset behind its last message.
    await stream.reset()
    assert isinstance(found[-1], Error)
    assert not any(isinstance(message, Error) for message in found[:-1])
    return found[-1]


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"\0\0\0\0", "malformed"),
        (encode(Want(1, (link(0),))), "malformed"),
        (encode(Cancel((0,))), "malformed"),
        (encode(Want(0, (link(0), link(1), link(2)))), "over-asked"),
        (encode(Have((link(0), link(1), link(2)))), "over-asked"),
        (b"", "idle"),
    ],
    ids=["no length", "misnumbered", "cancels nothing", "asks", "queries", "nothing"],
)
def test_who_is_ended_is_told_why(said: bytes, code: str) -> None:
    async def test(network: VirtualNetwork) -> None:
        events: list[ServeEvent] = []
        await serving(network, ServeLimits(asks=2, queries=2), events)
        began = trio.current_time()
        error = await last_word(network, "me", said)
        assert error.code == code
        assert 0 < len(error.text) <= LIMITS.text
        assert (trio.current_time() - began >= IDLE_PATIENCE) is (code == "idle")
        assert [event.reason for event in events if isinstance(event, Served)] == [error.text]

    virtually(test)


def test_a_full_house_says_so_and_who_asks_nothing_makes_room() -> None:
    async def test(network: VirtualNetwork) -> None:
        await serving(network, ServeLimits(streams=1), [])
        words: dict[str, Error] = {}

        async def come(name: str) -> None:
            words[name] = await last_word(network, name, b"")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(come, "first")
            await trio.sleep(UNUSED / 2)
            await come("second")
            assert words["second"].code == "busy"
            await trio.sleep(UNUSED)
            nursery.start_soon(come, "third")
            await trio.sleep(UNUSED / 2)
            assert words["first"].code == "idle"
            assert "third" not in words
            nursery.cancel_scope.cancel()

    virtually(test)

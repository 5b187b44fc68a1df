"""Asking providers what they hold, on a virtual network."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from omnistore.cid import CID
from omnistore.errors import NoProviders
from omnistore.keys import PrivateKey
from omnistore.manifest import PartKey
from omnistore.net.interface import Provider, Stream
from omnistore.store.memory import MemoryStore
from omnistore.testing.network import LinkModel, VirtualNetwork, VirtualNode
from omnistore.testing.seeding import seeded
from omnistore.testing.tiny_gguf import tiny_model
from omnistore.transfer.messages import PROTOCOL
from omnistore.transfer.probe import Probe
from omnistore.transfer.server import serve_transfer

KEY = PrivateKey(bytes(32))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    path.write_bytes(tiny_model(3, width=64).build())
    return path


def virtually(test: Callable[[VirtualNetwork, trio.Nursery], Awaitable[None]]) -> None:
    """Run `test` in virtual time; the threads of stores take real time."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await test(VirtualNetwork(nursery, random.Random(1), LinkModel(bandwidth=1e9)), nursery)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.01))


async def serve(nursery: trio.Nursery, node: VirtualNode, store: MemoryStore) -> None:
    await nursery.start(partial(serve_transfer, node, store))


def ask_all(
    file: Path, arrange: Callable[[VirtualNetwork, trio.Nursery], Awaitable[None]]
) -> dict[str, object]:
    """What `whole`, `some` and the peer that `arrange` adds as `odd` are found to hold."""
    seed, cid = seeded(file, KEY)
    some, _ = seeded(file, KEY, {PartKey("layer", 1)})
    found: dict[str, object] = {}

    async def test(network: VirtualNetwork, nursery: trio.Nursery) -> None:
        await serve(nursery, network.node("whole"), seed)
        await serve(nursery, network.node("some"), some)
        await arrange(network, nursery)
        probe = Probe(network.node("me"), MemoryStore())
        providers = [Provider(name) for name in ("odd", "whole", "some")]
        description = await probe.describe(cid, providers)
        found["size"] = sum(part.size for part in description.parts.values())
        found["layer"] = next(
            ref.size for ref in description.manifest.parts if ref.key == PartKey("layer", 1)
        )
        for provider in providers:
            found[provider.peer] = await probe.ask(provider, description)
        found["parts"] = len(description.parts)

    virtually(test)
    return found


def check_honest(found: dict[str, object]) -> None:
    whole, some = found["whole"], found["some"]
    assert (whole.error, whole.bytes_held, whole.parts) == (None, found["size"], found["parts"])  # type: ignore[attr-defined]
    assert some.error is None  # type: ignore[attr-defined]
    # Equal tensors of other layers count where their blocks are held too.
    assert int(str(found["layer"])) <= some.bytes_held < int(str(found["size"]))  # type: ignore[attr-defined]
    assert 1 <= some.parts < int(str(found["parts"]))  # type: ignore[attr-defined]


async def absent(network: VirtualNetwork, nursery: trio.Nursery) -> None:
    """Nobody is there."""


async def mute(network: VirtualNetwork, nursery: trio.Nursery) -> None:
    async def never(stream: Stream) -> None:
        await trio.sleep_forever()

    network.node("odd").serve(PROTOCOL, never)


async def noisy(network: VirtualNetwork, nursery: trio.Nursery) -> None:
    async def noise(stream: Stream) -> None:
        await stream.send_all(b"\xff" * 1000)

    network.node("odd").serve(PROTOCOL, noise)


async def closing(network: VirtualNetwork, nursery: trio.Nursery) -> None:
    async def close(stream: Stream) -> None:
        await stream.aclose()

    network.node("odd").serve(PROTOCOL, close)


@pytest.mark.parametrize("odd", [absent, mute, noisy, closing], ids=lambda odd: odd.__name__)
def test_everybody_is_asked_and_the_odd_one_is_told(file: Path, odd: object) -> None:
    found = ask_all(file, odd)  # type: ignore[arg-type]
    check_honest(found)
    assert found["odd"].error  # type: ignore[attr-defined]
    assert found["odd"].bytes_held == 0  # type: ignore[attr-defined]


def test_nobody_can_tell_what_it_is(file: Path) -> None:
    cid: CID = seeded(file, KEY)[1]

    async def test(network: VirtualNetwork, nursery: trio.Nursery) -> None:
        with pytest.raises(NoProviders, match="nobody reachable tells"):
            await Probe(network.node("me"), MemoryStore()).describe(cid, [Provider("gone")])

    virtually(test)

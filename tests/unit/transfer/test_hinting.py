"""Peers tell which mirrors they know of; a fetch collects that, and follows it only where it is allowed."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing

from omnistore.cid import CID
from omnistore.errors import NoProviders, RemoteProtocolError
from omnistore.net.interface import Provider, Stream
from omnistore.store.memory import MemoryStore
from omnistore.testing.network import VirtualNetwork, VirtualNode
from omnistore.transfer import hinting, outside
from omnistore.transfer.client import FetchOptions, FetchReport, fetch_model
from omnistore.transfer.hinting import ASKED, STREAMS, ask_hints, serve_hints
from omnistore.transfer.hints import FOLLOWED, PROTOCOL, encode_answer, encode_question
from omnistore.transfer.server import serve_transfer
from tests.unit.transfer.test_web import Model, model, nodes_of
from tests.unit.transfer.web_server import serving

__all__ = ["model"]
URL = "https://mirror.example/six.gguf"


def run(test: Callable[[VirtualNetwork], Awaitable[None]], *, virtual: bool = True) -> None:
    """Run `test`, in virtual time unless it uses real sockets."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            with trio.fail_after(60):
                await test(VirtualNetwork(nursery, random.Random(1)))
            nursery.cancel_scope.cancel()

    clock = trio.testing.MockClock(autojump_threshold=0.002) if virtual else None
    trio.run(main, clock=clock)


async def seeding(node: VirtualNode, store: MemoryStore) -> None:
    """Have `node` serve a store, hints included."""
    await node.network._nursery.start(partial(serve_transfer, node, store))
    node.network._nursery.start_soon(serve_hints, node, store)
    await trio.testing.wait_all_tasks_blocked()


def at(*names: str) -> tuple[str, ...]:
    return tuple(f"/memory/{name}/p2p/{name}" for name in names)


def named(seed: MemoryStore, cid: CID, *urls: str, whole: bool = False) -> MemoryStore:
    """A store that names mirrors of the model, and has it `whole` or only its description."""
    found = seed.model(cid)
    store = nodes_of(seed, cid)
    if whole:
        store.put(seed.read(block) for part in found.parts.values() for block, _ in part.links())
    store.publish([], cid)
    store.set_mirrors(cid, urls)
    return store


def test_a_peer_is_asked_and_answers(model: Model) -> None:
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        await seeding(network.node("a"), named(seed, cid, URL))
        await seeding(network.node("b"), MemoryStore())
        network.node("old")
        me = network.node("me")
        assert await ask_hints(me, Provider("a"), cid) == (URL,)
        assert await ask_hints(me, Provider("a"), seed.model(cid).manifest_cid) == (URL,)
        for other in ("b", "old", "nobody"):
            assert await ask_hints(me, Provider(other), cid) == ()

    run(test)


def test_bad_answers_and_bad_questions_hurt_nobody_else(model: Model) -> None:
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        liar, me = network.node("liar"), network.node("me")
        for answer in (
            b"\0\0\0\0",
            b"\xff\xff\xff\xff",
            encode_answer(cid, ["http://u@h/x"]),
            encode_question(cid),
        ):

            async def tell(stream: Stream, answer: bytes = answer) -> None:
                await stream.send_all(answer)
                await stream.aclose()

            liar.serve(PROTOCOL, tell)
            with pytest.raises(RemoteProtocolError):
                await ask_hints(me, Provider("liar"), cid)

        async def silent(stream: Stream) -> None:
            await trio.sleep_forever()

        liar.serve(PROTOCOL, silent)
        assert await ask_hints(me, Provider("liar"), cid) == ()
        await seeding(network.node("a"), named(seed, cid, URL))
        for question in (b"\0\0\0\0", b"\0\0\0\1\xa0", encode_answer(cid, [])):
            stream = await me.open_stream(Provider("a"), PROTOCOL)
            await stream.send_all(question)
        # Questions that never come take all places for as long as a question may take, no longer.
        waiting = [await me.open_stream(Provider("a"), PROTOCOL) for _ in range(STREAMS)]
        assert await ask_hints(me, Provider("a"), cid) == ()
        await trio.sleep(hinting.PATIENCE + 1)
        assert await ask_hints(me, Provider("a"), cid) == (URL,)
        assert waiting

    run(test)


def test_what_peers_name_is_told_and_not_followed(model: Model) -> None:
    _, seed, cid = model
    private = "http://10.0.0.1/six.gguf"

    async def test(network: VirtualNetwork) -> None:
        await seeding(network.node("a"), named(seed, cid, URL, private, whole=True))
        await seeding(network.node("b"), named(seed, cid, URL))
        report = await fetch_model(
            network.node("me"), None, MemoryStore(), cid, FetchOptions(peers=at("a", "b"))
        )
        found = {hint.url: hint for hint in report.mirrors}
        assert set(found[URL].peers) == {"a", "b"} and found[private].peers == ("a",)
        assert (found[URL].public, found[private].public) == (True, False)
        assert not any(hint.followed for hint in report.mirrors)

    run(test)


def test_for_want_of_sources_they_are_advised(model: Model) -> None:
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        await seeding(network.node("a"), named(seed, cid, URL, "http://10.0.0.1/six.gguf"))
        with pytest.raises(NoProviders) as caught:
            await fetch_model(network.node("me"), None, MemoryStore(), cid, FetchOptions(peers=at("a")))
        assert caught.value.remedy is not None
        assert URL in caught.value.remedy and "--mirrors" in caught.value.remedy
        assert "10.0.0.1" not in caught.value.remedy

    run(test)


def test_only_some_peers_are_asked(model: Model) -> None:
    _, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        names = [f"p{number}" for number in range(ASKED + 3)]
        for name in names:
            await seeding(
                network.node(name), named(seed, cid, f"https://{name}.example/six.gguf", whole=True)
            )
        report = await fetch_model(
            network.node("me"), None, MemoryStore(), cid, FetchOptions(peers=at(*names))
        )
        assert 0 < len(report.mirrors) <= ASKED

    run(test)


def followed(
    model: Model, monkeypatch: pytest.MonkeyPatch, urls: list[str], *, public: bool = True
) -> FetchReport:
    """Fetch with hints allowed from a peer that only describes the model; this machine counts as public."""
    _, seed, cid = model
    if public:
        monkeypatch.setattr(hinting, "is_public", lambda url: True)
        monkeypatch.setattr(outside, "is_public_address", lambda address: True)
    reports: list[FetchReport] = []

    async def test(network: VirtualNetwork) -> None:
        await seeding(network.node("a"), named(seed, cid, *urls))
        options = FetchOptions(peers=at("a"), hints=True)
        reports.append(await fetch_model(network.node("me"), None, MemoryStore(), cid, options))

    run(test, virtual=False)
    return reports[0]


def test_where_it_is_allowed_mirrors_are_followed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model[0]
    with serving(path.parent) as web, serving(path.parent, "flips") as liar:
        urls = [f"{server.url}/{path.name}" for server in (web, liar)]
        report = followed(model, monkeypatch, urls)
    assert report.peers[f"{urls[0]} (named by a peer)"] > 0
    assert f"{urls[1]} (named by a peer)" in report.dropped
    assert all(hint.followed for hint in report.mirrors)


def test_no_more_than_a_few_are_followed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model[0]
    with serving(path.parent) as web:
        copies = [f"{web.url}/{'./' * number}{path.name}" for number in range(FOLLOWED + 4)]
        report = followed(model, monkeypatch, copies)
    assert sum(hint.followed for hint in report.mirrors) == FOLLOWED < len(report.mirrors)


def test_this_machine_is_never_followed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seed, cid = model

    async def test(network: VirtualNetwork) -> None:
        with serving(path.parent) as web:
            urls = [f"{web.url}/{path.name}", f"{web.url.replace('127.0.0.1', 'localhost')}/{path.name}"]
            monkeypatch.setattr(hinting, "is_public", lambda url: True)
            await seeding(network.node("a"), named(seed, cid, *urls, whole=True))
            options = FetchOptions(peers=at("a"), hints=True)
            report = await fetch_model(network.node("me"), None, MemoryStore(), cid, options)
            assert list(report.peers) == ["a"] and not web.requests

    run(test, virtual=False)

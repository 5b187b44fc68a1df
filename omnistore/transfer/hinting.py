"""Tells peers which mirrors this home's user knows of, and asks peers for theirs: the shell around `hints`.

A fetch asks the first few peers that joined, beside fetching and never waited for. What they name is only
collected, unless the user allowed that it be followed.
Implements spec/05-transfer, section "Mirror hints".
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from omnistore.cid import CID
from omnistore.errors import (
    FetchTimedOut,
    NetworkError,
    NoProviders,
    OmniError,
    RemoteProtocolError,
    StoreError,
)
from omnistore.net.interface import Network, Provider, Stream
from omnistore.store.interface import Store
from omnistore.transfer.hints import (
    FOLLOWED,
    PROTOCOL,
    Hint,
    Mirror,
    decode_answer_untrusted,
    decode_question_untrusted,
    encode_answer,
    encode_question,
    is_public,
    length_untrusted,
    mirrors_of,
)
from omnistore.transfer.messages import LENGTH_SIZE

if TYPE_CHECKING:
    from omnistore.transfer.swarm import Swarm
    from omnistore.transfer.web import WebSources

_log = logging.getLogger(__name__)

PATIENCE: Final = 10.0
"""Seconds for a question and its answer, on either side."""
ASKED: Final = 8
"""Peers that one fetch asks."""
LOOK_EVERY: Final = 0.5
"""Seconds between two looks for peers that joined."""
STREAMS: Final = 32
"""Questions answered at once; more are reset, and asked of somebody else."""
REMEMBERED: Final = 256
"""URLs collected in one fetch, of all peers."""


async def serve_hints(network: Network, store: Store) -> None:
    """Answer with what the user of this home recorded, until cancelled."""
    streams = 0

    async def answer(stream: Stream) -> None:
        nonlocal streams
        if streams >= STREAMS:
            await stream.reset()
            return
        streams += 1
        try:
            with trio.fail_after(PATIENCE):
                await _answer(stream, store)
                await stream.aclose()
        except (NetworkError, RemoteProtocolError, StoreError, trio.TooSlowError) as error:
            _log.debug("a question of %s for mirrors came to nothing: %s", stream.peer, error)
            await stream.reset()
        finally:
            streams -= 1

    network.serve(PROTOCOL, answer)
    await trio.sleep_forever()


async def _answer(stream: Stream, store: Store) -> None:
    model = decode_question_untrusted(await _receive(stream))
    urls = await trio.to_thread.run_sync(store.mirrors, model)
    await stream.send_all(encode_answer(model, urls))


async def _receive(stream: Stream) -> bytes:
    length = length_untrusted(await stream.receive_exactly(LENGTH_SIZE))
    return await stream.receive_exactly(length)


async def ask_hints(network: Network, provider: Provider, model: CID) -> tuple[str, ...]:
    """The URLs that a peer names for a model, none if it does not know the protocol or the answer.

    Raises `RemoteProtocolError`, after which nothing it says of mirrors should count.
    """
    try:
        with trio.fail_after(PATIENCE):
            stream = await network.open_stream(provider, PROTOCOL)
            try:
                await stream.send_all(encode_question(model))
                return decode_answer_untrusted(await _receive(stream), model)
            finally:
                await stream.reset()
    except (NetworkError, trio.TooSlowError) as error:
        _log.debug("%s names no mirrors: %s", provider.peer, error)
        return ()


@dataclass(slots=True, eq=False)
class Hinting:
    """The hints of one fetch. `run` it beside the fetch."""

    network: Network
    model: CID
    swarm: Swarm
    """The peers to ask, and what the mirrors join."""
    web: WebSources | None
    """What makes candidates of mirrors; None when the user did not allow that any be followed."""
    names: Sequence[str] = ()
    """The model's files."""
    known: trio.Event = field(default_factory=trio.Event)
    """Set once `names` are: until then no hint means anything."""
    _named: dict[str, list[str]] = field(default_factory=dict)
    """URL to those who named it, in the order of arrival."""
    _followed: dict[str, Mirror] = field(default_factory=dict)
    _asked: set[str] = field(default_factory=set)

    def learn(self, names: Sequence[str]) -> None:
        """Take in what the model's files are called."""
        self.names = names
        self.known.set()

    def hints(self) -> tuple[Hint, ...]:
        """What was named so far."""
        asked = {url for mirror in self._followed.values() for url in mirror.urls}
        directories = set(self._followed)
        return tuple(
            Hint(url, tuple(peers), is_public(url), url in asked or url in directories)
            for url, peers in self._named.items()
        )

    async def run(self) -> None:
        """Ask whoever joins, until cancelled."""
        await self.known.wait()
        async with trio.open_nursery() as nursery:
            while len(self._asked) < ASKED:
                for provider in self.swarm.joined():
                    # A web server that was named or followed is asked nothing of the kind.
                    asked = provider.peer in self._asked or "://" in provider.peer
                    if not asked and len(self._asked) < ASKED:
                        self._asked.add(provider.peer)
                        nursery.start_soon(self._ask, provider)
                await trio.sleep(LOOK_EVERY)

    async def _ask(self, provider: Provider) -> None:
        try:
            urls = await ask_hints(self.network, provider, self.model)
        except OmniError as error:
            _log.info("what %s says of mirrors is of no use: %s", provider.peer, error)
            return
        for url in urls:
            if url in self._named or len(self._named) < REMEMBERED:
                self._named.setdefault(url, []).append(provider.peer)
        if self.web is not None:
            self._follow(self.web)

    def _follow(self, web: WebSources) -> None:
        """Those that most peers name first, as far as so many are followed at all."""
        public = [url for url in self._named if is_public(url)]
        for mirror in mirrors_of(sorted(public, key=lambda url: -len(self._named[url])), self.names):
            if len(self._followed) < FOLLOWED and mirror.url not in self._followed:
                self._followed[mirror.url] = mirror
                _log.info("asking %s, which peers named", mirror.url)
                self.swarm.add(web.hinted(mirror))


def advised(failure: OmniError | None, hints: Sequence[Hint]) -> OmniError | None:
    """A failure for want of sources, with those that were named and not asked."""
    idle = [hint.url for hint in hints if hint.public and not hint.followed]
    if not isinstance(failure, NoProviders | FetchTimedOut) or not idle:
        return failure
    remedy = f"Peers name {', '.join(idle[:3])}: allow such with --mirrors, or add one with --from."
    return type(failure)(failure.message, remedy=remedy)

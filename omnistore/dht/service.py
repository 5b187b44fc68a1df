"""The DHT as `ContentRouting`: a thin shell around `lookup` and `schedule` (spec/04-discovery §4-§5).

Nothing is cached: every find asks the network. Every announcement and value is confirmed, by asking the
peers that should have it; a node without DHT peers announces nothing, and tries again when one
appears. Providers found are claims: that one is dead is for the caller to notice, and to have skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import trio

from omnistore.cid import CID
from omnistore.dht.interface import Answer, Kademlia
from omnistore.dht.lookup import Lookup
from omnistore.dht.records import merge, provider_key
from omnistore.dht.schedule import (
    Event,
    Forget,
    Held,
    Moved,
    PeerAppeared,
    Provide,
    Provided,
    ReprovideSchedule,
    Tick,
)
from omnistore.errors import PeerUnreachable, RemoteProtocolError
from omnistore.net.interface import Provider

logger = logging.getLogger(__name__)

ASK_DEADLINE: Final = 5.0
"""Seconds one peer may take for one question."""
WALK_DEADLINE: Final = 20.0
"""Seconds for a whole lookup."""
FIND_GRACE: Final = 1.0
"""Seconds that a find goes on after its first provider, for peers that are slow or gone."""
CONFIRM_TRIES: Final = 2
"""Times a record is sent to a peer that does not show it."""

Question: TypeAlias = Callable[[Provider, bytes], Awaitable[Answer]]
"""What a lookup asks each peer about its key."""


@dataclass(slots=True)
class DHTService:
    """Finds providers and values, and keeps what this node holds announced while `run` runs."""

    node: Kademlia
    schedule: ReprovideSchedule = field(default_factory=ReprovideSchedule)
    on_provided: Callable[[CID, int], None] = lambda cid, copies: None
    """Called after every announcement, with the copies confirmed."""
    _events: tuple[trio.MemorySendChannel[Event], trio.MemoryReceiveChannel[Event]] = field(
        default_factory=lambda: trio.open_memory_channel[Event](float("inf"))
    )

    def hold(self, cids: Iterable[CID]) -> None:
        """Announce exactly these from now on."""
        self._events[0].send_nowait(Held(frozenset(cids)))

    def moved(self) -> None:
        """Our addresses changed: announce everything again."""
        self._events[0].send_nowait(Moved())

    async def run(self) -> None:
        """Announce what is due, for ever."""
        self.node.on_peer(lambda: self._events[0].send_nowait(PeerAppeared()))
        event: Event = Tick()
        async with trio.open_nursery() as nursery:
            while True:
                for command in self.schedule.step(event, trio.current_time()):
                    match command:
                        case Provide(cid):
                            nursery.start_soon(self._announce, cid)
                        case Forget(cid):
                            self.node.forget_own(provider_key(cid))
                event = Tick()
                with trio.CancelScope(deadline=self.schedule.wake_at()):
                    event = await self._events[1].receive()

    async def _announce(self, cid: CID) -> None:
        copies = await self.provide(cid)
        self._events[0].send_nowait(Provided(cid, copies))
        self.on_provided(cid, copies)

    async def provide(self, cid: CID) -> int:
        """Announce that we hold `cid`; the number of peers confirmed to have the record."""
        key = provider_key(cid)
        self.node.keep_own(key)
        lookup, _ = await self._walk(key)
        confirmed: set[str] = set()
        async with trio.open_nursery() as nursery:
            for peer in lookup.closest():
                nursery.start_soon(self._place, peer, key, confirmed)
        return len(confirmed)

    async def find_providers(
        self, cid: CID, *, limit: int = 20, skip: Collection[str] = ()
    ) -> Sequence[Provider]:
        """Peers that claim to hold `cid`, without us and `skip`, each once. Empty when there are none."""
        key = provider_key(cid)
        _, answers = await self._walk(
            key, settled=lambda answer: any(peer.peer not in skip for peer in answer.providers)
        )
        found = [provider for answer in answers for provider in answer.providers]
        others = [peer for peer in (*found, *self.node.own_records(key)) if peer.peer not in skip]
        return merge(others, without=self.node.peer_id, limit=limit)

    async def closest(self, key: bytes) -> Sequence[Provider]:
        """The peers closest to a key that answer, closest first."""
        lookup, _ = await self._walk(key)
        return lookup.closest()

    async def put_value(self, key: bytes, value: bytes) -> int:
        """Leave a value with the closest peers; how many of them were seen to keep it afterwards.

        A peer that keeps a better one does not count. Raises `RemoteProtocolError` for a value that
        the rules of its key refuse.
        """
        self.node.keep_value(key, value)
        lookup, _ = await self._walk(key, ask=self.node.ask_value)
        confirmed: set[str] = set()
        async with trio.open_nursery() as nursery:
            for peer in lookup.closest():
                nursery.start_soon(self._place_value, peer, key, value, confirmed)
        return len(confirmed)

    async def get_values(self, key: bytes) -> Sequence[bytes]:
        """The different values that the closest peers and this node keep, the right one first.

        All of the closest peers are asked, so that one with an old value decides nothing.
        """
        _, answers = await self._walk(key, ask=self.node.ask_value)
        values = [answer.value for answer in answers if answer.value is not None]
        own = self.node.own_value(key)
        return self.node.sort_values(key, values if own is None else [*values, own])

    async def _place_value(self, peer: Provider, key: bytes, value: bytes, confirmed: set[str]) -> None:
        """Leave a value with a peer and look whether it is there."""
        for _ in range(CONFIRM_TRIES):
            try:
                with trio.fail_after(ASK_DEADLINE):
                    await self.node.put_value(peer, key, value)
                    answer = await self.node.ask_value(peer, key)
            except (PeerUnreachable, RemoteProtocolError, trio.TooSlowError) as error:
                logger.debug("%s did not take a value: %r", peer.peer, error)
                continue
            if answer.value == value:
                confirmed.add(peer.peer)
                return

    async def _place(self, peer: Provider, key: bytes, confirmed: set[str]) -> None:
        """Leave our record with a peer and look whether it is there."""
        for _ in range(CONFIRM_TRIES):
            try:
                with trio.fail_after(ASK_DEADLINE):
                    await self.node.add_provider(peer, key)
                    answer = await self.node.ask_providers(peer, key)
            except (PeerUnreachable, RemoteProtocolError, trio.TooSlowError) as error:
                logger.debug("%s did not take a record: %r", peer.peer, error)
                continue
            if any(provider.peer == self.node.peer_id for provider in answer.providers):
                confirmed.add(peer.peer)
                return

    async def _walk(
        self,
        key: bytes,
        ask: Question | None = None,
        settled: Callable[[Answer], bool] = lambda answer: False,
    ) -> tuple[Lookup, list[Answer]]:
        """Look a key up: the finished lookup, and every answer on the way, in order of arrival.

        It ends `FIND_GRACE` after the first answer that is `settled`, if not before.
        """
        lookup = Lookup(key, self.node.peer_id)
        lookup.learn(self.node.start_peers(key))
        question = ask or self.node.ask_providers
        answers: list[Answer] = []
        deadline = trio.current_time() + WALK_DEADLINE
        send, receive = trio.open_memory_channel[tuple[str, Answer | None]](float("inf"))

        async def report(peer: Provider) -> None:
            send.send_nowait((peer.peer, await self._ask(peer, key, question)))

        with trio.CancelScope(deadline=deadline) as walking:
            async with trio.open_nursery() as nursery:
                while not lookup.done:
                    for peer in lookup.next_peers():
                        nursery.start_soon(report, peer)
                    asked, answer = await receive.receive()
                    if answer is None:
                        lookup.failed(asked)
                        continue
                    lookup.answered(asked, answer.closer)
                    if settled(answer):
                        walking.deadline = min(walking.deadline, trio.current_time() + FIND_GRACE)
                    answers.append(answer)
                nursery.cancel_scope.cancel()
        return lookup, answers

    async def _ask(self, peer: Provider, key: bytes, question: Question) -> Answer | None:
        try:
            with trio.fail_after(ASK_DEADLINE):
                return await question(peer, key)
        except (PeerUnreachable, RemoteProtocolError, trio.TooSlowError) as error:
            logger.debug("%s did not answer a question: %r", peer.peer, error)
            self.node.drop_peer(peer.peer)
            return None

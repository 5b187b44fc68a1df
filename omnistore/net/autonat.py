"""AutoNAT: others dial us back and say whether they could (libp2p specs, autonat v1; spec/04-discovery §10).

In place of py-libp2p 0.8.1's own, which calls whoever it is connected to already reached, and so takes a
closed port for an open one. Here a dial back is always a new connection, made from no port that the asker
has sent to, and counts only when the asker proves its identity on it; then it is closed. The shell around
`reachability` (asking) and `dialback` (answering).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import trio
from libp2p.host.autonat.pb import autonat_pb2 as pb
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from omnistore.dht.records import peer_untrusted
from omnistore.errors import NetworkError, ProtocolError
from omnistore.net import delimited
from omnistore.net.addresses import CIRCUIT
from omnistore.net.dialback import Declined, DialBackLimits, DialBacks
from omnistore.net.interface import Provider, Stream
from omnistore.net.libp2p import Libp2pNetwork, Libp2pStream
from omnistore.net.observed import agent_of
from omnistore.net.reachability import Reachability, Vote, Votes, scope

logger = logging.getLogger(__name__)

PROTOCOL: Final = "/libp2p/autonat/1.0.0"
LOOK_EVERY: Final = 2.0
"""Seconds between looks whether somebody new can be asked."""
SETTLE: Final = 1.0
"""Seconds after the start: the first peers connect."""
ANSWER_SECONDS: Final = 20.0
"""For one peer to dial us at all our addresses; go-libp2p takes up to 15."""
MAX_ADDRS: Final = 16
"""Of our addresses named in a question."""
MISLED: Final = "js-libp2p"
"""In the agent of peers that are not asked: @libp2p/autonat (3.0.28) takes the connection that the question
came over for the one that it dialled, says that it failed, and closes it with all that runs there, circuits
included."""


@dataclass(slots=True, eq=False)
class DialBackServer:
    """Answers those who ask whether they can be dialled. `install` it once."""

    network: Libp2pNetwork
    limits: DialBackLimits = field(default_factory=DialBackLimits)
    state: DialBacks = field(init=False)

    def __post_init__(self) -> None:
        self.state = DialBacks(self.limits)

    def install(self) -> None:
        """Answer from now on."""
        self.network.serve(PROTOCOL, self._serve)

    async def _serve(self, stream: Stream) -> None:
        assert isinstance(stream, Libp2pStream)
        try:
            with trio.fail_after(self.limits.seconds):
                asked = await delimited.receive_untrusted(stream, pb.Message)
        except (ProtocolError, trio.TooSlowError) as error:
            logger.info("%s asks for no dial that makes sense: %s", stream.peer, error)
            await _answer(stream, "E_BAD_REQUEST", "not understood")
            return
        decided = self._decide(stream, asked)
        if isinstance(decided, Declined):
            await _answer(stream, decided.status, decided.why)
            return
        reached = await self._dial(decided, ID.from_base58(stream.peer))
        self.state.outcomes["failed" if reached is None else "reached"] += 1
        if reached is None:
            await _answer(stream, "E_DIAL_ERROR", f"no answer at {', '.join(decided)}")
        else:
            await _answer(stream, "OK", "", reached)

    def _decide(self, stream: Libp2pStream, asked: Any) -> list[str] | Declined:
        if asked.type != pb.Message.DIAL or asked.dial.peer.id != ID.from_base58(stream.peer).to_bytes():
            return Declined("E_BAD_REQUEST", "ask to be dialled yourself")
        host = stream.remote_host
        if stream.relayed or host is None:
            return Declined("E_DIAL_REFUSED", "asked over a relay, where nobody sees your address")
        # Reads no more than it keeps, however many there are.
        named = peer_untrusted(asked.dial.peer.id, asked.dial.peer.addrs[: 2 * MAX_ADDRS])
        return self.state.ask(stream.peer, host, named.addrs, trio.current_time())

    async def _dial(self, addrs: Sequence[str], peer_id: Any) -> str | None:
        """The first of `addrs` where that very peer answers."""
        found: list[str] = []

        async def attempt(addr: str) -> None:
            try:
                await self._knock(Multiaddr(addr), peer_id)
            except Exception as error:  # noqa: BLE001  # upstream raises anything; it is one address that failed
                logger.debug("dialling %s back at %s failed: %r", peer_id, addr, error)
            else:
                found.append(addr)
                race.cancel()

        with trio.move_on_after(self.limits.seconds) as race:
            async with trio.open_nursery() as nursery:
                for addr in addrs:
                    nursery.start_soon(attempt, addr)
        return found[0] if found else None

    async def _knock(self, addr: Any, peer_id: Any) -> None:
        """Connect, have the peer prove its identity, and hang up."""
        swarm = self.network.host.get_network()
        raw = await swarm.transport_manager.transport_for_dialing(addr).dial(addr)
        try:
            await swarm.upgrader.upgrade_security(raw, True, peer_id)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await raw.close()


@dataclass(slots=True, eq=False)
class Autonat:
    """Finds out whether this node can be dialled. `run` it beside the network."""

    network: Libp2pNetwork
    on_change: Callable[[Reachability], None] = lambda found: None
    """Called when what is known changed: its state, or the addresses agreed on."""
    shunned: Callable[[str], bool] = lambda peer: False
    """Peers that are not asked: those that a hole was punched to find us where strangers would not."""
    rng: random.Random = field(default_factory=random.SystemRandom)
    votes: Votes = field(default_factory=Votes)
    _asking: trio.Lock = field(default_factory=trio.Lock)
    _addrs: frozenset[str] = frozenset()
    """Our own when the votes were cast."""
    _told: tuple[object, ...] = ("unknown", ())

    @property
    def reachability(self) -> Reachability:
        """What is known now."""
        return self.votes.reachability(trio.current_time())

    async def run(self) -> None:
        """Ask whoever is connected, as often as needed, for ever."""
        await trio.sleep(SETTLE)
        while True:
            await self.ask_around()
            await trio.sleep(LOOK_EVERY)

    async def ask_around(self) -> None:
        """Ask those who are connected and have not been asked, as far as answers are missing."""
        async with self._asking:
            await self._ask_around()

    async def _ask_around(self) -> None:
        direct = self.network.claimed()
        if direct != self._addrs:
            self._addrs = direct
            self.votes.clear()
        if direct:
            async with trio.open_nursery() as nursery:
                for peer in self.votes.to_ask(self._connected(), trio.current_time()):
                    nursery.start_soon(self._ask, peer)
        self._tell()

    def _connected(self) -> dict[str, str]:
        """Peers with a direct connection and where they are, in random order: nobody can be first."""
        found = {
            peer: at[-1][0]
            for peer in self.network.peers()
            if not self.shunned(peer) and (at := self.network.remote_addresses(peer))
        }
        peers = sorted(found)
        self.rng.shuffle(peers)
        return {peer: found[peer] for peer in peers}

    async def _ask(self, peer: str) -> None:
        answered, vote = False, None
        try:
            with trio.fail_after(ANSWER_SECONDS):
                if MISLED in await agent_of(self.network, peer):
                    answered = True
                else:
                    vote = await self._ask_untrusted(peer)
            if vote is not None:
                answered = True
                self.votes.cast(peer, vote)
        except (NetworkError, ProtocolError, trio.TooSlowError) as error:
            logger.debug("%s does not say whether it can dial us: %s", peer, error)
        self.votes.asked(peer, trio.current_time(), answered=answered)

    async def _ask_untrusted(self, peer: str) -> Vote | None:
        """One peer's vote; None for no opinion. Raises `PeerUnreachable` or `RemoteProtocolError`."""
        stream = await self.network.open_stream(Provider(peer), PROTOCOL)
        try:
            assert isinstance(stream, Libp2pStream)
            host = stream.remote_host
            if host is None or stream.relayed:
                return None
            question = pb.Message(type=pb.Message.DIAL)
            question.dial.peer.id = ID.from_base58(self.network.peer_id).to_bytes()
            named = [Multiaddr(addr.partition("/p2p/")[0]) for addr in sorted(self._addrs, key=_local)]
            question.dial.peer.addrs.extend(addr.to_bytes() for addr in named[:MAX_ADDRS])
            await delimited.send(stream, question)
            answer = await delimited.receive_untrusted(stream, pb.Message)
        finally:
            await stream.aclose()
        return self._vote_untrusted(host, answer)

    def _vote_untrusted(self, host: str, answer: Any) -> Vote | None:
        now, said = trio.current_time(), answer.dialResponse
        if answer.type == pb.Message.DIAL_RESPONSE and said.status == pb.Message.E_DIAL_ERROR:
            return Vote(host, reached=False, at=now)
        if answer.type != pb.Message.DIAL_RESPONSE or said.status != pb.Message.OK:
            return None
        if not said.addr:
            # Some leave out what is zero, as OK is; but not all of it.
            return Vote(host, reached=True, at=now) if said.HasField("status") else None
        addrs = peer_untrusted(ID.from_base58(self.network.peer_id).to_bytes(), [said.addr]).addrs
        ports = {addr.split("/")[4] for addr in self._addrs}
        # Reached where we do not listen, or at a name: whatever it means, it is no vote.
        if not addrs or CIRCUIT in addrs[0] or "/dns" in addrs[0] or addrs[0].split("/")[4] not in ports:
            return None
        return Vote(host, reached=True, at=now, addr=addrs[0])

    def _tell(self) -> None:
        found = self.reachability
        told = (found.state, found.addrs if found.state == "public" else ())
        if told != self._told:
            self._told = told
            self.on_change(found)


def _local(addr: str) -> bool:
    """What is of no use to others goes last."""
    kind, host = addr.split("/")[1:3]
    return kind in ("ip4", "ip6") and scope(host) == "loopback"


async def _answer(stream: Stream, status: str, text: str, addr: str = "") -> None:
    said = pb.Message.DialResponse(status=pb.Message.ResponseStatus.Value(status), statusText=text)
    if addr:
        said.addr = Multiaddr(addr).to_bytes()
    await delimited.send(stream, pb.Message(type=pb.Message.DIAL_RESPONSE, dialResponse=said))

"""A relay for others: circuit relay v2's hop side (libp2p specs, relay/circuit-v2; spec/04-discovery §9).

In place of py-libp2p 0.8.1's own, which reaches 8 MB/s and bounds no bytes. The shell around
`circuits`: a stream of `HOP` is a question, and becomes one half of a circuit when it is answered with
OK. Bytes pass as they come; both ends talk Noise over it, so that they mean nothing here.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import trio
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb import circuit_pb2 as pb
from multiaddr import Multiaddr

from omnistore.errors import PeerUnreachable, RemoteProtocolError
from omnistore.net import delimited
from omnistore.net.circuits import Circuit, Refused, Relaying, RelayLimits
from omnistore.net.interface import Provider, Stream
from omnistore.net.libp2p import Libp2pNetwork, Libp2pStream

logger = logging.getLogger(__name__)

HOP: Final = "/libp2p/circuit/relay/0.2.0/hop"
STOP: Final = "/libp2p/circuit/relay/0.2.0/stop"
PIECE: Final = 1 << 18
"""Most bytes passed on at once."""
LOOK_EVERY: Final = 5.0
"""Seconds between looks who is still connected."""
ASK_SECONDS: Final = 10.0
"""For a question to arrive whole."""
MAX_ADDRS: Final = 8
"""Of our addresses named in a reservation."""


@dataclass(slots=True)
class Relay:
    """One node's relaying. `run` it beside the network."""

    network: Libp2pNetwork
    limits: RelayLimits = field(default_factory=RelayLimits)
    state: Relaying = field(init=False)

    def __post_init__(self) -> None:
        self.state = Relaying(self.limits)

    async def run(self) -> None:
        """Serve, and let go of the reservations of peers that went away, for ever."""
        self.network.serve(HOP, self._serve)
        while True:
            await trio.sleep(LOOK_EVERY)
            connected = set(self.network.peers())
            for peer in self.state.holders():
                if peer not in connected:
                    self.state.lost(peer)
            # Its connection is what a reservation is for, with or without a circuit on it.
            self.network.needed.intersection_update(self.state.holders())

    async def _serve(self, stream: Stream) -> None:
        assert isinstance(stream, Libp2pStream)
        try:
            with trio.fail_after(ASK_SECONDS):
                asked = await delimited.receive_untrusted(stream, pb.HopMessage)
        except (RemoteProtocolError, trio.TooSlowError) as error:
            logger.info("%s asked the relay nothing that makes sense: %s", stream.peer, error)
            await _answer(stream, "MALFORMED_MESSAGE")
            return
        if stream.relayed:
            await _answer(stream, "PERMISSION_DENIED")
        elif asked.type == pb.HopMessage.RESERVE:
            await self._reserve(stream)
        elif asked.type == pb.HopMessage.CONNECT and asked.HasField("peer"):
            await self._connect(stream, asked.peer.id)
        else:
            await _answer(stream, "UNEXPECTED_MESSAGE")

    async def _reserve(self, stream: Libp2pStream) -> None:
        granted = self.state.reserve(stream.peer, stream.remote_host or "", trio.current_time())
        if isinstance(granted, Refused):
            await _answer(stream, granted.why)
            return
        self.network.needed.add(stream.peer)
        expire = int(time.time() + granted - trio.current_time())
        addrs = [Multiaddr(addr).to_bytes() for addr in self.network.addrs() if "/p2p-circuit" not in addr]
        answer = _status("OK", limit=self._limit())
        answer.reservation.CopyFrom(pb.Reservation(expire=expire, addrs=addrs[:MAX_ADDRS]))
        await delimited.send(stream, answer)

    async def _connect(self, stream: Libp2pStream, wanted: bytes) -> None:
        target = str(ID(wanted))
        granted = self.state.connect(stream.peer, target, trio.current_time())
        if isinstance(granted, Refused):
            await _answer(stream, granted.why)
            return
        far: Stream | None = None
        try:
            with trio.move_on_after(self.limits.opening_seconds):
                far = await self._open(stream.peer, target)
            if far is None:
                await _answer(stream, "CONNECTION_FAILED")
                return
            await delimited.send(stream, _status("OK", limit=self._limit()))
            await self._pass_on(granted, stream, far)
        finally:
            self.state.closed(granted)
            if far is not None:
                await far.reset()

    async def _open(self, source: str, target: str) -> Stream | None:
        """Ask the target to take a circuit; None if it does not."""
        far: Stream | None = None
        try:
            if target not in self.network.peers():
                return None
            far = await self.network.open_stream(Provider(target), STOP)
            asked = pb.StopMessage(type=pb.StopMessage.CONNECT, limit=self._limit())
            asked.peer.id = ID.from_base58(source).to_bytes()
            await delimited.send(far, asked)
            answer = await delimited.receive_untrusted(far, pb.StopMessage)
            if answer.type == pb.StopMessage.STATUS and answer.status == pb.Status.OK:
                opened, far = far, None
                return opened
            return None
        except (PeerUnreachable, RemoteProtocolError) as error:
            logger.info("%s takes no circuit: %s", target, error)
            return None
        finally:
            if far is not None:
                await far.reset()

    async def _pass_on(self, circuit: Circuit, near: Stream, far: Stream) -> None:
        """Both directions, until both have ended, a limit is reached, or either side breaks."""
        with trio.move_on_at(circuit.ends_at) as scope:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(partial(self._pump, circuit, near, far, scope))
                    nursery.start_soon(partial(self._pump, circuit, far, near, scope))
                await near.aclose()
                await far.aclose()
            except* PeerUnreachable as error:
                logger.debug("a circuit to %s broke: %s", circuit.target, error)
        # What did not end in good order is cut.
        await near.reset()

    async def _pump(self, circuit: Circuit, source: Stream, to: Stream, scope: trio.CancelScope) -> None:
        while data := await source.receive_some(PIECE):
            if not self.state.moved(circuit, len(data)):
                logger.info("the circuit from %s to %s is used up", circuit.source, circuit.target)
                scope.cancel()
                return
            await to.send_all(data)
        assert isinstance(to, Libp2pStream)
        await to.finish()

    def _limit(self) -> Any:
        return pb.Limit(duration=int(self.limits.circuit_seconds), data=self.limits.circuit_bytes)


def _status(name: str, limit: Any = None) -> Any:
    answer = pb.HopMessage(type=pb.HopMessage.STATUS, status=pb.Status.Value(name))
    if limit is not None:
        answer.limit.CopyFrom(limit)
    return answer


async def _answer(stream: Stream, name: str) -> None:
    await delimited.send(stream, _status(name))

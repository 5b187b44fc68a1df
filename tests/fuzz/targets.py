"""What strangers' bytes reach first, as functions of bytes: `TARGETS`, each with inputs to begin from.

What must hold, whatever the bytes: they are taken in, or refused with the one class that the function
says it raises; and where there is a second way to tell, both agree (decoded and encoded again, fed whole
and in pieces). Anything else is an exception here. `tests.fuzz.one` runs one of them under atheris,
`tests/properties` some hundred inputs of each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.relay.circuit_v2.pb import circuit_pb2 as circuit

from omnistore import dagcbor
from omnistore.block import Block
from omnistore.chunker.gguf import read_header_untrusted
from omnistore.cid import CID, RAW
from omnistore.dht.names import NAMESPACE, NameRules, name_key, record_untrusted, sign
from omnistore.dht.records import peers_untrusted
from omnistore.dht.values import check_value_untrusted
from omnistore.errors import (
    BadConfig,
    BadNameRecord,
    BadSignature,
    MalformedGGUF,
    MalformedManifest,
    PeerUnreachable,
    RemoteProtocolError,
    UnsupportedGGUF,
)
from omnistore.invite import invite, token_untrusted
from omnistore.keys import PrivateKey
from omnistore.manifest import open_untrusted, part_links_untrusted
from omnistore.net import delimited
from omnistore.net.acquaintances import _parse_untrusted
from omnistore.net.addresses import parse_any_untrusted, parse_dialable_untrusted, parse_untrusted
from omnistore.net.mdns import encode_record, parse_record_untrusted
from omnistore.net.muxing import Muxing
from omnistore.net.records import Opener, Sealer
from omnistore.testing.seeding import seeded
from omnistore.testing.tiny_gguf import tiny_model
from omnistore.transfer.asks import Asks
from omnistore.transfer.bitswap import Messages, wantlist_untrusted
from omnistore.transfer.demand import Wanted
from omnistore.transfer.messages import (
    REQUESTER,
    SERVER,
    Cancel,
    Decoder,
    Deliver,
    Have,
    Hello,
    Holds,
    Missing,
    Want,
    encode,
)

KEY = ChaCha20Poly1305(bytes(32))
OURS = PrivateKey(bytes(32))
NOW: Final = 2_000_000_000.0
_PEER = OURS.public.peer_id


@dataclass(frozen=True)
class Target:
    """One function of bytes."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]] = lambda: ()


# --- the network ------------------------------------------------------------------------------


def muxing(data: bytes) -> None:
    """Frames, in two pieces, for a core that has a stream of its own open."""
    core = Muxing(True)
    core.open(0.0)
    core.next_frames()
    cut = data[0] if data else 0
    try:
        for piece in (data[1 : 1 + cut], data[1 + cut :]):
            for number, stream in enumerate(list(core.streams.values())):
                core.take(stream, 7, 0.0)
                if number % 2 == 0 and not stream.received:
                    rooms = iter([memoryview(bytearray(size)) for size in (5 + cut, 3, 70)])
                    core.lend(stream, next(rooms), 0.0, lambda rooms=rooms: next(rooms, None))  # type: ignore[misc]
            core.receive_untrusted(piece, 0.0)
            for stream in list(core.streams.values()):
                core.take(stream, 7, 0.0)
            core.next_frames()
        core.end_untrusted()
    except RemoteProtocolError:
        return
    assert core.buffered == sum(stream.buffered for stream in core.streams.values())
    assert all(stream.receive_window >= 0 for stream in core.streams.values())


class Found:
    """Takes everything in, every second record where it lends room."""

    def __init__(self) -> None:
        self.plaintexts: list[bytes] = []
        self._lent = memoryview(b"")

    def room(self, size: int) -> memoryview | None:
        self._lent = memoryview(bytearray(size))
        return self._lent if len(self.plaintexts) % 2 and size else None

    def filled_untrusted(self, size: int, now: float) -> None:
        self.plaintexts.append(bytes(self._lent))

    def receive_untrusted(self, plaintext: bytes, now: float) -> None:
        self.plaintexts.append(plaintext)


def records(data: bytes) -> None:
    """Whatever follows a good record; nothing but that record may come out."""
    opener = Opener(KEY)
    good = bytes(Sealer(KEY).seal([b"good"]))
    found = Found()
    try:
        for piece in (good, data):
            while piece:
                room = opener.room()
                count = min(len(room), len(piece))
                room[:count] = piece[:count]
                piece = piece[count:]
                opener.receive_untrusted(count, found, 0.0)
        opener.end_untrusted()
        assert not data
    except RemoteProtocolError:
        pass
    assert found.plaintexts == [b"good"]


def mdns(data: bytes) -> None:
    """A TXT record: a provider that can be written again, or none."""
    found = parse_record_untrusted(data)
    if found is not None:
        again = parse_record_untrusted(encode_record(found.peer, found.addrs))
        assert again is not None
        assert set(again.addrs) == set(found.addrs)


def addresses(data: bytes) -> None:
    """Multiaddrs as text."""
    text = data.decode("utf-8", "replace")
    for parse in (parse_untrusted, parse_any_untrusted, parse_dialable_untrusted):
        with suppress(BadConfig):
            parse(text)


def acquaintances(data: bytes) -> None:
    """The file of peers met before."""
    for one in _parse_untrusted(data, NOW):
        assert one.met <= NOW
        assert one.addrs


class _Canned:
    """As much of a stream as a reader of one message needs."""

    peer = "somebody"

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def receive_exactly(self, count: int) -> bytes:
        found, self.data = self.data[:count], self.data[count:]
        if len(found) < count:
            raise PeerUnreachable("somebody ended the stream early")
        return found


def relay(data: bytes) -> None:
    """Messages of the relay protocols, behind their length."""

    async def read() -> None:
        for kind in (circuit.HopMessage, circuit.StopMessage):
            stream: Any = _Canned(data)
            with suppress(RemoteProtocolError, PeerUnreachable):
                message = await delimited.receive_untrusted(stream, kind)
                assert kind.FromString(message.SerializeToString()) == message

    coroutine = read()
    # It waits for nothing, so it needs no loop.
    with suppress(StopIteration):
        coroutine.send(None)


# --- the DHT ----------------------------------------------------------------------------------


def dht(data: bytes) -> None:
    """An answer's peers, and a value under a name's key."""
    try:
        message = Message.FromString(data)
    except Exception:  # noqa: BLE001  # protobuf's own, which kademlia translates
        return
    with suppress(RemoteProtocolError):
        peers_untrusted([(peer.id, peer.addrs) for peer in (*message.providerPeers, *message.closerPeers)])
    with suppress(RemoteProtocolError):
        check_value_untrusted({NAMESPACE: NameRules()}, message.record.key, message.record.value)


def names(data: bytes) -> None:
    """A name's record."""
    with suppress(BadNameRecord):
        assert record_untrusted(data).encode() == data


# --- models -----------------------------------------------------------------------------------


def cbor(data: bytes) -> None:
    """Canonical dag-cbor: what is taken in is encoded to the same bytes."""
    with suppress(RemoteProtocolError):
        assert dagcbor.encode(dagcbor.decode_untrusted(data, limit=1 << 20)) == data


def gguf(data: bytes) -> None:
    """A header, of a file that is as long, or far longer."""
    for size in (len(data), 1 << 40):
        with suppress(MalformedGGUF, UnsupportedGGUF):
            header = read_header_untrusted(data, file_size=size, name="fuzzed.gguf")
            for tensor in header.tensors:
                assert 0 <= tensor.offset <= size


def manifests(data: bytes) -> None:
    """A node as a manifest, signed or not, and as a part."""
    block = Block.node(data)
    with suppress(MalformedManifest, BadSignature):
        open_untrusted(block)
    with suppress(MalformedManifest):
        part_links_untrusted(block)


def invitations(data: bytes) -> None:
    """A token for a private swarm."""
    with suppress(BadConfig):
        token_untrusted(data.decode("utf-8", "replace"), NOW)


# --- transfer ---------------------------------------------------------------------------------


def _in_pieces(make: Callable[[], Any], data: bytes) -> None:
    """Fed whole or in pieces, a decoder finds the same before the same refusal."""
    outcomes = []
    for size in (len(data) or 1, 1 + len(data) // 3):
        decoder, found, fault = make(), [], ""
        try:
            for start in range(0, len(data), size):
                found += decoder(data[start : start + size])
        except RemoteProtocolError as error:
            # What a piece completed before its fault is lost with it.
            found, fault = [], error.message
        outcomes.append((found, fault))
    assert outcomes[0] == outcomes[1]


def transfer(data: bytes) -> None:
    """Messages of the transfer protocol, of either side."""
    for kind in (REQUESTER, SERVER):
        _in_pieces(lambda kind=kind: Decoder(kind).feed_untrusted, data)  # type: ignore[misc]


def answers(data: bytes) -> None:
    """What a server answers to asks that are open."""
    side = Asks()
    side.want([Wanted(CID.of_digest(RAW, bytes([n]) * 32), 100, exact=n % 2 == 0) for n in range(5)])
    side.have([CID.of_digest(RAW, bytes(32))])
    with suppress(RemoteProtocolError):
        side.receive_untrusted(encode(Hello(10, 10)))
        side.receive_untrusted(data)


def bitswap(data: bytes) -> None:
    """Bitswap messages, and a wantlist."""
    _in_pieces(lambda: Messages().feed_untrusted, data)
    with suppress(RemoteProtocolError):
        wantlist_untrusted(data)


# --- inference --------------------------------------------------------------------------------


def frames(data: bytes) -> None:
    """Frames of a pipeline; what was taken in is encoded to the same bytes."""
    from omninfer.frames import CACHING_COORDINATOR, CACHING_LENDER
    from omninfer.framing import Decoder as Frames
    from omninfer.framing import encode as encode_frame

    for accepts in (CACHING_COORDINATOR, CACHING_LENDER):
        _in_pieces(lambda accepts=accepts: Frames(accepts).feed_untrusted, data)  # type: ignore[misc]
        decoder = Frames(accepts)
        with suppress(RemoteProtocolError):
            found = decoder.feed_untrusted(data)
            taken = b"".join(map(encode_frame, found))
            assert data.startswith(taken)
            assert taken == data or not decoder.between_frames


# --- what to begin from -----------------------------------------------------------------------


@cache
def _model() -> tuple[bytes, tuple[bytes, ...]]:
    """A small GGUF, and its nodes."""
    data = tiny_model(2).build()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tiny.gguf"
        path.write_bytes(data)
        store, cid = seeded(path, OURS)
        model = store.model(cid)
        cids = [cid, model.manifest_cid, *(ref.cid for ref in model.manifest.parts)]
        return data, tuple(bytes(store.read(one).data) for one in cids)


def _messages() -> list[bytes]:
    cids = tuple(CID.of_digest(RAW, bytes([n]) * 32) for n in range(5))
    return [
        encode(Hello(10, 10)),
        encode(Want(0, cids)),
        encode(Cancel((0, 1))),
        encode(Have(cids[:1])),
        encode(Deliver(0, bytes(100))) + bytes(100),
        encode(Missing((1, 2))),
        encode(Holds(cids[0], b"\x1f")),
    ]


def _frames() -> list[bytes]:
    from omninfer import frames as f
    from omninfer.framing import encode as encode_frame

    hidden = f.Activations(1, 2, bytes(8))
    made: list[f.Frame] = [
        f.Ask("ort"), f.Ping(b"abc"), f.Bye(), f.Trim(0, 1), f.Drop(0), f.Profile("ort", 1, 1, 1),
        f.Progress("fetch", 0, 1), f.Ready(1, 0), f.Error("x"), f.Output(0, hidden),
        f.Forward(0, 0, 0, (1, 2), True), f.Forward(0, 0, 0, hidden, False),
    ]  # fmt: skip
    return [encode_frame(one) for one in made]


def _texts() -> tuple[str, ...]:
    return (
        f"/ip4/192.168.1.2/tcp/4141/p2p/{_PEER}",
        f"/dns4/example.org/tcp/1/p2p/{_PEER}",
        f"/ip6/fd00::1/tcp/9/p2p/{_PEER}",
    )


def _addresses() -> list[bytes]:
    return [text.encode() for text in _texts()]


def _invitation() -> list[bytes]:
    return [invite(OURS, bytes(32), _texts(), int(NOW)).encode().encode()]


def _dht() -> list[bytes]:
    record = _name_record()
    message = Message(type=Message.GET_VALUE)
    message.record.key, message.record.value = name_key(OURS.public, "tiny"), record
    message.closerPeers.add(id=bytes([0, 36, *range(36)]), addrs=[bytes.fromhex("047f000001061f90")])
    return [message.SerializeToString()]


def _name_record() -> bytes:
    return sign(OURS, "tiny", Block.node(dagcbor.encode({})).cid, 1, int(NOW)).encode()


def _relay() -> list[bytes]:
    hop = circuit.HopMessage(type=circuit.HopMessage.RESERVE)
    body = hop.SerializeToString()
    return [bytes([len(body)]) + body]


TARGETS: Final[dict[str, Target]] = {
    "muxing": Target(muxing),
    "records": Target(records),
    "mdns": Target(mdns, lambda: [encode_record(_PEER, ["/ip4/192.168.1.2/tcp/4141", "/ip6/fd00::1/tcp/9"])]),
    "addresses": Target(addresses, _addresses),
    "acquaintances": Target(
        acquaintances,
        lambda: [
            b'{"peers":[{"peer":"%s","addrs":["/ip4/1.2.3.4/tcp/1"],"met":1999999999}]}' % _PEER.encode()
        ],
    ),
    "relay": Target(relay, _relay),
    "dht": Target(dht, _dht),
    "names": Target(names, lambda: [_name_record()]),
    "cbor": Target(cbor, lambda: _model()[1]),
    "gguf": Target(gguf, lambda: [_model()[0][:4000]]),
    "manifests": Target(manifests, lambda: _model()[1]),
    "invitations": Target(
        invitations, lambda: [invite(OURS, bytes(32), _texts(), int(NOW)).encode().encode()]
    ),
    "transfer": Target(transfer, _messages),
    "answers": Target(answers, _messages),
    "bitswap": Target(bitswap, lambda: [b"\x04\x0a\x02\x0a\x00"]),
    "frames": Target(frames, _frames),
}

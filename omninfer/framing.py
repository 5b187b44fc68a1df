"""Frames as bytes: `encode` and `Decoder` (spec/06-pipeline, section "Framing").

A frame is a big-endian 32-bit length, then that many bytes of deterministic dag-cbor: a map whose
one key names the frame. A `forward` of hidden states and an `output` are followed by raw little-endian
float32, a `ping` and a `pong` by as many bytes as they say. Pure: bytes in, frames out; each frame is
checked by itself here, and against those before it in `omninfer.conversation`. float32 is the only number
format of version 1.0.0: it keeps the tokens of a pipeline those of one machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from omninfer.arch import KV_KINDS, MAX_VOCAB
from omninfer.frames import (
    LABEL_SIZE,
    LABEL_TOKENS,
    LIMITS,
    PHASES,
    REFUSALS,
    Activations,
    Ask,
    Bye,
    Cache,
    Drop,
    Error,
    Fork,
    Forward,
    Frame,
    Held,
    Keep,
    Load,
    Output,
    Ping,
    Pong,
    Profile,
    Progress,
    Ready,
    Recall,
    Refuse,
    Trim,
    name_of,
)
from omnistore import dagcbor
from omnistore.cid import CID, DAG_CBOR
from omnistore.errors import LocalProtocolError, RemoteProtocolError
from omnistore.net.interface import Provider

LENGTH_SIZE: Final = 4
"""Bytes of the length before every frame."""

# --- encoding -------------------------------------------------------------------------------


def encode(frame: Frame) -> bytes:
    """All bytes of a frame. Raises `LocalProtocolError` for one that the other side would refuse."""
    head, payload = _body(frame)
    name = name_of(frame)
    data = dagcbor.encode({name: head})
    try:
        # Whoever sends what its peer must refuse has a bug: let it show on this side.
        announced = _decode_head_untrusted(data).payload
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"a {name!r} frame breaks the protocol: {error.message}") from None
    if announced != len(payload):
        raise LocalProtocolError(f"a {name!r} frame with {len(payload)} bytes behind it, not {announced}")
    return len(data).to_bytes(LENGTH_SIZE, "big") + data + payload


def _body(frame: Frame) -> tuple[dict[str, dagcbor.Value], bytes]:
    match frame:
        case Forward():
            head, payload = _forward_body(frame)
            return head, payload
        case Output(seq, values):
            return {"seq": seq, "rows": values.rows, "columns": values.columns}, values.data
        case Load():
            return _load_body(frame), b""
        case Ask(engine):
            return {"engine": engine}, b""
        case Cache() | Trim() | Drop() | Fork() | Recall() | Keep() | Held():
            return _slots_body(frame), b""
        case Ping(data) | Pong(data):
            return {"size": len(data)}, data
        case Bye():
            return {}, b""
        case Profile(engine, memory, speed, footprint):
            return {"engine": engine, "memory": memory, "speed": speed, "footprint": footprint}, b""
        case Progress(phase, done, total):
            return {"phase": phase, "done": done, "total": total}, b""
        case Ready(size, fetched):
            return {"size": size, "fetched": fetched}, b""
        case Refuse(code, reason, remedy):
            return {"code": code, "reason": reason[: LIMITS.text], "remedy": remedy[: LIMITS.text]}, b""
        case Error(reason):
            return {"reason": reason[: LIMITS.text]}, b""


def _slots_body(frame: Cache | Trim | Drop | Fork | Recall | Keep | Held) -> dict[str, dagcbor.Value]:
    match frame:
        case Trim(slot, length) | Held(slot, length):
            return {"slot": slot, "length": length}
        case Drop(slot):
            return {"slot": slot}
        case Cache(tokens, kv):
            return {"tokens": tokens, "kv": kv}
        case Fork(slot, into, length):
            return {"slot": slot, "into": into, "length": length}
        case Recall(slot, labels) | Keep(slot, labels):
            return {"slot": slot, "labels": list(labels)}


def _forward_body(frame: Forward) -> tuple[dict[str, dagcbor.Value], bytes]:
    head: dict[str, dagcbor.Value] = {
        "seq": frame.seq,
        "slot": frame.slot,
        "position": frame.position,
        "logits": frame.logits,
    }
    if isinstance(frame.input, Activations):
        return head | {"rows": frame.input.rows, "columns": frame.input.columns}, frame.input.data
    return head | {"tokens": list(frame.input)}, b""


def _load_body(frame: Load) -> dict[str, dagcbor.Value]:
    return {
        "model": frame.model,
        "first": frame.first,
        "last": frame.last,
        "embed": frame.embed,
        "head": frame.head,
        "engine": frame.engine,
        "context": frame.context,
        "slots": frame.slots,
        "providers": [{"peer": one.peer, "addrs": list(one.addrs)} for one in frame.providers],
    }


# --- decoding -------------------------------------------------------------------------------

_Build: TypeAlias = Callable[[bytes], Frame]


@dataclass(frozen=True, slots=True)
class _Head:
    """A decoded frame that may still lack its payload."""

    name: str
    payload: int
    """Bytes that follow."""
    build: _Build


class Decoder:
    """Turns what arrives on one stream into frames, however the bytes are split."""

    def __init__(self, accepts: frozenset[str]) -> None:
        """`accepts`: names of frames; `LENDER` on a coordinator's side, `COORDINATOR` on a lender's."""
        self._accepts = accepts
        self._bytes = bytearray()
        self._head: _Head | None = None
        self._lacking = LENGTH_SIZE
        self._length_known = False
        self._dead = False

    @property
    def between_frames(self) -> bool:
        """Whether a stream may end cleanly here."""
        return not self._bytes and self._head is None and not self._length_known

    def feed_untrusted(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes. Raises `RemoteProtocolError`, after which it is useless."""
        if self._dead:
            raise LocalProtocolError("fed after the stream was found broken")
        found: list[Frame] = []
        view = memoryview(data)
        try:
            while True:
                taken = min(self._lacking - len(self._bytes), len(view))
                self._bytes += view[:taken]
                view = view[taken:]
                if len(self._bytes) < self._lacking:
                    return found
                item, self._bytes = bytes(self._bytes), bytearray()
                frame = self._take_untrusted(item)
                if frame is not None:
                    found.append(frame)
        except RemoteProtocolError:
            self._dead = True
            raise

    def _take_untrusted(self, item: bytes) -> Frame | None:
        """Use one whole item: a length, a head or a payload."""
        if self._head is not None:
            head, self._head, self._lacking = self._head, None, LENGTH_SIZE
            return head.build(item)
        if not self._length_known:
            length = int.from_bytes(item, "big")
            if not 0 < length <= LIMITS.frame:
                raise RemoteProtocolError(f"a frame of {length} bytes; 1 to {LIMITS.frame} are allowed")
            self._length_known, self._lacking = True, length
            return None
        self._length_known = False
        head = _decode_head_untrusted(item)
        if head.name not in self._accepts:
            raise RemoteProtocolError(f"a {head.name!r} frame from the side that does not send it")
        if head.payload == 0:
            self._lacking = LENGTH_SIZE
            return head.build(b"")
        self._head, self._lacking = head, head.payload
        return None


def _decode_head_untrusted(data: bytes) -> _Head:
    """Check everything of a frame but its payload."""
    value = dagcbor.decode_untrusted(data, limit=LIMITS.frame, what="a frame")
    if not isinstance(value, dict) or len(value) != 1:
        raise RemoteProtocolError("a frame is not a map with one key")
    ((name, body),) = value.items()
    check = _CHECKS.get(name)
    if check is None:
        raise RemoteProtocolError(f"unknown frame {name[:40]!r}")
    if not isinstance(body, dict):
        raise RemoteProtocolError(f"{name}: its body is not a map")
    fields = _Fields(name, body)
    payload, build = check(fields)
    fields.finish()
    return _Head(name, payload, build)


class _Fields:
    """Typed, bounded access to the fields of one frame; `finish` refuses what nobody asked for."""

    __slots__ = ("_body", "_name", "_seen")

    def __init__(self, name: str, body: Mapping[str, Any]) -> None:
        self._name = name
        self._body = body
        self._seen: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._body

    def fault(self, what: str) -> RemoteProtocolError:
        return RemoteProtocolError(f"{self._name}: {what}")

    def get(self, key: str) -> Any:
        if key not in self._body:
            raise self.fault(f"without {key}")
        self._seen.add(key)
        return self._body[key]

    def integer(self, key: str, most: int, least: int = 0) -> int:
        value = self.get(key)
        if type(value) is not int or not least <= value <= most:
            raise self.fault(f"{key} is not an integer from {least} to {most}")
        return value

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if type(value) is not bool:
            raise self.fault(f"{key} is not true or false")
        return value

    def text(self, key: str, most: int, least: int = 0) -> str:
        value = self.get(key)
        if type(value) is not str or not least <= len(value) <= most:
            raise self.fault(f"{key} is not a text of {least} to {most} characters")
        return value

    def items(self, key: str, most: int, least: int = 0) -> list[Any]:
        value = self.get(key)
        if type(value) is not list or not least <= len(value) <= most:
            raise self.fault(f"{key} is not a list of {least} to {most} items")
        return value

    def finish(self) -> None:
        unknown = self._body.keys() - self._seen
        if unknown:
            raise self.fault(f"unknown field {min(unknown)[:40]!r}")


_Check: TypeAlias = Callable[[_Fields], tuple[int, _Build]]


def _shape(f: _Fields, least_rows: int) -> tuple[int, int, int]:
    rows, columns = f.integer("rows", LIMITS.rows, least_rows), f.integer("columns", LIMITS.columns, 1)
    size = 4 * rows * columns
    if size > LIMITS.payload:
        raise f.fault(f"{rows} × {columns} numbers are {size} bytes; at most {LIMITS.payload} are allowed")
    return rows, columns, size


def _activations_untrusted(rows: int, columns: int, data: bytes) -> Activations:
    """A value that is not a number would spread through every later layer and poison the cache."""
    found = Activations(rows, columns, data)
    if not np.isfinite(found.array()).all():
        raise RemoteProtocolError("activations that are infinite or not a number")
    return found


def _forward(f: _Fields) -> tuple[int, _Build]:
    seq, slot = f.integer("seq", LIMITS.number), _slot(f)
    position, logits = f.integer("position", LIMITS.context - 1), f.flag("logits")
    if "tokens" in f:
        tokens = f.items("tokens", LIMITS.rows, 1)
        if not all(type(token) is int and 0 <= token < MAX_VOCAB for token in tokens):
            raise f.fault(f"a token that is not an integer from 0 to {MAX_VOCAB - 1}")
        whole = Forward(seq, slot, position, tuple(tokens), logits)
        return 0, lambda _: whole
    rows, columns, size = _shape(f, 1)
    return size, lambda data: Forward(
        seq, slot, position, _activations_untrusted(rows, columns, data), logits
    )


def _output(f: _Fields) -> tuple[int, _Build]:
    seq = f.integer("seq", LIMITS.number)
    rows, columns, size = _shape(f, 0)
    return size, lambda data: Output(seq, _activations_untrusted(rows, columns, data))


def _provider(f: _Fields, entry: Any) -> Provider:
    if not isinstance(entry, dict):
        raise f.fault("a provider that is not a map")
    fields = _Fields("load: a provider", entry)
    peer = fields.text("peer", LIMITS.address, 1)
    addrs = fields.items("addrs", LIMITS.addresses)
    if not all(type(addr) is str and 0 < len(addr) <= LIMITS.address for addr in addrs):
        raise fields.fault(f"an address that is not a text of 1 to {LIMITS.address} characters")
    fields.finish()
    return Provider(peer, tuple(addrs))


def _load(f: _Fields) -> tuple[int, _Build]:
    model = f.get("model")
    if not isinstance(model, CID) or model.codec != DAG_CBOR:
        raise f.fault("model is not a link to a dag-cbor node")
    frame = Load(
        model=model,
        first=f.integer("first", LIMITS.layers),
        last=f.integer("last", LIMITS.layers),
        embed=f.flag("embed"),
        head=f.flag("head"),
        engine=f.text("engine", 32, 1),
        context=f.integer("context", LIMITS.context, 1),
        slots=f.integer("slots", LIMITS.slots, 1),
        providers=tuple(_provider(f, entry) for entry in f.items("providers", LIMITS.providers)),
    )
    if frame.first > frame.last or (frame.embed and frame.first) or frame.first == frame.last:
        raise f.fault(f"layers {frame.first} to {frame.last} are no stage")
    return 0, lambda _: frame


def _labels(f: _Fields) -> tuple[bytes, ...]:
    labels = f.items("labels", LIMITS.labels, 1)
    if not all(type(label) is bytes and len(label) == LABEL_SIZE for label in labels):
        raise f.fault(f"a label that is not {LABEL_SIZE} bytes")
    return tuple(labels)


def _cache(f: _Fields) -> Cache:
    kv = next((kind for kind in KV_KINDS if kind == f.text("kv", 32)), None)
    if kv is None:
        raise f.fault(f"kv is not one of {', '.join(KV_KINDS)}")
    return Cache(f.integer("tokens", LIMITS.tokens, 1), kv)


def _fork(f: _Fields) -> Fork:
    frame = Fork(_slot(f), f.integer("into", LIMITS.slots - 1), f.integer("length", LIMITS.context))
    if frame.slot == frame.into:
        raise f.fault("a slot into itself")
    return frame


def _held(f: _Fields) -> Held:
    frame = Held(_slot(f), f.integer("length", LIMITS.labels * LABEL_TOKENS))
    if frame.length % LABEL_TOKENS:
        raise f.fault(f"length is not a multiple of {LABEL_TOKENS}")
    return frame


def _slot(f: _Fields) -> int:
    return f.integer("slot", LIMITS.slots - 1)


def _carried(kind: type[Ping] | type[Pong]) -> _Check:
    return lambda f: (f.integer("size", LIMITS.ping), kind)


def _plain(build: Callable[[_Fields], Frame]) -> _Check:
    """A frame without payload."""

    def check(f: _Fields) -> tuple[int, _Build]:
        frame = build(f)
        return 0, lambda _: frame

    return check


def _one_of(f: _Fields, key: str, allowed: frozenset[str]) -> str:
    value = f.text(key, 32)
    if value not in allowed:
        raise f.fault(f"{key} is not one of {', '.join(sorted(allowed))}")
    return value


_CHECKS: Final[Mapping[str, _Check]] = {
    "ask": _plain(lambda f: Ask(f.text("engine", 32, 1))),
    "load": _load,
    "forward": _forward,
    "trim": _plain(lambda f: Trim(_slot(f), f.integer("length", LIMITS.context))),
    "drop": _plain(lambda f: Drop(_slot(f))),
    "cache": _plain(_cache),
    "fork": _plain(_fork),
    "recall": _plain(lambda f: Recall(_slot(f), _labels(f))),
    "keep": _plain(lambda f: Keep(_slot(f), _labels(f))),
    "held": _plain(_held),
    "ping": _carried(Ping),
    "bye": _plain(lambda f: Bye()),
    "profile": _plain(
        lambda f: Profile(
            f.text("engine", 32, 1),
            f.integer("memory", LIMITS.number),
            f.integer("speed", LIMITS.number, 1),
            f.integer("footprint", 100_000, 1),
        )
    ),
    "progress": _plain(
        lambda f: Progress(
            _one_of(f, "phase", PHASES), f.integer("done", LIMITS.number), f.integer("total", LIMITS.number)
        )
    ),
    "ready": _plain(lambda f: Ready(f.integer("size", LIMITS.number), f.integer("fetched", LIMITS.number))),
    "refuse": _plain(
        lambda f: Refuse(
            _one_of(f, "code", REFUSALS), f.text("reason", LIMITS.text), f.text("remedy", LIMITS.text)
        )
    ),
    "output": _output,
    "pong": _carried(Pong),
    "error": _plain(lambda f: Error(f.text("reason", LIMITS.text))),
}

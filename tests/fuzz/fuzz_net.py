"""Coverage-guided fuzzing of the framing below every stream: records and Yamux frames.

    python -m tests.fuzz.fuzz_net [-max_total_time=60] [libFuzzer's other options]

Needs atheris (`pip install atheris`); without it, says so and ends. What must hold: whatever arrives is
taken in or raises `RemoteProtocolError`, and the bytes counted as buffered are those that are there.
"""

from __future__ import annotations

import importlib.util
import sys

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from omnistore.errors import RemoteProtocolError
from omnistore.net.muxing import Muxing
from omnistore.net.records import Opener, Sealer

KEY = ChaCha20Poly1305(bytes(32))


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
                    core.lend(stream, memoryview(bytearray(5 + cut)), 0.0)
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


def one_input(data: bytes) -> None:
    """What the fuzzer calls; the first byte chooses."""
    (records if data[:1] == b"r" else muxing)(data[1:])


def main() -> int:
    if importlib.util.find_spec("atheris") is None:
        print("fuzzing skipped: atheris is not installed (pip install atheris)")
        return 0
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())

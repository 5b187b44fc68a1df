"""A link with a rate, a delay and losses, between two network namespaces made here.

Not every kernel has netem. Each namespace gets a TUN device; a process of ours holds both and carries
packets from one to the other when they are due. It needs root, `ip` and /dev/net/tun, and some 20 us of a
core for each packet, which bounds the rates it can play: `Carried.late` tells whether it kept up.

    with Link(PathShape(rate=25e6, delay=0.025, loss=0.01)) as link:
        subprocess.run([*link.inside(0), "ping", link.address(1)])
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Final

TUNSETIFF: Final = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
"""From linux/if_tun.h."""
MTU: Final = 1500
LATE: Final = 0.005
"""Seconds after its time at which a packet counts as late."""
TUN_QUEUE: Final = 4000
"""Packets that may wait to be read: a busy machine must lose none that the path would not."""


@dataclass(frozen=True, slots=True)
class PathShape:
    """One direction; the other is the same."""

    rate: float
    """Bytes of IP packets per second."""
    delay: float = 0.0
    """Seconds from one end to the other, beside the time spent queued."""
    loss: float = 0.0
    """Share of the packets that vanish, each by itself."""
    queue: float = 0.05
    """Seconds of data that may wait before the link; what comes then is dropped."""
    seed: int = 1


@dataclass(slots=True)
class Carried:
    """What became of the packets of one direction."""

    packets: int = 0
    lost: int = 0
    overflowed: int = 0
    late: int = 0
    """Handed over more than 5 ms after their time: the machine was too slow for the path."""


@dataclass(slots=True)
class Line:
    """The pure part of one direction: what is taken in, and when it comes out."""

    path: PathShape
    rng: random.Random
    carried: Carried = field(default_factory=Carried)
    _free_at: float = 0.0
    """When the link has sent what is queued."""
    _flying: deque[tuple[float, bytes]] = field(default_factory=deque)

    def take_in(self, packet: bytes, now: float) -> None:
        """A packet at our end at `now`, in seconds."""
        path, start = self.path, max(now, self._free_at)
        if start - now > path.queue:
            self.carried.overflowed += 1
            return
        self._free_at = start + len(packet) / path.rate
        # Lost on the way, it has taken its time on the link all the same.
        if path.loss and self.rng.random() < path.loss:
            self.carried.lost += 1
            return
        self._flying.append((self._free_at + path.delay, packet))

    @property
    def next_due(self) -> float | None:
        """When the next packet comes out; None if there is none."""
        return self._flying[0][0] if self._flying else None

    def due(self, now: float) -> list[bytes]:
        """What comes out by `now`, in order."""
        found = []
        while self._flying and self._flying[0][0] <= now:
            at, packet = self._flying.popleft()
            self.carried.late += now - at > LATE
            found.append(packet)
        self.carried.packets += len(found)
        return found


def open_tun(name: str) -> int:
    """A TUN device of this name in our own namespace: packets bare, reads that do not wait."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


def carry(path: PathShape, names: list[str]) -> list[Carried]:
    """Carry packets between the two devices until stdin ends."""
    devices = [open_tun(name) for name in names]
    lines = [Line(path, random.Random(path.seed + number)) for number in range(2)]
    print("ready", flush=True)
    waiting = [*devices, sys.stdin.fileno()]
    while True:
        times = [line.next_due for line in lines if line.next_due is not None]
        patience = max(0.0, min(times) - time.monotonic()) if times else None
        readable, _, _ = select.select(waiting, [], [], patience)
        if waiting[2] in readable:
            return [line.carried for line in lines]
        for number, (device, line) in enumerate(zip(devices, lines, strict=True)):
            if device in readable:
                _take_all(device, line)
            for packet in line.due(time.monotonic()):
                _put(devices[1 - number], packet)


def _take_all(device: int, line: Line) -> None:
    try:
        # Bounded, or one direction could starve the other.
        for _ in range(64):
            line.take_in(os.read(device, MTU), time.monotonic())
    except (BlockingIOError, OSError):  # not up yet, or nothing more to read
        return


def _put(device: int, packet: bytes) -> None:
    try:
        os.write(device, packet)
    except OSError:  # the other end is not up yet: as on any wire, it is lost
        return


def ip(*args: str) -> str:
    """Raises `RuntimeError` with what `ip` said."""
    done = subprocess.run(["ip", *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout


class Link:
    """Two namespaces and the path between them, for the length of a `with` block."""

    def __init__(self, path: PathShape, congestion: str | None = None) -> None:
        """`congestion`: TCP's congestion control in both namespaces; None is the kernel's own."""
        self.carried: list[Carried] = []
        """What happened to the packets from end 0 and from end 1, after the block."""
        self._path, self._congestion = path, congestion
        self._name = f"omni{os.getpid():x}{random.SystemRandom().randrange(1 << 12):x}"
        self._made: list[str] = []
        self._process: subprocess.Popen[str] | None = None

    def inside(self, end: int) -> list[str]:
        """What to put before a command so that it runs at that end, 0 or 1."""
        return ["ip", "netns", "exec", f"{self._name}-{end}"]

    def address(self, end: int) -> str:
        return f"10.98.0.{end + 1}"

    def __enter__(self) -> Link:
        """Raises `RuntimeError` or `OSError` where it can not be made: no root, no TUN."""
        try:
            self._make()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _make(self) -> None:
        names = [f"{self._name}{end}"[-15:] for end in range(2)]
        command = [sys.executable, "-m", "tests.bench.link", json.dumps(asdict(self._path)), *names]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        if self._process.stdout.readline() != "ready\n":
            said = self._process.stderr.read().strip().splitlines()
            raise RuntimeError(f"no TUN device can be made: {said[-1] if said else 'no reason given'}")
        for end, device in enumerate(names):
            space = f"{self._name}-{end}"
            ip("netns", "add", space)
            self._made.append(space)
            ip("link", "set", device, "netns", space)
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "addr", "add", self.address(end), "peer", self.address(1 - end), "dev", device)
            ip("-n", space, "link", "set", device, "mtu", str(MTU), "txqueuelen", str(TUN_QUEUE), "up")
            if self._congestion:
                self._setting(end, "tcp_congestion_control", self._congestion)
            # What one connection learnt about the path must not help the next.
            self._setting(end, "tcp_no_metrics_save", "1")

    def congestion(self, end: int) -> str:
        """TCP's congestion control at that end."""
        name = "/proc/sys/net/ipv4/tcp_congestion_control"
        return ip(*self.inside(end)[1:], "cat", name).strip()

    def _setting(self, end: int, name: str, value: str) -> None:
        script = 'printf %s "$2" > /proc/sys/net/ipv4/"$1"'
        try:
            ip(*self.inside(end)[1:], "sh", "-c", script, "sh", name, value)
        except RuntimeError as error:
            raise RuntimeError(f"this kernel refuses {name} = {value} in a namespace") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            try:
                said, _ = self._process.communicate(timeout=10)
                self.carried = [Carried(**one) for one in json.loads(said)] if said.strip() else []
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for space in self._made:
            subprocess.run(["ip", "netns", "del", space], check=False)


def main() -> int:
    path, *names = sys.argv[1:]
    print(json.dumps([asdict(one) for one in carry(PathShape(**json.loads(path)), names)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

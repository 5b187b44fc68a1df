"""What the pure session costs: processor time for each block, by the number of blocks and of peers.

    python -m tests.bench.bench_session [--blocks 4096 40960 237568] [--peers 1 8] [--most 60000]

Peers that hold everything answer at once, each event is stepped as the shell would, a tick between every
hundred blocks, and what is asked is sent as messages and taken apart again (`Asks`); hashing, disk and
network are left out. There are as many parts as models of that size have; 237,568 blocks are 232 GiB. Of
more blocks than `--most` only so many are fetched, one half from the beginning. Exit code 1 when a block
at the largest size costs over 1.5 times one at the smallest.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from typing import Final

from blake3 import blake3

from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.transfer import events as e
from omnistore.transfer.asks import Asks
from omnistore.transfer.demand import Wanted
from omnistore.transfer.session import Session

PARTS: Final = ((8192, 34), (65_536, 82), (1 << 62, 130))
"""Parts of a model of up to so many blocks: those of an 8B, a 70B and a 405B."""
RATE: Final = 1e9
"""Bytes a second that a peer gives, in the session's time."""
GROWS: Final = 1.5


class Fetch:
    """One session and its peers."""

    def __init__(self, blocks: int, peers: int) -> None:
        self.now = 0.0
        self.session = Session(lambda: 0.5)
        self.asks = {f"peer{number}": Asks() for number in range(peers)}
        self.due: deque[tuple[str, Wanted]] = deque()
        self.verified = 0
        self.total = blocks
        self.links = -(-blocks // next(parts for most, parts in PARTS if blocks <= most))

    def step(self, event: e.Event) -> None:
        for command in self.session.step(event, self.now):
            match command:
                case e.SendWant(peer, blocks):
                    self.asks[peer].want(blocks)
                    self.due.extend((peer, block) for block in blocks)
                case e.AskHave(peer, parts):
                    self.asks[peer].have(parts)
                case e.SendCancel(peer, cids):
                    self.asks[peer].cancel(cids)
                case e.Failed():
                    raise SystemExit("the session gave up")

    def begin(self) -> None:
        """Everybody joins and says that it holds everything; then all is wanted."""
        for peer in self.asks:
            self.step(e.PeerJoined(peer, 1024, 256))
        for start in range(0, self.total, self.links):
            count = min(self.links, self.total - start)
            links = tuple(Wanted(_cid(RAW, start + n), 1 << 20) for n in range(count))
            part = _cid(DAG_CBOR, start)
            self.step(e.WantsAdded(part, links, 0))
            for peer in self.asks:
                self.step(e.HoldsReceived(peer, part, ((1 << count) - 1).to_bytes(-(-count // 8), "little")))
            self.step(e.WantsAdded(part, links, (1 << count) - 1))

    def run(self, most: int) -> float:
        """Seconds of processor time for each of at most so many blocks."""
        started, first = time.process_time(), self.verified
        while self.due and self.verified - first < most:
            peer, block = self.due.popleft()
            self.asks[peer]._take(self.asks[peer]._numbers[block.cid])
            self.now += (1 << 20) / (RATE * len(self.asks))
            self.step(e.BlockReceived(peer, block.cid, block.size))
            self.step(e.BlockVerified(block.cid))
            self.verified += 1
            if self.verified % 100 == 0:
                for name in self.asks:
                    self.step(e.BytesReceived(name))
                self.step(e.Tick())
        return (time.process_time() - started) / (self.verified - first)


def _cid(codec: int, number: int) -> CID:
    return CID.of_digest(codec, blake3(number.to_bytes(8, "big")).digest())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, nargs="+", default=[4096, 40_960, 237_568])
    parser.add_argument("--peers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--most", type=int, default=60_000)
    options = parser.parse_args()
    data = bytes(1 << 20)
    started = time.process_time()
    for _ in range(200):
        blake3(data).digest()
    hashing = (time.process_time() - started) / 200
    print(f"hashing one block: {hashing * 1e6:.0f} us")
    print(f"{'blocks':>8}{'peers':>7}{'to begin':>12}{'us a block':>12}{'of hashing':>12}{'of smallest':>13}")
    worst = 0.0
    for peers in options.peers:
        least = 0.0
        for blocks in options.blocks:
            fetch = Fetch(blocks, peers)
            started = time.process_time()
            fetch.begin()
            began = time.process_time() - started
            spent = fetch.run(options.most)
            least = least or spent
            worst = max(worst, spent / least)
            print(f"{blocks:>8}{peers:>7}{began:>11.2f}s{spent * 1e6:>12.1f}{spent / hashing:>12.2f}"
                  f"{spent / least:>12.2f}x", flush=True)  # fmt: skip
    print("all as it must be" if worst <= GROWS else f"WRONG: over {GROWS} times the smallest")
    return 0 if worst <= GROWS else 1


if __name__ == "__main__":
    sys.exit(main())

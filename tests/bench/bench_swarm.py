"""A flash crowd in virtual time: how long all take, by their number.

    python -m tests.bench.bench_swarm [--leechers 1 8 16 50] [--blocks 512] [--seed 1]

One seeder, equal links, everybody comes within a second. `slowest` is the last leecher's time over the
time one leecher alone needs; `copies` what the seeder sent over the size of the model.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

from omnistore.testing.crowd import Crowd, CrowdModel


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leechers", type=int, nargs="+", default=[1, 8, 16, 50])
    parser.add_argument("--blocks", type=int, default=512, help="of 1 MiB")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    model = CrowdModel(parts=max(1, options.blocks // 16))
    alone = Crowd(replace(model, leechers=1), options.seed).run().seconds[-1]
    print(f"{model.size >> 20} MiB over {model.bandwidth / 1e6:g} MB/s links: {alone:.1f} s for one alone")
    print(f"{'leechers':>8}{'median':>9}{'slowest':>9}{'copies':>8}{'twice':>8}{'CPU':>8}")
    worst = 0.0
    for count in options.leechers:
        started = time.process_time()
        found = Crowd(replace(model, leechers=count), options.seed).run()
        middle, last = found.seconds[count // 2] / alone, found.seconds[-1] / alone
        worst = max(worst, last / 2, found.copies_seeded / 3, found.duplicates / 0.02)
        spent = time.process_time() - started
        print(
            f"{count:>8}{middle:>8.2f}x{last:>8.2f}x{found.copies_seeded:>8.2f}"
            f"{found.duplicates:>8.1%}{spent:>7.0f}s",
            flush=True,
        )
    print("all as it must be" if worst <= 1 else "WRONG: over 2 x, 3 copies or 2 % twice")
    return 0 if worst <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())

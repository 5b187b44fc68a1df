"""Coverage-guided fuzzing of what strangers' bytes reach first, one target after the other.

    python -m tests.fuzz.run [--seconds 60] [--only NAME...]

Needs atheris (`pip install atheris`); without it, says so and ends. Each target of `tests.fuzz.targets`
runs for so long in a process of its own, from a fresh corpus; an input that takes 10 s, or 2 GB of
memory, is a finding like an exception. Inputs that were found are kept, and named. Exit code 1 when there
are any.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

ONE_INPUT: Final = 10
"""Seconds."""
MEMORY: Final = 2048
"""MiB."""


def fuzz(name: str, seconds: int, found: Path) -> tuple[int, int, str]:
    """Fuzz one target: executions, edges covered, and what was found, if anything."""
    with tempfile.TemporaryDirectory() as corpus:
        ended = subprocess.run(
            [
                sys.executable, "-m", "tests.fuzz.one", name, corpus, f"-max_total_time={seconds}",
                f"-timeout={ONE_INPUT}", f"-rss_limit_mb={MEMORY}", "-print_final_stats=1",
                f"-artifact_prefix={found}/{name}-", "-max_len=8192", "-verbosity=1",
            ],
            capture_output=True, text=True, errors="replace", timeout=seconds + 600, check=False,
        )  # fmt: skip
    said = ended.stderr + ended.stdout
    runs = re.search(r"number_of_executed_units: (\d+)", said) or re.search(r"Done (\d+) runs", said)
    edges = re.findall(r"cov: (\d+)", said)
    fault = "" if ended.returncode == 0 else said[-3000:]
    return int(runs[1]) if runs else 0, int(edges[-1]) if edges else 0, fault


def main() -> int:
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("fuzzing skipped: atheris is not installed (pip install atheris)")
        return 0
    found = Path(tempfile.mkdtemp(prefix="omni-fuzz-"))
    faults = 0
    print(f"{'target':<15}{'executions':>12}{'edges':>8}", flush=True)
    for name in options.only:
        runs, edges, fault = fuzz(name, options.seconds, found)
        print(f"{name:<15}{runs:>12}{edges:>8}", flush=True)
        if fault:
            faults += 1
            print(f"FOUND: {name}; the input is in {found}\n{fault}", flush=True)
    if not faults:
        found.rmdir()
    print(f"{faults} found" if faults else "nothing found")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""A stage takes no more memory than the rule allows: the benchmark that measures it is also a test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["mlx", "numpy"])
def test_peak_memory(engine: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.bench_engine_memory", "--engine", engine],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr

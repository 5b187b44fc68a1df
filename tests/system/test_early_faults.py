"""What goes wrong before a command has begun: quick interrupts, and arguments a seed must refuse at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    "args", [("--compute=nan",), ("--compute=inf",), ("--compute", "--allow", "12D3KooWnobody")]
)
def test_a_seed_refuses_what_it_can_not_lend_before_it_is_ready(omni: Run, args: tuple[str, ...]) -> None:
    done = omni("seed", "--json", "--listen", "/ip4/127.0.0.1/tcp/0", *args)
    assert done.returncode == 2
    assert "ready" not in done.stdout
    assert args[-1] in done.stderr or args[0] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("after", [0.02, 0.05, 0.1, 0.2])
def test_an_interrupt_is_quiet_from_the_first_line_on(home: Path, after: float) -> None:
    # Says when the interpreter itself is up: what happens before is not ours.
    code = (
        "import os; os.write(1, b'.')\nfrom omnistore.cli.start import start\nimport sys\nsys.exit(start())"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, "seed", "--json", "--listen", "/ip4/127.0.0.1/tcp/0"],
        env={**os.environ, "OMNI_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.read(1)
    time.sleep(after)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode in (0, 130), err
    assert err == b""

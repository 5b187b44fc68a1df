"""A real Helia node fetches a whole part from a seed, over Bitswap and over the gateway.

Needs `make interop-js`, which installs Helia and Node 22 from npm; skipped where they are not.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from omnistore.testing.tiny_gguf import tiny_model

if TYPE_CHECKING:
    from tests.system.conftest import StartSeed

INTEROP = Path(__file__).resolve().parent.parent / "interop"
NODES = sorted(INTEROP.glob("node_modules/node-*/bin/node"))

pytestmark = pytest.mark.skipif(
    not NODES, reason="Helia and Node 22 are not installed: run `make interop-js`"
)


@pytest.mark.parametrize("mode", ["bitswap", "gateway"])
def test_a_whole_part(
    mode: str, tmp_path: Path, start_seed: StartSeed, omni: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    file, home = tmp_path / "tiny.gguf", tmp_path / "publisher"
    file.write_bytes(tiny_model(3, width=128).build())
    added = json.loads(omni("add", file, "--json", home=home).stdout)
    seed = start_seed(home, "--http", "127.0.0.1:0", "--no-mdns")
    ready = seed.event("ready")
    where = ready["http"][0] if mode == "gateway" else ready["addrs"][0]
    run = subprocess.run(
        [NODES[0], INTEROP / "helia.mjs", mode, where, added["cid"]],
        env={**os.environ, "NODE_NO_WARNINGS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    fetched = json.loads(run.stdout.splitlines()[-1])
    last = added["parts"][-1]
    assert fetched["part"] == last["cid"]
    assert fetched["blocks"] and fetched["bytes"] <= last["size"]

"""libtorrent and iroh, each node a process of the Python in `.peers` (or of $PEERS)."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from tests.bench.bench_transfer import measured, process
from tests.bench.peers.rows import MissingError, Row, program

HERE = Path(__file__).resolve().parent
PYTHON = Path(os.environ.get("PEERS", HERE.parents[2] / ".peers")) / "bin" / "python"
TORRENT = (str(PYTHON), str(HERE / "torrent_peer.py"))
IROH = (str(PYTHON), str(HERE / "iroh_peer.py"))
ALONE = ("unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""A network namespace that has loopback and nothing else."""
TORRENT_SETTINGS = "BitTorrent v2 over TCP, 1 MiB pieces, plain text, 2 hashing threads, 3 MiB send watermark"
IROH_SETTINGS = "QUIC; store on disk, file moved out of it; a namespace with loopback alone, no discovery"


def need(module: str) -> None:
    """Raises:
    MissingError: `module` is not there for `.peers`.
    """
    if (
        not PYTHON.exists()
        or subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True).returncode
    ):
        raise MissingError(f"{module} is not installed: make peers")


def need_namespaces() -> None:
    """Raises:
    MissingError: no network namespace can be made; iroh would speak to relays.
    """
    program("unshare", "util-linux")
    program("ip", "iproute2")
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        raise MissingError("unshare -rn is refused: run as root, or allow user namespaces")


def timed(command: Sequence[str], settings: str) -> Row:
    """A command that says its own `seconds`."""
    started = time.perf_counter()
    said, rss = measured(command)
    wall = time.perf_counter() - started
    return Row(json.loads(said.splitlines()[-1])["seconds"], wall, rss, settings)


def compared(row: Row, out: Path, file: Path) -> Row:
    identical = filecmp.cmp(out, file, shallow=False)
    return Row(row.seconds, row.wall, row.rss, row.settings, identical)


def torrent_create(file: Path, torrent: Path) -> Row:
    row = timed([*TORRENT, "create", str(file), str(torrent)], "v2 only, 1 MiB pieces")
    return Row(row.wall, row.wall, row.rss, row.settings)


def torrent_seed(file: Path, torrent: Path, cap: int = 0) -> AbstractContextManager[str]:
    return process([*TORRENT, "seed", str(torrent), str(file.parent), str(cap)])


def torrent_get(file: Path, torrent: Path, root: Path, addrs: Sequence[str]) -> Row:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    row = timed([*TORRENT, "get", str(torrent), str(root), *addrs], TORRENT_SETTINGS)
    return compared(row, root / file.name, file)


def iroh_add(file: Path, root: Path) -> Row:
    shutil.rmtree(root, ignore_errors=True)
    row = timed([*ALONE, *IROH, "add", str(file), str(root)], "in place")
    return Row(row.wall, row.wall, row.rss, row.settings)


def iroh_seed(file: Path, root: Path) -> AbstractContextManager[str]:
    return process([*ALONE, *IROH, "seed", str(file), str(root)])


def iroh_get(file: Path, root: Path, addr: str) -> Row:
    """From the seed at `addr`, out of whose network namespace nothing can be reached."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    pid, *words = addr.split()
    inside = ("nsenter", "--preserve-credentials", "-U", "-n", "-t", pid)
    out = root / "out.gguf"
    row = timed([*inside, *IROH, "get", *words, str(root / "store"), str(out)], IROH_SETTINGS)
    return compared(row, out, file)

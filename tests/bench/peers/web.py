"""nginx on a port and in a directory of its own, and who fetches from it."""

from __future__ import annotations

import filecmp
import hashlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.bench_transfer import measured
from tests.bench.peers.rows import MissingError, Row, program

PATIENCE = 10
CONNECTIONS = 8
CONFIG = """
{user}
worker_processes 2;
daemon off;
pid {root}/pid;
error_log {root}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    default_type application/octet-stream;
    client_body_temp_path {root}/body;
    proxy_temp_path {root}/proxy;
    fastcgi_temp_path {root}/fastcgi;
    uwsgi_temp_path {root}/uwsgi;
    scgi_temp_path {root}/scgi;
    server {{ listen 127.0.0.1:{port}; root {files}; }}
}}
"""
SERVED = "nginx with sendfile"
PIPED = 'set -o pipefail; "$1" -sf "$2" | tee "$3" | sha256sum'
IN_TURN = 'set -e; "$1" -sfo "$3" "$2"; sha256sum <"$3"'


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
        return port


@contextmanager
def nginx(root: Path, file: Path) -> Iterator[str]:
    """A server of `file`'s directory for the length of the block: the file's URL.

    Raises:
        MissingError: nginx is not installed, or does not start; says why.
    """
    command, port = program("nginx", "nginx-light"), free_port()
    root.mkdir()
    # Started by root, its workers would be nobody, who may not enter our directory.
    user = "user root;" if os.geteuid() == 0 else ""
    config = root / "nginx.conf"
    config.write_text(CONFIG.format(user=user, root=root, port=port, files=file.parent))
    child = subprocess.Popen([command, "-p", str(root), "-c", str(config)], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError as error:
                if child.poll() is not None or time.monotonic() > until:
                    raise MissingError(f"nginx does not start: see its error.log: {error}") from error
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/{file.name}"
    finally:
        # It stops its workers itself, which a kill would leave behind.
        child.terminate()
        child.wait(PATIENCE)


def fetched(command: list[str], out: Path, file: Path, settings: str) -> tuple[str, Row]:
    started = time.perf_counter()
    said, rss = measured(command)
    seconds = time.perf_counter() - started
    row = Row(seconds, seconds, rss, settings, filecmp.cmp(out, file, shallow=False))
    out.unlink()
    return said, row


def digest(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def curl(url: str, out: Path, file: Path, script: str) -> Row:
    """curl, hashed by sha256sum as `script` says, PIPED or IN_TURN; what it said must be the file's."""
    how = "hashed as it comes through tee" if script == PIPED else "hashed once it is whole"
    command = ["bash", "-c", script, "curl", program("curl", "curl"), url, str(out)]
    said, row = fetched(command, out, file, f"{SERVED}; one connection, {how}")
    if said.split()[0] != digest(file):
        raise SystemExit(f"curl and sha256sum: {said.split()[0]} is not the file's digest")
    return row


def aria2(url: str, out: Path, file: Path) -> Row:
    words = (
        "--no-conf --quiet --file-allocation=falloc --min-split-size=1M --disk-cache=64M "
        f"--max-connection-per-server={CONNECTIONS} --split={CONNECTIONS} --checksum=sha-256={digest(file)}"
    ).split()
    command = [program("aria2c", "aria2"), *words, f"--dir={out.parent}", f"--out={out.name}", url]
    settings = f"{SERVED}; {CONNECTIONS} connections, falloc, 64 MiB disk cache, --checksum=sha-256"
    return fetched(command, out, file, settings)[1]

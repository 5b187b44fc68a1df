"""Sources that are not ours, between processes: web servers, the gateway of a seed, Bitswap."""

from __future__ import annotations

import functools
import json
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from omnistore import varint
from omnistore.block import Block
from omnistore.cid import CID
from omnistore.keys import PrivateKey
from omnistore.net.interface import Provider, Stream
from omnistore.testing.tiny_gguf import tiny_model
from omnistore.transfer.bitswap import PROTOCOL

if TYPE_CHECKING:
    from tests.system.conftest import SeedProcess, StartSeed

Run = Callable[..., subprocess.CompletedProcess[str]]


@dataclass
class Published:
    file: Path
    home: Path
    cid: str


@pytest.fixture
def published(tmp_path: Path, omni: Run) -> Published:
    file, home = tmp_path / "web" / "tiny.gguf", tmp_path / "publisher"
    file.parent.mkdir()
    file.write_bytes(tiny_model(3, width=128).build())
    return Published(file, home, omni("add", file, home=home).stdout.split()[-1])


@pytest.fixture
def seed(published: Published, start_seed: StartSeed) -> SeedProcess:
    return start_seed(published.home, "--http", "127.0.0.1:0")


def gateway_of(seed: SeedProcess) -> str:
    return str(seed.event("ready")["http"][0])


class _Ranged(SimpleHTTPRequestHandler):
    """Python's own file server, with the one range that it lacks."""

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        data = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
        first, last = (int(text) for text in self.headers["Range"].removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(data[first : last + 1])


@pytest.fixture
def mirror(published: Published) -> Iterator[str]:
    serving = functools.partial(_Ranged, directory=str(published.file.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), serving) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{published.file.name}"
        server.shutdown()


def done(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert run.returncode == 0, run.stderr
    last: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return last


def test_pin_through_the_gateway_of_a_seed(published: Published, seed: SeedProcess, omni: Run) -> None:
    url = gateway_of(seed)
    last = done(omni("pin", published.cid, "--gateway", url, "--no-mdns", "--json"))
    assert Path(last["path"]).read_bytes() == published.file.read_bytes()
    assert list(last["peers"]) == [f"{url} (gateway)"]


def test_pin_from_a_mirror_with_the_nodes_of_a_gateway(
    published: Published, mirror: str, omni: Run, tmp_path: Path, start_seed: StartSeed
) -> None:
    # A seed whose file is gone still describes the model.
    seed = start_seed(published.home, "--http", "127.0.0.1:0")
    url = gateway_of(seed)
    moved = published.file.rename(published.file.with_name("moved.gguf"))
    mirror = mirror.replace(published.file.name, moved.name)
    run = omni("pin", published.cid, "--gateway", url, "--from", mirror, "--no-mdns", "--json")
    last = done(run)
    assert Path(last["path"]).read_bytes() == moved.read_bytes()
    assert last["peers"][mirror] == last["bytes_fetched"]


@pytest.mark.parametrize("option", ["--from", "--gateway"])
def test_a_url_that_is_none(published: Published, omni: Run, option: str) -> None:
    run = omni("pin", published.cid, option, "example.org/x.gguf")
    assert run.returncode == 2 and "https://" in run.stderr


def test_a_mirror_alone_can_not_say_what_the_model_is(published: Published, mirror: str, omni: Run) -> None:
    run = omni("pin", published.cid, "--from", mirror, "--no-mdns")
    assert run.returncode == 10 and "manifest" in run.stderr


def test_the_gateway_answers_like_one(published: Published, seed: SeedProcess) -> None:
    url = gateway_of(seed)
    with urllib.request.urlopen(f"{url}/ipfs/{published.cid}?format=raw") as answer:
        cid = CID.parse_untrusted(published.cid)
        assert Block.verify_untrusted(cid, answer.read()).cid == cid
        assert answer.headers["Content-Type"] == "application/vnd.ipld.raw"
    with urllib.request.urlopen(f"{url}/ipfs/{published.cid}?format=car") as answer:
        assert len(answer.read()) > published.file.stat().st_size


def test_an_address_for_http_that_is_none(published: Published, omni: Run) -> None:
    run = omni("seed", "--listen", "/ip4/127.0.0.1/tcp/0", "--http", "nowhere", home=published.home)
    assert run.returncode == 2 and "HOST:PORT" in run.stderr


def test_a_seed_answers_bitswap(published: Published, seed: SeedProcess) -> None:
    from omnistore.net.libp2p import open_network

    cid = CID.parse_untrusted(published.cid)
    entry = b"\x0a" + varint.encode(len(cid.binary)) + cid.binary
    wantlist = b"\x0a" + varint.encode(len(entry)) + entry
    message = b"\x0a" + varint.encode(len(wantlist)) + wantlist
    got = bytearray()
    with urllib.request.urlopen(f"{gateway_of(seed)}/ipfs/{cid}?format=raw") as answer:
        held = answer.read()

    async def main() -> None:
        answered = trio.Event()

        async def receive(stream: Stream) -> None:
            while data := await stream.receive_some(1 << 16):
                got.extend(data)
            answered.set()

        async with open_network(PrivateKey(b"\1" * 32), ["/ip4/127.0.0.1/tcp/0"]) as network:
            network.serve(PROTOCOL, receive)
            await network.connect(seed.addr)
            stream = await network.open_stream(Provider(seed.peer_id), PROTOCOL)
            await stream.send_all(varint.encode(len(message)) + message)
            await stream.aclose()
            with trio.fail_after(20):
                await answered.wait()

    trio.run(main)
    # The block is the last field of the only message.
    assert bytes(got).endswith(held)

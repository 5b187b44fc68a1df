"""`omni seed` as others see it: events, discovery through a third node, a clean end."""

from __future__ import annotations

import json
import secrets
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from omnistore.cid import CID
from omnistore.cli.main import main
from omnistore.config import Config
from omnistore.errors import PeerUnreachable
from omnistore.net.interface import Provider
from omnistore.node import NodeOptions, open_node
from omnistore.testing.tiny_gguf import block_tensors, tiny_gguf

if TYPE_CHECKING:
    from tests.system.conftest import StartSeed

LOCAL = "/ip4/127.0.0.1/tcp/0"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def add(omni: Run, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Publish a little model in a home."""

    def run(home: Path, name: str = "tiny") -> dict[str, Any]:
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(tiny_gguf(block_tensors(2)))
        done = omni("add", file, "--json", home=home)
        assert done.returncode == 0, done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    return run


def keys_of(document: dict[str, Any]) -> list[str]:
    return [document["cid"], document["manifest"], *(part["cid"] for part in document["parts"])]


async def found(home: Path, bootstrap: str, cids: Sequence[str]) -> dict[str, list[Provider]]:
    """Who provides each CID, asked by a client that knows only the bootstrap node."""
    async with open_node(Config(home), NodeOptions(bootstrap=[bootstrap])) as node:
        return {cid: list(await node.routing.find_providers(CID.parse_untrusted(cid))) for cid in cids}


def test_the_first_line_says_where_it_is(start_seed: StartSeed, home: Path, omni: Run) -> None:
    seed = start_seed(home)
    ready = seed.event("ready")
    assert seed.seen == [ready]
    assert ready["peer_id"] == omni("id").stdout.strip()
    assert all(addr.endswith(f"/p2p/{ready['peer_id']}") for addr in ready["addrs"])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_within_two_seconds(
    start_seed: StartSeed, tmp_path: Path, how: signal.Signals
) -> None:
    third = start_seed(tmp_path / "third")
    seed = start_seed(tmp_path / "seed", "--bootstrap", third.addr)
    seed.event("joined")
    assert seed.stop(how, timeout=2) == 0
    seed.event("stopped", timeout=1)
    again = start_seed(seed.home, listen=seed.addr.partition("/p2p/")[0])
    assert again.addr == seed.addr


def test_a_client_finds_a_seed_through_a_third_node(
    start_seed: StartSeed, tmp_path: Path, add: Callable[..., dict[str, Any]]
) -> None:
    added = add(tmp_path / "seed")
    third = start_seed(tmp_path / "third")
    seed = start_seed(tmp_path / "seed", "--bootstrap", third.addr)
    wanted = keys_of(added)
    for _ in wanted:
        seed.event("provided", copies=1)
    providers = trio.run(found, tmp_path / "client", third.addr, wanted)
    assert {cid: [provider.peer for provider in some] for cid, some in providers.items()} == {
        cid: [seed.peer_id] for cid in wanted
    }
    assert seed.addr.partition("/p2p/")[0] in providers[added["cid"]][0].addrs


def test_a_seed_that_was_there_first_announces_when_somebody_comes(
    start_seed: StartSeed, tmp_path: Path, add: Callable[..., dict[str, Any]]
) -> None:
    """Alone it has nobody to tell; and whoever bootstraps through it finds it all the same."""
    added = add(tmp_path / "seed")
    seed = start_seed(tmp_path / "seed")
    seed.event("not_provided", cid=added["cid"])
    assert [
        p.peer for p in trio.run(found, tmp_path / "client", seed.addr, [added["cid"]])[added["cid"]]
    ] == [seed.peer_id]
    third = start_seed(tmp_path / "third", "--bootstrap", seed.addr)
    for _ in keys_of(added):
        seed.event("provided", copies=1)
    assert [
        p.peer for p in trio.run(found, tmp_path / "client", third.addr, [added["cid"]])[added["cid"]]
    ] == [seed.peer_id]


def test_what_is_added_meanwhile_is_announced(
    start_seed: StartSeed, tmp_path: Path, add: Callable[..., dict[str, Any]]
) -> None:
    third = start_seed(tmp_path / "third")
    seed = start_seed(tmp_path / "seed", "--bootstrap", third.addr)
    seed.event("joined")
    added = add(tmp_path / "seed")
    for _ in keys_of(added):
        seed.event("provided", copies=1, timeout=5)
    assert {event["cid"] for event in seed.seen if event["event"] == "provided"} == set(keys_of(added))


def test_a_bootstrap_node_that_starts_later_is_joined(
    start_seed: StartSeed, tmp_path: Path, omni: Run
) -> None:
    first = start_seed(tmp_path / "third")
    addr = first.addr
    assert first.stop() == 0
    seed = start_seed(tmp_path / "seed", "--bootstrap", addr)
    assert addr in seed.event("not_joined")["addr"]
    start_seed(tmp_path / "third", listen=addr.partition("/p2p/")[0])
    seed.event("joined", addr=addr, timeout=10)


def test_a_client_without_an_answer_says_whom_it_asked(tmp_path: Path, start_seed: StartSeed) -> None:
    gone = start_seed(tmp_path / "gone")
    addr = gone.addr
    gone.stop()

    async def join() -> None:
        async with open_node(Config(tmp_path / "client"), NodeOptions(bootstrap=[addr])):
            pass

    with pytest.raises(PeerUnreachable, match=gone.peer_id) as caught:
        trio.run(join)
    assert caught.value.remedy


def test_a_port_in_use_is_a_usage_error(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMNI_HOME", str(home))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["seed", "--json", "--listen", f"/ip4/127.0.0.1/tcp/{port}"]) == 2
    out, err = capsys.readouterr()
    assert f"port {port} is in use" in err
    assert json.loads(out)["error"] == "BadConfig"


def test_a_client_does_not_join_through_its_own_home(start_seed: StartSeed, home: Path) -> None:
    seed = start_seed(home)

    async def join(alone_ok: bool) -> None:
        with trio.fail_after(10):
            async with open_node(Config(home), NodeOptions(bootstrap=[seed.addr], alone_ok=alone_ok)):
                pass

    with pytest.raises(PeerUnreachable, match="itself"):
        trio.run(join, False)
    trio.run(join, True)


@pytest.mark.parametrize(
    ("args", "culprit"),
    [
        (["--listen", "/ip4/127.0.0.1/udp/0/quic-v1"], "/ip4/127.0.0.1/udp/0/quic-v1"),
        (["--listen", LOCAL, "--bootstrap", "/ip4/127.0.0.1/tcp/1"], "/ip4/127.0.0.1/tcp/1"),
        (["--listen", LOCAL, "--announce", "example.org:4141"], "example.org:4141"),
        (["--allow", "any"], "--allow"),
    ],
    ids=["listen", "bootstrap", "announce", "allow"],
)
def test_bad_arguments_are_named(
    args: list[str],
    culprit: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMNI_HOME", str(home))
    assert main(["seed", *args]) == 2
    assert culprit in capsys.readouterr().err


def test_an_announced_address_is_what_others_are_told(
    start_seed: StartSeed, tmp_path: Path, add: Callable[..., dict[str, Any]]
) -> None:
    added = add(tmp_path / "seed")
    third = start_seed(tmp_path / "third")
    outside = f"/dns4/{secrets.token_hex(4)}.invalid/tcp/4141"
    seed = start_seed(tmp_path / "seed", "--bootstrap", third.addr, "--announce", outside)
    assert seed.event("ready")["addrs"][0].startswith(outside)
    for _ in keys_of(added):
        seed.event("provided", copies=1)
    providers = trio.run(found, tmp_path / "client", third.addr, [added["cid"]])[added["cid"]]
    assert providers[0].addrs[0] == outside

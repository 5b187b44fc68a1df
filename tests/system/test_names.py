"""Names, trust and private swarms from the command line, between processes on 127.0.0.1."""

from __future__ import annotations

import filecmp
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from omnistore.testing.tiny_gguf import TinyGGUF, TinyTensor

if TYPE_CHECKING:
    from tests.system.conftest import StartSeed

DEMO = Path(__file__).resolve().parents[2] / "manifests" / "demo" / "omni-demo-F16.gguf"
Run = Callable[..., subprocess.CompletedProcess[str]]


def model(path: Path, name: str) -> Path:
    tensors = [TinyTensor(f"blk.{n}.ffn_up.weight", shape=(256, 64)) for n in range(2)]
    metadata: dict[str, str | int] = {"general.architecture": "llama", "general.name": name}
    metadata["llama.block_count"] = 2
    path.write_bytes(TinyGGUF(tensors, dict(metadata)).build())
    return path


@pytest.fixture
def publisher(tmp_path: Path, omni: Run) -> tuple[Path, Path, str, str]:
    """A home with a model: home, file, CID, peer ID."""
    home, file = tmp_path / "publisher", model(tmp_path / "one.gguf", "one")
    cid = omni("add", file, home=home).stdout.split()[-1]
    return home, file, cid, omni("id", home=home).stdout.strip()


def test_a_published_name_runs(tmp_path: Path, omni: Run, start_seed: StartSeed) -> None:
    home, reader = tmp_path / "publisher", tmp_path / "reader"
    cid = omni("add", DEMO, home=home).stdout.split()[-1]
    peer = omni("id", home=home).stdout.strip()
    assert omni("publish", "demo", cid, home=home).returncode == 0
    keeper = start_seed(tmp_path / "keeper", "--no-mdns")
    seed = start_seed(home, "--no-mdns", "--bootstrap", keeper.addr)
    seed.event("published", published="demo", cid=cid)
    omni("trust", "add", "anna", peer, home=reader)
    words = ("--prompt", "Once", "--max-tokens", 3, "--temperature", 0, "--layers", "all", "--json")
    done = omni("run", "anna/demo", "--bootstrap", keeper.addr, *words, home=reader)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert (events[0]["event"], events[0]["cid"]) == ("resolved", cid)
    assert len(events[-1]["tokens"]) == 3
    unknown = omni("run", "nobody/demo", "--bootstrap", keeper.addr, "--prompt", "x", home=reader)
    assert unknown.returncode == 5 and "nobody" in unknown.stderr


def test_a_published_name_is_pinned_follows_and_never_goes_back(
    publisher: tuple[Path, Path, str, str], tmp_path: Path, omni: Run, start_seed: StartSeed
) -> None:
    home, file, cid, peer = publisher
    reader = tmp_path / "reader"
    # Nobody is there to keep it: the seed that starts later does.
    first = json.loads(omni("publish", "llama", cid, "--json", home=home).stdout)
    assert (first["cid"], first["sequence"]) == (cid, 1)
    keeper = start_seed(tmp_path / "keeper", "--no-mdns")
    seed = start_seed(home, "--no-mdns", "--bootstrap", keeper.addr)
    assert seed.event("published", published="llama", cid=cid)["copies"] >= 0
    omni("trust", "add", "anna", peer, home=reader)
    pinned = omni("pin", "anna/llama", "--bootstrap", keeper.addr, "--no-mdns", home=reader)
    assert pinned.returncode == 0, pinned.stderr
    assert filecmp.cmp(pinned.stdout.strip(), file, shallow=False)
    assert f"llama of anna ({peer}) is {cid}" in pinned.stderr
    assert f"signed by anna ({peer})" in pinned.stderr
    # The name moves on while the seed runs, and the reader follows.
    other = omni("add", model(tmp_path / "two.gguf", "two"), home=home).stdout.split()[-1]
    assert omni("publish", "llama", other, "--bootstrap", keeper.addr, home=home).returncode == 0
    seed.event("published", published="llama", cid=other, sequence=2)
    again = omni("pin", f"{peer}/llama", "--bootstrap", keeper.addr, "--no-mdns", "--json", home=reader)
    assert again.returncode == 0, again.stderr
    resolved = json.loads(again.stdout.splitlines()[0])
    assert (resolved["event"], resolved["cid"], resolved["sequence"]) == ("resolved", other, 2)
    # Keepers that have only the old record, such as one that was cut off: the reader saw the new one.
    keeper.stop()
    seed.stop()
    behind = tmp_path / "behind"
    behind.mkdir(mode=0o700)
    for name in ("identity.key",):
        (behind / name).write_bytes((home / name).read_bytes())
        (behind / name).chmod(0o600)
    omni("add", file, home=behind)
    assert json.loads(omni("publish", "llama", cid, "--json", home=behind).stdout)["sequence"] == 1
    stale = start_seed(behind, "--no-mdns")
    stale.event("published", published="llama")
    refused = omni("pin", "anna/llama", "--bootstrap", stale.addr, "--no-mdns", home=reader)
    assert refused.returncode == 5
    assert "only an old record (sequence number 1)" in refused.stderr


def test_who_is_unknown_and_what_is_not_published(
    publisher: tuple[Path, Path, str, str], tmp_path: Path, omni: Run, start_seed: StartSeed
) -> None:
    home, _, cid, peer = publisher
    seed, reader = start_seed(home, "--no-mdns"), tmp_path / "reader"
    bootstrap = ("--bootstrap", seed.addr, "--no-mdns")
    unknown = omni("pin", "anna/llama", *bootstrap, home=reader)
    assert unknown.returncode == 5 and "no publisher is called 'anna'" in unknown.stderr
    nothing = omni("pin", f"{peer}/llama", *bootstrap, home=reader)
    assert nothing.returncode == 10 and "nobody reachable keeps a record" in nothing.stderr
    # The signature of a model is told, and can be insisted on.
    stranger = omni("id", home=tmp_path / "stranger").stdout.strip()
    wrong = omni("pin", cid, "--signer", stranger, *bootstrap, home=reader)
    assert wrong.returncode == 5 and f"is signed by {peer}, not by {stranger}" in wrong.stderr
    right = omni("pin", cid, "--signer", peer, *bootstrap, home=reader)
    assert right.returncode == 0 and f"signed by unknown publisher {peer}" in right.stderr
    # Also when all of it is here already.
    assert omni("pin", cid, "--signer", stranger, *bootstrap, home=reader).returncode == 5


def test_a_private_swarm(
    publisher: tuple[Path, Path, str, str], tmp_path: Path, omni: Run, start_seed: StartSeed
) -> None:
    home, file, cid, peer = publisher
    token = tmp_path / "token"
    # The address is known when the port is: the token comes from the home of the seed that runs.
    omni("invite", "--address", "/ip4/127.0.0.1/tcp/1", home=home)
    seed = start_seed(home, "--no-mdns")
    invited = omni("invite", "--address", seed.addr.partition("/p2p/")[0], "--output", token, home=home)
    assert invited.returncode == 0, invited.stderr
    assert token.stat().st_mode & 0o777 == 0o600
    member, outsider, other = (tmp_path / name for name in ("member", "outsider", "other"))
    joined = omni("join", "--file", token, home=member)
    assert joined.returncode == 0 and peer in joined.stdout
    fetched = omni("pin", cid, "--no-mdns", home=member)
    assert fetched.returncode == 0, fetched.stderr
    assert filecmp.cmp(fetched.stdout.strip(), file, shallow=False)
    # The right address without the key, and with the key of another swarm.
    assert omni("pin", cid, "--bootstrap", seed.addr, "--no-mdns", home=outsider).returncode == 9
    omni("invite", "--address", "/ip4/127.0.0.1/tcp/1", home=other)
    refused = omni("pin", cid, "--bootstrap", seed.addr, "--no-mdns", home=other)
    assert refused.returncode == 9 and "the pre-shared keys differ" in refused.stderr
    again = omni("join", "--file", token, home=other)
    assert again.returncode == 2 and "another private swarm" in again.stderr
    assert omni("leave", home=other).returncode == 0
    assert omni("join", "--file", token, home=other).returncode == 0


def test_an_invitation_names_where_the_running_seed_is(home: Path, omni: Run, start_seed: StartSeed) -> None:
    outside = "/ip4/203.0.113.7/tcp/5000"
    start_seed(home, "--no-mdns", "--announce", outside).event("ready")
    done = omni("invite", "--json", home=home)
    assert done.returncode == 0, done.stderr
    me = omni("id", home=home).stdout.strip()
    assert json.loads(done.stdout)["bootstrap"] == [f"{outside}/p2p/{me}"]


def test_an_expired_invitation_is_refused(home: Path, tmp_path: Path, omni: Run) -> None:
    made = omni("invite", "--expires", "0.001s", "--address", "/ip4/127.0.0.1/tcp/1", home=home)
    refused = omni("join", made.stdout.strip(), home=tmp_path / "other")
    assert refused.returncode == 2 and "expired" in refused.stderr
    stranger = omni("id", home=tmp_path / "stranger").stdout.strip()
    good = omni("invite", "--address", "/ip4/127.0.0.1/tcp/1", home=home).stdout.strip()
    wrong = omni("join", good, "--signer", stranger, home=tmp_path / "other")
    assert wrong.returncode == 5
    assert not (tmp_path / "other" / "swarm.json").exists()


@pytest.mark.slow
def test_providers_are_asked_what_they_hold(
    publisher: tuple[Path, Path, str, str], tmp_path: Path, omni: Run, start_seed: StartSeed
) -> None:
    home, _, cid, peer = publisher
    keeper = start_seed(tmp_path / "keeper", "--no-mdns")
    whole = start_seed(home, "--no-mdns", "--bootstrap", keeper.addr)
    whole.event("provided", cid=cid)
    partial = tmp_path / "partial"
    fetched = omni(
        "pin",
        cid,
        "--layers",
        "0",
        "--bootstrap",
        keeper.addr,
        "--peer",
        whole.addr,
        "--no-mdns",
        home=partial,
    )
    assert fetched.returncode == 0, fetched.stderr
    some = start_seed(partial, "--no-mdns", "--bootstrap", keeper.addr)
    some.event("joined")

    def ask(*more: str) -> dict[str, dict[str, object]]:
        command = ("providers", cid, "--bootstrap", keeper.addr, "--json", *more)
        answer = json.loads(omni(*command, home=tmp_path / "asker").stdout)
        assert answer["parts"] > 2
        return {one["peer"]: one | {"size": answer["size"]} for one in answer["providers"]}

    both = ask("--peer", some.addr)
    assert both[peer]["bytes_held"] == both[peer]["size"]
    assert both[peer]["reachable"] and both[peer]["claims"]
    part = both[some.peer_id]
    assert part["reachable"] and 0 < int(str(part["bytes_held"])) < int(str(part["size"]))
    # A record outlives its provider: that is told, and the rest is unaffected.
    some.stop()
    gone = ask("--peer", some.addr)
    assert not gone[some.peer_id]["reachable"] and gone[some.peer_id]["error"]
    assert gone[peer]["reachable"]
    nobody = omni("providers", cid, "--bootstrap", start_seed(tmp_path / "lone", "--no-mdns").addr)
    assert nobody.returncode == 10

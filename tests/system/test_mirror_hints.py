"""Mirrors that a publisher names, between processes: recorded, told to peers, followed where allowed."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from omnistore.testing.tiny_gguf import split_set, tiny_model
from tests.unit.transfer.web_server import WebServer, serving

if TYPE_CHECKING:
    from tests.system.conftest import StartSeed

Run = Callable[..., subprocess.CompletedProcess[str]]
DEMO = Path(__file__).parents[2] / "manifests" / "demo" / "omni-demo-F16.gguf"
OMNI = [sys.executable, "-m", "omnistore.cli.main"]


@dataclass
class Site:
    """A model's file, at home and on the web."""

    file: Path
    web: WebServer

    @property
    def url(self) -> str:
        return f"{self.web.url}/{self.file.name}"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    file = tmp_path / "files" / "tiny.gguf"
    file.parent.mkdir()
    file.write_bytes(tiny_model(3, width=128).build())
    with serving(file.parent) as web:
        yield Site(file, web)


def result(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert run.returncode == 0, run.stderr
    document: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return document


def test_urls_are_recorded_and_change_no_cid(site: Site, omni: Run) -> None:
    plain = result(omni("add", site.file, "--json"))
    added = omni("add", site.file, "--url", site.url, "--json")
    assert result(added)["cid"] == plain["cid"] and result(added)["mirrors"] == [site.url]
    assert "not on the public network" in added.stderr
    assert {range for _, range in site.web.requests} == {
        "bytes=0-65535",
        f"bytes={len_of(site) - 65536}-{len_of(site) - 1}",
    }
    listed = json.loads(omni("ls", "--json").stdout)
    assert [model["mirrors"] for model in listed] == [[site.url]]
    assert f"mirror          {site.url}" in omni("show", "tiny").stdout
    # Adding again says nothing of mirrors, so it changes none; given ones replace those before.
    assert result(omni("add", site.file, "--json"))["mirrors"] == [site.url]
    other = f"{site.web.url}/"
    assert result(omni("add", site.file, "--url", other, "--json"))["mirrors"] == [other]
    assert result(omni("add", site.file, "--url", "none", "--json"))["mirrors"] == []


def len_of(site: Site) -> int:
    return site.file.stat().st_size


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("not-found", 2, "404"),
        ("other-size", 2, "has a file of"),
        ("no-ranges", 2, "range requests"),
        ("not-gguf", 2, "another file"),
        ("flips", 2, "another file"),
        ("redirect-loop", 2, "redirects"),
        ("error", 9, "500"),
    ],
)
def test_a_url_of_something_else_is_refused(site: Site, omni: Run, fault: str, code: int, said: str) -> None:
    with serving(site.file.parent, fault, after=0) as bad:
        url = f"{bad.url}/{site.file.name}"
        run = omni("add", site.file, "--url", url)
        assert run.returncode == code and said in run.stderr and url in run.stderr
        assert "--no-check" in run.stderr and omni("ls", "--quiet").stdout == ""
        asked = len(bad.requests)
        assert result(omni("add", site.file, "--url", url, "--no-check", "--json"))["mirrors"] == [url]
        assert len(bad.requests) == asked


@pytest.mark.parametrize(
    "url",
    ["ftp://h/x.gguf", "https://u:p@h.example/x.gguf", "https://h.example/x.gguf?key=1", "h.example/x.gguf"],
)
def test_a_url_that_others_must_not_be_told(site: Site, omni: Run, url: str) -> None:
    run = omni("add", site.file, "--url", url, "--no-check")
    assert run.returncode == 2 and "Traceback" not in run.stderr and omni("ls", "--quiet").stdout == ""


def test_the_files_of_a_set_go_by_their_names(tmp_path: Path, omni: Run) -> None:
    paths = [tmp_path / name for name in ("set-00001-of-00002.gguf", "set-00002-of-00002.gguf")]
    for path, data in zip(paths, split_set(tiny_model(3), "set", [4]).values(), strict=True):
        path.write_bytes(data)
    with serving(tmp_path) as web:
        urls = [f"{web.url}/{path.name}" for path in paths]
        both = omni("add", paths[0], "--url", urls[1], "--url", urls[0], "--json")
        assert result(both)["mirrors"] == urls
        run = omni("add", paths[0], "--url", f"{web.url}/else.gguf")
        assert run.returncode == 2 and "2 files" in run.stderr


def test_peers_are_told_and_follow_nothing_here(
    site: Site, omni: Run, tmp_path: Path, start_seed: StartSeed
) -> None:
    publisher = tmp_path / "publisher"
    cid = omni("add", site.file, "--url", site.url, home=publisher).stdout.strip()
    seed = start_seed(publisher, "--no-mdns", "--up-limit", "200kB/s")
    asked = len(site.web.requests)
    pin = omni("pin", cid, "--peer", seed.addr, "--no-mdns", "--mirrors", "--json")
    done = result(pin)
    assert done["mirrors"] == [{"url": site.url, "peers": [seed.peer_id], "public": False, "followed": False}]
    assert list(done["peers"]) == [seed.peer_id] and "(not public)" in pin.stderr
    found = result(omni("providers", cid, "--peer", seed.addr, "--json"))
    assert found["mirrors"] == [{"url": site.url, "peers": [seed.peer_id], "public": False}]
    assert site.url in omni("providers", cid, "--peer", seed.addr).stdout
    assert len(site.web.requests) == asked


# --- on a network of its own, where an address is as public as any --------------------------


@pytest.fixture
def alone() -> Iterator[list[str]]:
    """What runs a command in a namespace of its own that has the address 9.9.9.9 and leads nowhere."""
    name = f"omni{secrets.token_hex(3)}"
    try:
        for words in (["netns", "add", name], ["-n", name, "link", "set", "lo", "up"],
                      ["-n", name, "addr", "add", "9.9.9.9/32", "dev", "lo"]):  # fmt: skip
            subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces can not be made here (root and iproute2 needed): {error}")
    try:
        yield ["ip", "netns", "exec", name]
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.parametrize("command", ["pin", "run"])
def test_a_fetch_follows_what_peers_name_once_that_is_allowed(
    command: str, alone: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "www" / DEMO.name
    file.parent.mkdir()
    file.write_bytes(DEMO.read_bytes())

    def omni(home: str, *args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*alone, *OMNI, *map(str, args)], env={**os.environ, "OMNI_HOME": str(tmp_path / home)},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def started(*words: str, home: str = "none") -> subprocess.Popen[str]:
        return running.enter_context(
            ended(subprocess.Popen(
                [*alone, *words], env={**os.environ, "OMNI_HOME": str(tmp_path / home)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            ))
        )  # fmt: skip

    def line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    with ExitStack() as running:
        server = (sys.executable, "-m", "tests.unit.transfer.web_server")
        url = f"{line(started(*server, str(file.parent), '9.9.9.9'))}/{file.name}"
        cid = result(omni("publisher", "add", file, "--copy", "--url", url, "--json"))["cid"]
        # What this seed holds is gone; what it knows of the model is not.
        for copy in (tmp_path / "publisher" / "models").glob("*/*.gguf"):
            copy.unlink()
        listen = ("--listen", "/ip4/127.0.0.1/tcp/0", "--no-mdns")
        addr = json.loads(line(started(*OMNI, "seed", "--json", *listen, home="publisher")))["addrs"][0]
        asked = ("--peer", addr, "--no-mdns", "--mirrors", "--json")
        if command == "run":
            done = result(omni("me", "run", cid, "--prompt", "Once", "--max-tokens", "3", *asked))
            assert len(done["tokens"]) == 3
            return
        done = result(omni("me", "pin", cid, *asked))
    assert Path(done["path"]).read_bytes() == file.read_bytes()
    assert done["peers"][f"{url} (named by a peer)"] == done["bytes_fetched"] > 0
    assert [(hint["url"], hint["public"], hint["followed"]) for hint in done["mirrors"]] == [
        (url, True, True)
    ]


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    with process:
        try:
            yield process
        finally:
            process.kill()

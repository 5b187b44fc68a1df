"""The commands that need no network, run as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from omnistore.block import Block
from omnistore.config import load_key
from omnistore.testing.tiny_gguf import tiny_model

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_model(layers=3).build())
    return path


def parsed(done: subprocess.CompletedProcess[str], code: int = 0) -> Any:
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def test_help_is_quick_and_light() -> None:
    code = "import sys; from omnistore.cli.main import main; main(['--help']); print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"libp2p", "trio", "mlx", "numpy", "sqlite_utils", "rich", "cryptography"})
    # The best of a few: the machine may be busy with other things.
    took = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "omnistore.cli.main", "--help"], capture_output=True, check=True
        )
        took.append(time.perf_counter() - started)
    assert min(took) < 0.4


def test_a_model_from_adding_to_gc(omni: Run, gguf: Path, tmp_path: Path) -> None:
    done = omni("add", gguf)
    assert done.returncode == 0
    cid = done.stdout.splitlines()[-1]
    assert cid.startswith("bafyr4i")
    assert omni("add", gguf, "--quiet").stdout == cid + "\n"
    assert omni("ls", "--quiet").stdout == cid + "\n"
    assert "tiny" in omni("ls").stdout
    assert gguf.name in omni("show", "tiny").stdout
    assert "blocks are good" in omni("verify").stdout
    out = tmp_path / "out.gguf"
    assert omni("export", cid[:20], "--output", out).returncode == 0
    assert out.read_bytes() == gguf.read_bytes()
    assert omni("unpin", "tiny").returncode == 0
    assert omni("gc").returncode == 0
    assert omni("ls", "--quiet").stdout == ""
    assert gguf.exists()


def test_every_command_speaks_json(omni: Run, gguf: Path, tmp_path: Path) -> None:
    added = parsed(omni("add", gguf, "--json", "--name", "fine", "--sha256"))
    assert {"cid", "manifest", "parts", "bytes", "blocks"} <= added.keys()
    assert added["bytes"] == gguf.stat().st_size
    peer = parsed(omni("id", "--json"))["peer_id"]
    shown = parsed(omni("show", "fine", "--json"))
    assert shown["publisher"] == peer
    assert shown["files"][0]["path"] == str(gguf)
    assert len(shown["files"][0]["sha256"]) == 64
    assert [part["part"] for part in shown["parts"]] == [part["part"] for part in added["parts"]]
    (listed,) = parsed(omni("ls", "--json"))
    assert (listed["cid"], listed["whole"], listed["layers"]) == (added["cid"], True, "embed,0-2,head")
    verified = parsed(omni("verify", added["manifest"], "--json"))
    assert verified["faults"] == []
    assert verified["blocks"] > added["blocks"] // 2
    exported = parsed(omni("export", "fine", "--output", tmp_path / "out", "--json"))
    assert exported["files"] == [str(tmp_path / "out")]
    assert parsed(omni("du", "--json"))["referenced"] == added["bytes"]
    unpinned = parsed(omni("unpin", "fine", "--layers", "0-1", "--json"))
    assert unpinned["unpinned"] == ["layer.0", "layer.1"]
    assert "layer.2" in unpinned["pinned"]
    parsed(omni("unpin", "fine", "--json"))
    dry = parsed(omni("gc", "--dry-run", "--json"))
    assert parsed(omni("gc", "--json")) == {**dry, "dry_run": False}
    assert dry["released"] == [str(gguf)]
    assert parsed(omni("ls", "--json")) == []


def test_rot_is_found_named_and_mended(omni: Run, gguf: Path) -> None:
    cid = parsed(omni("add", gguf, "--json"))["cid"]
    good = gguf.read_bytes()
    gguf.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    found = parsed(omni("verify", "--json"), code=4)
    assert [fault["path"] for fault in found["faults"]] == [str(gguf)]
    done = omni("verify", "--repair")
    assert done.returncode == 4
    assert f"omni add {gguf}" in done.stderr
    gguf.write_bytes(good)
    assert omni("add", gguf).stdout.split()[-1] == cid
    assert omni("verify").returncode == 0


@pytest.mark.parametrize(
    ("args", "code", "culprit"),
    [
        (["add", "/nowhere/x.gguf"], 2, "/nowhere/x.gguf"),
        (["show", "nobody"], 6, "nobody"),
        (["show", "bafyr4i" + "a" * 60], 2, "bafyr4i"),
        (
            ["export", "bafyr4ied235itbhi4acry55frdbn2zkpuqnycxwiojidspwm3m7lcj4ef4", "--output", "x"],
            6,
            "bafyr4ied",
        ),
        (["unpin", "12D3KooWQfnSCYG9uNXZeu25N4m7Zyegzub6a3Ru8u2f9RfDTN2G"], 6, "12D3"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_what_goes_wrong_is_named(omni: Run, args: list[str], code: int, culprit: str) -> None:
    done = omni(*args, "--json")
    assert done.returncode == code
    assert culprit in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["event"] == "error"


def test_a_file_that_is_no_gguf(omni: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGML and so on, but no GGUF at all")
    done = omni("add", path)
    assert done.returncode == 3
    assert "bad.gguf" in done.stderr


def test_two_processes_add_to_one_home(home: Path, tmp_path: Path) -> None:
    paths = []
    for n in range(4):
        paths.append(tmp_path / f"model{n}.gguf")
        paths[-1].write_bytes(tiny_model(layers=2, seed=f"{n}").build())
    environ = {**os.environ, "OMNI_HOME": str(home)}
    command = [sys.executable, "-m", "omnistore.cli.main", "add", "--json"]
    started = [
        subprocess.Popen(
            [*command, *(["--copy"] if n % 2 else []), str(path)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n, path in enumerate([*paths, *paths])
    ]
    ended = [(process.communicate(timeout=60), process.returncode) for process in started]
    # The same model copied in by two at once may find it locked, and says so; nothing else may fail.
    assert {code for _, code in ended} <= {0, 7}, ended
    done = subprocess.run(
        [sys.executable, "-m", "omnistore.cli.main", "verify", "--json"],
        env=environ,
        capture_output=True,
        text=True,
    )
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(v["name"], v["whole"], v["faults"]) for v in verdicts] == [
        (f"model{n}", True, []) for n in range(4)
    ]
    assert len({json.loads(out)["cid"] for (out, _), code in ended if code == 0}) == 4


def test_a_reader_that_goes_away_is_no_error(omni: Run, gguf: Path, home: Path) -> None:
    assert omni("add", gguf).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "omnistore.cli.main", "show", "tiny"],
        env={**os.environ, "OMNI_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_reference_models(omni: Run, shared: Path, tmp_path: Path) -> None:
    for name in ("stories260K-F32", "stories260K-F16"):
        source = shared / "models" / f"{name}.gguf"
        cid = omni("add", source, "--copy").stdout.split()[-1]
        assert omni("export", cid, "--output", tmp_path / name).returncode == 0
        assert (tmp_path / name).read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    "words",
    [["pin", "CID"], ["run", "CID", "--prompt", "x"], ["providers", "CID"], ["pin", "PEER/name"]],
    ids=" ".join,
)
def test_with_nobody_to_ask_a_command_says_so_and_waits_for_nobody(
    words: list[str], omni: Run, home: Path
) -> None:
    home.mkdir()
    (home / "config.toml").write_text("mdns = false\n")
    named = {"CID": str(Block.node(b"\xa0").cid), "PEER/name": f"{load_key(home).public.peer_id}/name"}
    done = omni(*[named.get(word, word) for word in words])
    assert (done.returncode, "there is nobody to ask" in done.stderr) == (2, True), done.stderr
    assert "--bootstrap" in done.stderr


@pytest.mark.parametrize(
    "words",
    [["show", "nope", "--log-format", "json"], ["show", "--log-format=json", "--nonsense"]],
    ids=["by omni", "by click"],
)
def test_an_error_is_a_line_of_json_where_the_log_is(words: list[str], omni: Run) -> None:
    done = omni(*words)
    (line,) = done.stderr.splitlines()
    told = json.loads(line)
    assert (told["level"], told["logger"], done.stdout) == ("error", "omni", "")
    assert ("nope" in told["message"]) or ("--nonsense" in told["message"])

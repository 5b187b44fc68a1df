"""What people, shells and full disks do to the command line: an exit code and a sentence, never a traceback.

Hostile GGUF contents, manifests, messages and frames have tables of their own next to their decoders
(`omnistore/testing/bad_gguf.py`, `spec/vectors`); here they come in through the front door.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from omnistore.cli.main import main
from omnistore.testing.tiny_gguf import tiny_model

UNKNOWN = "bafyr4ied235itbhi4acry55frdbn2zkpuqnycxwiojidspwm3m7lcj4ef4"
PEER = "12D3KooWQfnSCYG9uNXZeu25N4m7Zyegzub6a3Ru8u2f9RfDTN2G"
Said = Callable[..., tuple[int, str]]


@pytest.fixture
def said(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command line in this process; its exit code and what it said on stderr."""
    monkeypatch.setenv("OMNI_HOME", str(home))

    def run(*args: object) -> tuple[int, str]:
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        assert "bug in omni" not in captured.err
        assert "Traceback" not in captured.err
        if "--json" in args:
            assert [json.loads(line) for line in captured.out.splitlines()]
        return code, captured.err

    return run


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_model(layers=3).build())
    return path


def test_what_is_no_regular_file_is_not_opened(said: Said, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "directory.gguf").mkdir()
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    (tmp_path / "dangling.gguf").symlink_to("nowhere.gguf")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.gguf"))
        for name, why in (
            ("fifo.gguf", "not a regular file"),
            ("socket.gguf", "not a regular file"),
            ("/dev/zero", "not a regular file"),
            ("directory.gguf", "a directory"),
            ("loop.gguf", "symbolic links"),
            ("dangling.gguf", "no such file"),
            ("n" * 5000, "File name too long"),
        ):
            code, told = said("add", tmp_path / name, "--json")
            assert (code, why in told) == (2, True), told


@pytest.mark.parametrize("size", [0, 1, 4, 8, 23, 24, 25, 60, 400, 2000])
def test_a_file_cut_short_anywhere(said: Said, gguf: Path, size: int) -> None:
    os.truncate(gguf, size)
    code, told = said("add", gguf, "--json")
    assert code == 3
    assert "tiny.gguf: truncated" in told


def test_a_file_of_eight_terabytes_of_nothing(said: Said, tmp_path: Path) -> None:
    for name, begins, why in (
        ("zeros.gguf", b"", "not a GGUF"),
        ("empty-strings.gguf", b"GGUF\3\0\0\0" + bytes(8) + b"\xff\xff" + bytes(6), "twice|limit|type"),
    ):
        path = tmp_path / name
        path.write_bytes(begins)
        os.truncate(path, 1 << 43)
        code, told = said("add", path)
        assert code == 3, told
        assert any(word in told for word in why.split("|")), told


@pytest.mark.parametrize("option", ["--peer", "--bootstrap"])
@pytest.mark.parametrize(
    "address",
    [
        "",
        "/",
        "127.0.0.1:4141",
        "http://127.0.0.1:80",
        "/ip4/127.0.0.1/tcp/9",
        f"/p2p/{PEER}",
        f"/ip4/1.2.3/tcp/9/p2p/{PEER}",
        f"/ip4/127.0.0.1/tcp/0/p2p/{PEER}",
        f"/ip4/127.0.0.1/tcp/99999/p2p/{PEER}",
        f"/ip4/127.0.0.1/tcp/-1/p2p/{PEER}",
        f"/ip4/127.0.0.1/udp/9/p2p/{PEER}",
        f"/ip4/127.0.0.1/tcp/9/p2p/{PEER}\n",
        f"/ip4/127.0.0.1/tcp/9/p2p/{PEER}/p2p/{PEER}",
        f"/ip4/127.0.0.1/tcp/9/p2p/{UNKNOWN}",
        f"/unix/tmp/x/p2p/{PEER}",
    ],
)
def test_an_address_that_is_none_is_refused_at_once(said: Said, option: str, address: str) -> None:
    code, told = said("pin", UNKNOWN, option, address)
    assert code == 2, told
    assert "omni seed" in told  # the remedy: where a right one is printed


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not a CID"),
        ("b", "characters, and a CID of this network 59|another profile"),
        (UNKNOWN[:-1], "59"),
        (UNKNOWN + "x", "59"),
        (UNKNOWN.replace("a", "A", 1), "not base32"),
        ("bafyr4i" + "1" * 52, "not base32"),
        ("../../etc/passwd", "is not a CID"),
        ("b" * 100_000, "is not a CID"),
        ("%s%n", "is not a CID"),
        ("QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWKPBdG", "CIDv0"),
        (PEER, "peer ID"),
    ],
)
def test_a_cid_that_is_none_is_explained(said: Said, text: str, why: str) -> None:
    code, told = said("pin", text, "--json")
    assert code == 2
    assert any(reason in told for reason in why.split("|")), told
    assert len(told) < 500


def test_a_home_whose_name_is_too_long(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNI_HOME", "/tmp/" + "n" * 300)
    code, told = said("ls")
    assert code == 2
    assert "File name too long" in told


def test_a_home_whose_name_is_no_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    home = tmp_path / os.fsdecode(b"home\xff")
    monkeypatch.setenv("OMNI_HOME", str(home))
    assert main(["du", "--json"]) == 0
    assert json.loads(capfdbinary.readouterr().out.decode("ascii"))["home"] == str(home)
    assert main(["du"]) == 0
    assert os.fsencode(home) in capfdbinary.readouterr().out


def _shell(line: str, home: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", "-c", line.replace("omni", f"{sys.executable} -m omnistore.cli.main")],
        env={**os.environ, "OMNI_HOME": str(home), **environ},
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("omni id >&-", 0),
        ("omni id 2>&-", 0),
        ("omni add {gguf} 2>&-", 0),
        ("omni add {gguf} --json >&- 2>&- <&-", 0),
        ("omni verify 2>&-", 0),
        ("omni show nobody >&- 2>&-", 6),
        ("omni id >/dev/full", 6),
        ("omni ls --json >/dev/full", 6),
        ("omni --help >/dev/full", 6),
        ("omni add {gguf} 2>/dev/full", 0),
        ("omni show nobody 2>/dev/full", 6),
        ("omni bogus >/dev/full 2>/dev/full", 2),
    ],
)
def test_streams_that_are_closed_or_full(home: Path, gguf: Path, line: str, code: int) -> None:
    done = _shell(line.format(gguf=gguf), home)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "bug in omni" not in done.stderr
    if ">/dev/full" in line and code == 6 and "2>" not in line:
        assert "output can not be written" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_without_the_letters_of_a_name(home: Path, gguf: Path, encoding: str) -> None:
    added = _shell(f"omni add {gguf} --name Größe-模型", home)
    assert added.returncode == 0, added.stderr
    for line in ("omni ls", "omni show Größe-模型", "omni verify"):
        done = subprocess.run(
            [sys.executable, "-m", "omnistore.cli.main", *line.split()[1:]],
            env={**os.environ, "OMNI_HOME": str(home), "PYTHONIOENCODING": encoding},
            capture_output=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        assert b"Gr" in done.stdout
    listed = _shell("omni ls --json", home, PYTHONIOENCODING=encoding)
    assert json.loads(listed.stdout)[0]["name"] == "Größe-模型"


def test_a_file_that_went_away_is_one_fault_and_may_come_back(said: Said, gguf: Path) -> None:
    assert said("add", gguf)[0] == 0
    gguf.rename(gguf.with_name("elsewhere"))
    for args in (["verify"], ["verify", "--repair"]):
        code, told = said(*args)
        assert code == 4
        assert told.count("tiny.gguf can not be opened") == 1
        assert f"Put {gguf} back" in told
    for args in (["export", "tiny", "--output", str(gguf)], ["run", "tiny", "--no-mdns", "--prompt", "x"]):
        code, told = said(*args)
        assert code in (2, 6)
        assert "omni verify" in told
    gguf.with_name("elsewhere").rename(gguf)
    assert said("verify")[0] == 0


def test_bytes_that_were_forgotten_are_not_called_good(said: Said, gguf: Path) -> None:
    assert said("add", gguf)[0] == 0
    with gguf.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert said("verify", "--repair")[0] == 4
    code, told = said("verify")
    assert (code, "It is not whole" in told) == (0, True)


def test_a_file_that_may_not_be_read_is_not_forgotten(
    said: Said, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said("add", gguf)[0] == 0
    opened, allowed = os.open, os.access

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if os.fspath(path) == str(gguf):
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, mode)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        patched.setattr(os, "access", lambda path, mode: path != gguf and allowed(path, mode))
        code, told = said("export", "tiny", "--output", gguf.with_name("copy.gguf"))
    assert (code, "Permission denied" in told) == (6, True), told
    assert said("export", "tiny", "--output", gguf.with_name("copy.gguf"))[0] == 0


@pytest.mark.parametrize("path", ["/dev/zero", "/nowhere", "/tmp"])
def test_a_prompt_file_that_is_none(said: Said, gguf: Path, path: str) -> None:
    assert said("add", gguf)[0] == 0
    code, told = said("run", "tiny", "--prompt-file", path)
    assert code == 2
    assert "omni: " in told


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--max-tokens", "-1"], "max-tokens is -1"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--top-p", "7"], "top_p is 7"),
        (["--min-p", "nan"], "min_p is nan"),
        (["--top-k", "-1"], "top_k is -1"),
        (["--seed", "-1"], "seed is -1"),
        (["--context", "0"], "--context"),
        (["--context", "1"], "context has room for 1"),
        (["--engine", "cuda9"], "cuda9"),
        (["--layers", "5-2"], "5-2"),
        (["--layers", "0-99"], "0-99"),
        (["--layers", "٣"], "'٣' says nothing"),
        (["--layers", ""], "'' says nothing"),
        (["--with", "x"], "'x' is not a TCP multiaddr"),
        (["--prompt", "\udcff"], "valid UTF-8"),
        (["--prompt", "y " * 5000], "context has room for"),
        (["--prompt", "x" * (1 << 24) + "x"], "characters"),
        (["--stop", ""], "stop"),
    ],
)
def test_arguments_of_run_out_of_range(said: Said, gguf: Path, args: list[str], why: str) -> None:
    assert said("add", gguf)[0] == 0
    prompt = [] if "--prompt" in args else ["--prompt", "Once upon a time"]
    code, told = said("run", "tiny", *prompt, *args, "--json")
    assert (code, why in told) == (2, True), told


@pytest.mark.parametrize("args", [["--compute=nan"], ["--compute=inf"], ["--compute", "--allow", "somebody"]])
def test_what_is_lent_and_to_whom_is_checked(said: Said, args: list[str]) -> None:
    code, told = said("seed", "--listen", "/ip4/127.0.0.1/tcp/0", *args)
    assert code == 2, told
    assert args[-1].rpartition("=")[2] in told

"""The home and its identity."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from omnistore.config import KEY_NAME, Config, load_key
from omnistore.errors import BadConfig


def test_the_home_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config.from_environment({"OMNI_HOME": str(tmp_path)}).home == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Config.from_environment({}).home == tmp_path / ".omni"
    assert Config.from_environment({"OMNI_HOME": "~/x"}).home == tmp_path / "x"


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match="OMNI_HOME"):
        Config.from_environment({"OMNI_HOME": str(tmp_path / "file")})


def test_an_identity_is_made_once(home: Path) -> None:
    key = load_key(home)
    assert load_key(home).seed == key.seed
    assert (home / KEY_NAME).stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in home.iterdir()] == [KEY_NAME]


def test_the_file_is_in_libp2p_form(home: Path) -> None:
    key = load_key(home)
    data = (home / KEY_NAME).read_bytes()
    assert data == bytes.fromhex("08011240") + key.seed + key.public.raw


def test_the_identity_is_never_shown(home: Path) -> None:
    key = load_key(home)
    assert key.seed.hex() not in repr(key)
    assert key.seed.hex() not in str(key)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o620])
def test_a_key_that_others_can_read_is_refused(home: Path, mode: int) -> None:
    load_key(home)
    (home / KEY_NAME).chmod(mode)
    with pytest.raises(BadConfig, match="by others") as caught:
        load_key(home)
    assert "chmod 600" in str(caught.value.remedy)


@pytest.mark.parametrize(
    "data",
    [b"", b"short", bytes(68), bytes.fromhex("08011240") + bytes(64), bytes(69)],
    ids=["empty", "short", "zeros", "public-of-another", "long"],
)
def test_a_file_that_is_no_key_is_refused(home: Path, data: bytes) -> None:
    home.mkdir()
    path = home / KEY_NAME
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(BadConfig, match="not an Ed25519 private key"):
        load_key(home)
    assert path.read_bytes() == data


def test_many_processes_agree_on_one_identity(home: Path) -> None:
    code = "import sys; from pathlib import Path; from omnistore.config import load_key; sys.stdin.read(1);"
    code += "print(load_key(Path(sys.argv[1])).public.peer_id)"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("g")
        process.stdin.flush()
    assert len({process.communicate()[0] for process in started}) == 1
    assert [path.name for path in home.iterdir()] == [KEY_NAME]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_home_that_can_not_be_made(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BadConfig, match="can not be created"):
        load_key(tmp_path / "home")


def test_an_identity_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "identity.key", 0o600)
    with pytest.raises(BadConfig, match="not an Ed25519 private key"):
        load_key(tmp_path)

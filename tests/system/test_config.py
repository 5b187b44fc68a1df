"""`config.toml` and the commands that heed it."""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from omnistore.config import FILE_NAME, settings
from omnistore.testing.tiny_gguf import tiny_model

if TYPE_CHECKING:
    from tests.system.conftest import StartSeed

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_config_shows_every_setting_as_a_file(omni: Run, home: Path) -> None:
    home.mkdir()
    (home / FILE_NAME).write_text('window = "32MiB"\nmdns = false\n')
    done = omni("config")
    assert tomllib.loads(done.stdout) == {"window": "32MiB", "mdns": False}
    everything = "\n".join(line.removeprefix("# ") for line in done.stdout.splitlines() if " = " in line)
    assert tomllib.loads(everything).keys() == settings().keys()
    assert 'config.toml:1; default: "64MiB"' in done.stdout
    for described in settings().values():
        assert described.reason.split()[0] in done.stdout


def test_config_in_json_says_where_values_come_from(omni: Run, home: Path) -> None:
    home.mkdir()
    (home / FILE_NAME).write_text('window = "32MiB"')
    document = json.loads(omni("config", "--json").stdout)
    by_name = {row["name"]: row for row in document["settings"]}
    assert by_name.keys() == settings().keys()
    assert by_name["window"]["value"] == 32 << 20
    assert by_name["window"]["source"] == f"{home / FILE_NAME}:1"
    assert by_name["up_limit"]["source"] == "default"
    assert all(row["unit"] and row["reason"] for row in by_name.values())


def test_every_command_refuses_a_bad_file(omni: Run, home: Path) -> None:
    home.mkdir()
    (home / FILE_NAME).write_text("\nwindows = 1")
    for command in ("config", "ls", "seed", "id"):
        done = omni(command)
        assert done.returncode == 2
        assert f"{home / FILE_NAME}:2: there is no setting 'windows'" in done.stderr


def test_the_file_says_whom_to_ask_and_the_command_line_overrides_it(
    start_seed: StartSeed, omni: Run, home: Path, tmp_path: Path
) -> None:
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(tiny_model(layers=2).build())
    cid = omni("add", gguf, home=tmp_path / "seed").stdout.split()[-1]
    addr = start_seed(tmp_path / "seed").addr
    home.mkdir()
    dead = addr.replace(addr.split("/")[4], "1")
    (home / FILE_NAME).write_text(f'bootstrap = ["{dead}"]')
    refused = omni("pin", cid)
    assert refused.returncode == 9
    assert "/ip4/127.0.0.1/tcp/1:" in refused.stderr
    assert omni("pin", cid, "--bootstrap", addr).returncode == 0
    (home / FILE_NAME).write_text(f'bootstrap = ["{addr}"]')
    other = omni("pin", cid, "--output", tmp_path / "out.gguf")
    assert other.returncode == 0, other.stderr
    assert (tmp_path / "out.gguf").read_bytes() == gguf.read_bytes()

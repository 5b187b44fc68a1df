"""spec/service/README.md against what a seed really answers, and the unit files against their readers."""

from __future__ import annotations

import configparser
import os
import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from omnistore.http.client import running_seed
from omnistore.http.metrics import Metric, render

if TYPE_CHECKING:
    from tests.system.conftest import StartSeed

TEXT = (Path(__file__).parents[2] / "spec" / "service" / "README.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def test_the_systemd_unit_starts_a_seed() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]  # systemd's names have capitals
    unit.read_string(block("ini"))
    assert unit["Service"]["ExecStart"].split()[1:] == ["seed", "--quiet"]
    assert unit["Service"]["RestartPreventExitStatus"] == "2 7"
    assert unit["Service"]["Environment"].split("=")[1] == unit["Service"]["ReadWritePaths"]


def test_systemd_takes_every_line_of_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here: it comes with systemd")
    unit = tmp_path / "omni.service"
    program = str(Path(sys.executable).with_name("omni"))
    unit.write_text(block("ini").replace("%h/omni/.venv/bin/omni", program))

    def complaints() -> str:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--user", str(unit)],
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        return "\n".join(line for line in done.stderr.splitlines() if "omni.service" in line)

    if "Failed to initialize manager" in complaints():
        pytest.skip("systemd-analyze can not read a user's units on this machine")
    assert complaints() == ""
    unit.write_text(unit.read_text().replace("NoNewPrivileges", "NoNewPrivilege"))
    assert "NoNewPrivilege" in complaints()


def test_the_launchd_agent_starts_a_seed() -> None:
    agent = plistlib.loads(block("xml").encode())
    assert agent["ProgramArguments"][1:] == ["seed", "--quiet"]
    assert agent["Umask"] == 0o077


def test_labels_are_escaped() -> None:
    text = render([Metric("x_total", "counter", "X.", label="of", by_label={'a"\\\n': 2})])
    assert text.splitlines()[2] == 'x_total{of="a\\"\\\\\\n"} 2'


def test_every_metric_and_every_field_is_documented(start_seed: StartSeed, home: Path) -> None:
    start_seed(home).event("ready")

    async def ask() -> tuple[str, dict[str, object]]:
        seed = await running_seed(home)
        assert seed is not None
        return await seed.text("/metrics"), await seed.get("/v1/status")

    text, status = trio.run(ask)
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            assert f"`{line.split()[2]}" in TEXT, line
    for name in status:
        assert f"`{name}`" in TEXT, name
    documented = set(re.findall(r"omni_[a-z_]+", TEXT))
    assert documented <= set(re.findall(r"omni_[a-z_]+", text))

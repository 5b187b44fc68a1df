"""What a fetch shows while it runs."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from omnistore.cli.fetching import fetch_view
from omnistore.cli.output import Output

FILES = [{"name": f"m-0000{n}-of-00003.gguf", "done": 0, "total": 1_000_000} for n in (1, 2, 3)]
NEAR, FAR = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA", "https://models.example.org/m.gguf"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def event(done: int, files: list[dict[str, Any]], by_peer: dict[str, int]) -> dict[str, Any]:
    return {
        "event": "progress", "model": "m", "done": done, "total": 3_000_000, "peers": len(by_peer),
        "bytes_fetched": done, "by_peer": by_peer, "files": files,
    }  # fmt: skip


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal as stderr; in the test itself, for pytest sets stderr anew after fixtures."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return screen


def test_a_terminal_shows_the_whole_the_files_under_way_and_the_peers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = terminal_of(monkeypatch)
    started = [FILES[0] | {"done": 500_000}, FILES[1], FILES[2]]
    with fetch_view(Output()) as view:
        view.show(event(500_000, started, {NEAR: 400_000, FAR: 100_000}))
    shown = terminal.getvalue()
    assert "m from 2 peers" in shown
    assert "m-00001-of-00003.gguf" in shown
    assert "m-00002-of-00003.gguf" not in shown
    assert f"…{NEAR[-12:]}" in shown
    assert FAR in shown


def test_one_file_has_no_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_of(monkeypatch)
    with fetch_view(Output()) as view:
        view.show(event(500_000, [FILES[0] | {"done": 500_000}], {NEAR: 500_000}))
    assert "m from 1 peer" in terminal.getvalue()
    assert "gguf" not in terminal.getvalue()


def test_elsewhere_it_is_lines_and_in_json_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with fetch_view(Output()) as view:
        view.show(event(3_000_000, FILES, {NEAR: 3_000_000}))
    assert "\x1b" not in capsys.readouterr().err
    with fetch_view(Output(json=True)) as view:
        view.show(event(3_000_000, FILES, {NEAR: 3_000_000}))
    assert capsys.readouterr() == ("", "")

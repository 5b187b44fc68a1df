"""Results on stdout, the rest on stderr."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omnistore.cid import CID, RAW
from omnistore.cli import output as module
from omnistore.cli.output import Output, size


def test_people_see_text_and_programs_json(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"cid": CID.of_digest(RAW, bytes(32)), "path": Path("/x"), "digest": b"\x01"}
    Output().result(document, "text")
    assert capsys.readouterr().out == "text\n"
    Output(json=True).result(document, "text")
    assert json.loads(capsys.readouterr().out) == {
        "cid": str(CID.of_digest(RAW, bytes(32))),
        "path": "/x",
        "digest": "01",
    }


def test_events_are_for_programs_only(capsys: pytest.CaptureFixture[str]) -> None:
    Output().event("ready", peer="p")
    assert capsys.readouterr() == ("", "")
    Output(json=True).event("ready", peer="p")
    assert json.loads(capsys.readouterr().out) == {"event": "ready", "peer": "p"}


def test_notes_stay_off_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=True).note("by the way")
    Output(json=True).line("for people")
    assert capsys.readouterr() == ("", "by the way\n")
    Output(quiet=True).note("by the way")
    assert capsys.readouterr() == ("", "")


def test_progress_without_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Output().progress("adding x", 4_000_000) as bar:
        bar.advance(1_000_000)
        assert capsys.readouterr().err == ""
        now[0] += 10
        bar.advance(1_000_000)
        assert capsys.readouterr().err == "adding x: 50 % (2.0 MB of 4.0 MB, 200.0 kB/s)\n"
        bar.resize(2_000_000)
        bar.describe("ending")
        now[0] += 10
        bar.advance(0)
        assert capsys.readouterr().err.startswith("ending: 100 %")


def test_progress_on_a_terminal_is_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    with Output().progress("adding", 100) as bar:
        bar.describe("still adding")
        bar.resize(200)
        bar.advance(200)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("output", [Output(quiet=True), Output(json=True)])
def test_progress_can_be_silent(capsys: pytest.CaptureFixture[str], output: Output) -> None:
    with output.progress("adding", 100) as bar:
        bar.advance(100)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_185_568, "1.2 MB"), (2 * 10**15, "2000.0 TB")],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert size(count) == text

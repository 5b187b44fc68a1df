"""The log as lines of text and as JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from omnistore.cli.logs import JSONLines, configure_logging
from omnistore.cli.output import Output


@pytest.fixture
def configured() -> Iterator[Callable[..., None]]:
    """Configure logging as a new process would."""
    root = logging.getLogger()
    level, ours = root.level, list[logging.Handler]()

    def configure(*args: Any, **options: Any) -> None:
        # pytest has put its own there by now.
        theirs, root.handlers[:] = root.handlers[:], []
        configure_logging(*args, **options)
        ours.extend(root.handlers)
        root.handlers += theirs

    yield configure
    root.handlers = [one for one in root.handlers if one not in ours]
    root.setLevel(level)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("verbose", "quiet", "shown"),
    [(0, False, ["warning", "error"]), (0, True, ["error"]), (1, False, ["info", "warning", "error"])],
)
def test_levels(
    verbose: int,
    quiet: bool,
    shown: list[str],
    configured: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    configured(verbose, quiet, "json")
    for level in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger("omnistore.some"), level)("said at %s", level)
        getattr(logging.getLogger("library"), level)("nothing new")
    said = [json.loads(line) for line in lines(capsys)]
    assert [line["level"] for line in said if line["logger"] == "omnistore.some"] == shown
    assert [line["level"] for line in said if line["logger"] == "library"] == ["error"]
    assert said[0]["message"] == f"said at {shown[0]}"


def test_an_exception_is_in_its_line(
    configured: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    configured(0, form="json")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("omnistore").exception("failed")
    (line,) = lines(capsys)
    assert "ValueError" in json.loads(line)["exception"]


def test_notes_are_in_the_log_when_it_is_json(
    configured: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    configured(0, form="json")
    Output(log_format="json").note("joined")
    Output(log_format="json", quiet=True).note("not said")
    (line,) = lines(capsys)
    assert json.loads(line) | {"time": ""} == {
        "time": "", "level": "info", "logger": "omni", "message": "joined",
    }  # fmt: skip


def test_text_is_for_people(configured: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    configured(0)
    logging.getLogger("omnistore").warning("beware")
    Output().note("joined")
    assert lines(capsys) == ["WARNING: beware", "joined"]


def test_a_line_has_a_time_that_parses() -> None:
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "it", (), None)
    assert json.loads(JSONLines().format(record))["time"].endswith("+00:00")

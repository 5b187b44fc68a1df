"""The log: where it goes and in which form. The one place that configures Python's `logging`.

On stderr, for people as lines of text, for programs (`--log-format json`) as one JSON object per line
with `time`, `level`, `logger` and `message`. Decides what is shown, never what is said.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Final, Literal, TypeAlias

LogFormat: TypeAlias = Literal["text", "json"]
OWN: Final = ("omnistore", "omninfer")
NOTES: Final = "omni"
"""The logger of what commands say to people, where that is asked for as JSON."""


class JSONLines(logging.Formatter):
    """One object per line; ASCII, so that the line parses whatever the encoding of stderr."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(verbose: int, quiet: bool = False, form: LogFormat = "text") -> None:
    """Send the log to stderr: our own from warnings up, more with `verbose`; libraries' always less."""
    own = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    out = logging.StreamHandler(sys.stderr)
    text = "%(asctime)s %(levelname)s %(name)s: %(message)s" if verbose else "%(levelname)s: %(message)s"
    out.setFormatter(JSONLines() if form == "json" else logging.Formatter(text))
    logging.basicConfig(level=logging.ERROR if verbose < 2 else logging.INFO, handlers=[out])
    for package in OWN:
        logging.getLogger(package).setLevel(own)
    logging.getLogger(NOTES).setLevel(logging.INFO)


def note(text: str) -> None:
    """Something a command says to people, as a line of the log."""
    logging.getLogger(NOTES).info("%s", text)


def complain(text: str) -> None:
    """Why a command failed, as a line of the log; in JSON, whether logging was configured by then or not."""
    if not logging.getLogger().handlers:
        configure_logging(0, form="json")
    logging.getLogger(NOTES).error("%s", text)

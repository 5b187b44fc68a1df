"""How every command talks: results on stdout, everything else on stderr.

`--json` makes stdout machine-readable (one document, or one per line for streams) and `--quiet`
silences notes and progress. `with_output` gives a command the options and an `Output`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import click

from omnistore.cid import CID
from omnistore.cli.logs import LogFormat, configure_logging, note

_LINE_EVERY: Final = 5.0
"""Seconds between two lines of progress where there is no terminal to draw a bar on."""


class Progress(Protocol):
    """Something that takes a while; safe to call from any thread."""

    def advance(self, amount: int) -> None:
        """`amount` more of the total is done."""
        ...

    def describe(self, text: str) -> None:
        """Say what is happening now."""
        ...

    def resize(self, total: int) -> None:
        """The total became known, or changed."""
        ...


@dataclass(frozen=True, slots=True)
class Output:
    """Where one command's words go."""

    json: bool = False
    quiet: bool = False
    log_format: LogFormat = "text"

    @property
    def shows_bars(self) -> bool:
        """Whether somebody wants to watch."""
        return not (self.quiet or self.json or self.log_format == "json")

    def result(self, document: Mapping[str, Any] | list[Any], text: str = "") -> None:
        """What was asked for: `document` with `--json`, else `text` (nothing when empty)."""
        if self.json:
            self._write(document)
        elif text:
            self.line(text)

    def event(self, name: str, **fields: Any) -> None:
        """One line of a stream; shown with `--json` only."""
        if self.json:
            self._write({"event": name, **fields})

    def line(self, text: str) -> None:
        """A line of the result for people; never with `--json`."""
        if not self.json:
            click.echo(text)

    def note(self, text: str) -> None:
        """Something a person may want to know that is not the result."""
        if self.quiet:
            return
        if self.log_format == "json":
            note(text)
        else:
            tell(text)

    @contextmanager
    def progress(self, what: str, total: int, *, binary: bool = True) -> Iterator[Progress]:
        """Show progress over `total` (bytes if `binary`): a bar on a terminal, else a line now and then."""
        if not self.shows_bars:
            yield _Silent()
        elif sys.stderr.isatty():
            with _bar(what, total, binary) as bar:
                yield bar
        else:
            yield _Lines(what, total, binary, time.monotonic())

    def _write(self, document: object) -> None:
        # ASCII: the same line parses whatever the locale, also one that names a file of no encoding.
        click.echo(json.dumps(document, default=_plain))


def with_output(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--json`, `--quiet`, `-v` and `--log-format`, and an `Output` as its first argument."""

    @click.option(
        "--json", "as_json", is_flag=True, help="Print JSON on stdout, one document or one per line."
    )
    @click.option("--quiet", "-q", is_flag=True, help="Print results and errors only.")
    @click.option("--verbose", "-v", count=True, help="Log to stderr; twice for more.")
    @click.option(
        "--log-format", type=click.Choice(["text", "json"]), default="text",
        help="What goes to stderr: lines for people, or JSON objects.",
    )  # fmt: skip
    @functools.wraps(command)
    def run(
        *args: Any, as_json: bool, quiet: bool, verbose: int, log_format: LogFormat, **options: Any
    ) -> Any:
        configure_logging(verbose, quiet, log_format)
        return command(Output(as_json, quiet, log_format), *args, **options)

    return run


def tell(text: str) -> None:
    """A line to stderr. What can not be said there, its disk full or its reader gone, stays unsaid."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


def size(count: float) -> str:
    """Bytes for people, in the powers of 1000 that disks are sold by."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit always fits")


def _plain(value: object) -> object:
    if isinstance(value, CID | Path):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} has no JSON form")


class _Silent:
    def advance(self, amount: int) -> None:
        pass

    def describe(self, text: str) -> None:
        pass

    def resize(self, total: int) -> None:
        pass


class _Lines:
    """A line to stderr every few seconds, for logs and pipes."""

    def __init__(self, what: str, total: int, binary: bool, now: float) -> None:
        self._what, self._total, self._binary = what, total, binary
        self._done = 0
        self._started = self._shown = now

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._shown < _LINE_EVERY:
            return
        self._shown = now
        rate = self._done / (now - self._started)
        percent = 100 * self._done // self._total if self._total else 0
        amounts = (self._done, self._total, rate)
        done, total, speed = (size(n) if self._binary else f"{n:.0f}" for n in amounts)
        tell(f"{self._what}: {percent} % ({done} of {total}, {speed}/s)")

    def describe(self, text: str) -> None:
        self._what = text

    def resize(self, total: int) -> None:
        self._total = total


@contextmanager
def _bar(what: str, total: int, binary: bool) -> Iterator[Progress]:
    # rich takes 40 ms to import and only a terminal needs it.
    from rich import progress as drawn
    from rich.console import Console

    columns = (
        (drawn.DownloadColumn(), drawn.TransferSpeedColumn()) if binary else (drawn.MofNCompleteColumn(),)
    )
    bars = drawn.Progress(
        drawn.TextColumn("{task.description}"),
        drawn.BarColumn(),
        *columns,
        drawn.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bars.add_task(what, total=total)

    class Bar:
        def advance(self, amount: int) -> None:
            bars.advance(task, amount)

        def describe(self, text: str) -> None:
            bars.update(task, description=text)

        def resize(self, total: int) -> None:
            bars.update(task, total=total)

    with bars:
        yield Bar()

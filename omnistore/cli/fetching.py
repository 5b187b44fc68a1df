"""How a fetch looks while it runs: bars on a terminal, a line now and then elsewhere, or nothing.

On a terminal there is a bar for the whole with its rate and what is left, one for each file of a split
set that is under way, and a line for each of the busiest peers. Shows events; knows no fetch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

from omnistore.cli.output import Output, Progress

if TYPE_CHECKING:
    from rich import progress as drawn

MOST_FILES: Final = 6
"""Files shown at once."""
MOST_PEERS: Final = 8
"""Peers shown; those that sent most."""


class View(Protocol):
    """Where the progress of a fetch is shown."""

    def show(self, event: dict[str, Any]) -> None:
        """One `progress` event."""
        ...


@contextmanager
def fetch_view(output: Output) -> Iterator[View]:
    """The view that suits where stderr goes."""
    if output.shows_bars and sys.stderr.isatty():
        with _terminal() as view:
            yield view
    else:
        with output.progress("looking for the model", 0) as bar:
            yield _Plain(bar)


def peers_text(count: int) -> str:
    """A number of peers, in words."""
    return "1 peer" if count == 1 else f"{count} peers"


class _Plain:
    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._shown = 0

    def show(self, event: dict[str, Any]) -> None:
        self._bar.resize(event["total"])
        self._bar.describe(f"{event['model']} from {peers_text(event['peers'])}")
        self._bar.advance(event["done"] - self._shown)
        self._shown = event["done"]


@contextmanager
def _terminal() -> Iterator[View]:
    # rich takes 40 ms to import and only a terminal needs it.
    from rich import progress as drawn
    from rich.console import Console, Group
    from rich.live import Live

    text = drawn.TextColumn("{task.description}", markup=False)
    files = drawn.Progress(
        text,
        drawn.BarColumn(),
        drawn.DownloadColumn(),
        drawn.TransferSpeedColumn(),
        drawn.TimeRemainingColumn(),
    )
    peers = drawn.Progress(text, drawn.FileSizeColumn(), drawn.TransferSpeedColumn())
    with Live(Group(files, peers), console=Console(stderr=True), transient=True, refresh_per_second=5):
        yield _Bars(files, peers)


class _Bars:
    def __init__(self, files: drawn.Progress, peers: drawn.Progress) -> None:
        self._files = files
        self._peers = peers
        self._tasks: dict[str, drawn.TaskID] = {}
        self._waiting: drawn.TaskID | None = files.add_task("looking for the model", total=None)

    def show(self, event: dict[str, Any]) -> None:
        if self._waiting is not None:
            self._files.remove_task(self._waiting)
            self._waiting = None
        whole = f"{event['model']} from {peers_text(event['peers'])}"
        self._update(self._files, "", whole, event["done"], event["total"])
        under_way = [one for one in event["files"] if 0 < one["done"] < one["total"]]
        shown = under_way[:MOST_FILES] if len(event["files"]) > 1 else []
        for one in shown:
            self._update(self._files, f"file {one['name']}", f"  {one['name']}", one["done"], one["total"])
        busiest = sorted(event["by_peer"].items(), key=lambda item: -item[1])[:MOST_PEERS]
        for peer, count in busiest:
            self._update(self._peers, f"peer {peer}", f"  {_short(peer)}", count, None)
        self._keep({"", *(f"file {one['name']}" for one in shown), *(f"peer {peer}" for peer, _ in busiest)})

    def _update(self, bars: drawn.Progress, key: str, text: str, done: int, total: int | None) -> None:
        """Draw one row; what was there when it appeared does not count for its rate."""
        if key not in self._tasks:
            self._tasks[key] = bars.add_task(text, completed=done, total=total)
        bars.update(self._tasks[key], description=text, completed=done, total=total, visible=True)

    def _keep(self, keys: set[str]) -> None:
        """Hide the rows of files that are done and of peers that others overtook."""
        for key, task in self._tasks.items():
            if key not in keys:
                (self._peers if key.startswith("peer ") else self._files).update(task, visible=False)


def _short(peer: str) -> str:
    """A peer ID by its end, where IDs differ; a URL as it is."""
    return peer[:60] if "/" in peer else f"…{peer[-12:]}"

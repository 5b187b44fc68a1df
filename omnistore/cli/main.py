"""The `omni` command: finds subcommands by name, turns errors into exit codes.

Subcommands are imported when they run, so that `omni --help` stays quick. Our own are in the table
below; other packages add theirs through the entry point group `omni.commands`. Errors are caught
here once: an `OmniError` is a diagnosis, anything else a bug.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import io
import itertools
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import click

from omnistore import errors
from omnistore.cli.logs import complain
from omnistore.cli.output import tell
from omnistore.errors import OmniError

_OWN: Final = MappingProxyType(
    {
        "add": "Publish a GGUF file: cut it, sign its manifest, print its CID.",
        "pin": "Fetch a model, or some of its layers, by CID from peers.",
        "seed": "Run a node that serves what this home holds.",
        "status": "Show what the seed of this home is doing.",
        "peers": "Show whom the seed of this home is connected to.",
        "ls": "List the models held here.",
        "show": "Describe a model: parts, sizes, files, publisher.",
        "verify": "Read everything again and check it against its CIDs.",
        "export": "Write a model's GGUF files somewhere else.",
        "unpin": "Stop keeping a model, or some of its layers.",
        "gc": "Free what no pin keeps.",
        "du": "Show where the bytes are.",
        "id": "Show this node's peer ID.",
        "doctor": "Check home, disk, port, engines and network, and say what to do.",
        "providers": "List who claims to hold a model, and what they really hold.",
        "publish": "Publish a name of your own for a model.",
        "trust": "Know publishers by name: add, ls, rm.",
        "invite": "Print a token that lets a home into your private swarm.",
        "join": "Enter the private swarm that a token invites to.",
        "leave": "Go back from a private swarm to the public network.",
        "config": "Show every setting, its value and what it may be.",
    }
)
"""Subcommand to its line in `omni --help`; each lives in `omnistore.cli.<name>` under its own name."""

_COMPLETION: Final = "_OMNI_COMPLETE"
"""Set by the shell when it asks for completions."""
_ENTRY_POINTS: Final = "omni.commands"
_BUG: Final = 1
_INTERRUPTED: Final = 130
"""128 + SIGINT, as a shell reports it."""
_BROKEN_PIPE: Final = 141
"""128 + SIGPIPE: the reader of our output went away."""
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""What a write answers where stdout is a file on a full disk."""

_log = logging.getLogger(__name__)


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_OWN, *(name for name in _entry_points() if name not in _OWN)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        with _uncollected():
            if cmd_name in _OWN:
                target: Any = getattr(importlib.import_module(f"omnistore.cli.{cmd_name}"), cmd_name)
            elif (entry := _entry_points().get(cmd_name)) is not None:
                target = entry.load()
            else:
                return None
        assert isinstance(target, click.Command)
        return target

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            known = ", ".join(self.list_commands(ctx))
            raise click.UsageError(f"no command {args[0]!r}; there are: {known}", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = list(_OWN.items())
        for name in self.list_commands(ctx)[len(_OWN) :]:
            try:
                command = self.get_command(ctx, name)
            except ImportError as error:
                rows.append((name, f"(not available: {error})"))
            else:
                rows.append((name, command.get_short_help_str(limit=80) if command else ""))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in exit_codes()])


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Import without looking for garbage, and never look for any in what was imported.

    It is there until the process ends, which then takes 2 ms and not 14.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _entry_points() -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=_ENTRY_POINTS)}


def exit_codes() -> list[tuple[int, str]]:
    """Every exit code and what it means, by number; from the tree in `omnistore.errors`."""
    meanings: dict[int, list[str]] = {}
    for kind in (*_classes(OmniError),):
        meanings.setdefault(kind.exit_code, []).append(kind.__name__)
    table = {code: ", ".join(names) for code, names in meanings.items()}
    table |= {0: "success", _BUG: "a bug in omni", _INTERRUPTED: "interrupted"}
    table |= {_BROKEN_PIPE: "the reader of the output went away"}
    return sorted(table.items())


def _classes(kind: type[OmniError]) -> Iterator[type[OmniError]]:
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from _classes(child)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="omni", prog_name="omni")
def omni() -> None:
    """Share model weights by content: cut, sign, seed, pin, run.

    Everything lives under $OMNI_HOME (default ~/.omni). Every command takes --json and --quiet.
    """


@dataclass(frozen=True, slots=True)
class _Asked:
    """How a command line wants to be told of errors.

    Read from its words, not from click: one that click refuses has no parsed options.
    """

    json: bool
    """A document on stdout."""
    log_json: bool
    """Lines of JSON on stderr."""

    @classmethod
    def of(cls, words: Sequence[str]) -> _Asked:
        pairs = itertools.pairwise(words)
        return cls("--json" in words, "--log-format=json" in words or ("--log-format", "json") in pairs)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line; its exit code."""
    _mend_streams()
    argv = list(sys.argv[1:] if args is None else args)
    asked = _Asked.of(argv[: argv.index("--")] if "--" in argv else argv)
    try:
        if _COMPLETION in os.environ:
            omni.main(argv, prog_name="omni", complete_var=_COMPLETION)
        # Not click's own `main`: that swallows interrupts and broken pipes in ways of its own.
        with omni.make_context("omni", argv) as context:
            omni.invoke(context)
        # A pipe that broke shows itself only when the last bytes leave.
        sys.stdout.flush()
        return 0
    except BaseException as error:  # noqa: BLE001  the one place where every error becomes an exit code
        return _report(error, asked)


def _mend_streams() -> None:
    """Make the standard streams safe to use.

    Python has None for a stream that its parent closed. A name that the encoding of stdout lacks, or that
    is in no encoding at all, must not end a command.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest free number is the closed stream's own, so nothing else can come to lie there.
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  open to the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def _report(error: BaseException, asked: _Asked) -> int:
    """Say what went wrong, and the exit code that says it to programs."""
    leaves = list(_leaves(error))
    if any(isinstance(leaf, KeyboardInterrupt | click.Abort) for leaf in leaves):
        return _INTERRUPTED
    if any(isinstance(leaf, BrokenPipeError) for leaf in leaves):
        _silence_stdout()
        return _BROKEN_PIPE
    for leaf in leaves:
        if isinstance(leaf, OSError) and leaf.errno in _NO_ROOM and leaf.filename is None:
            _silence_stdout()
            remedy = "Free some space, or send the output elsewhere."
            _say(type(leaf).__name__, f"the output can not be written: {leaf.strerror}", remedy, asked)
            return errors.StoreFull.exit_code
    for leaf in leaves:
        if isinstance(leaf, SystemExit):
            return leaf.code if isinstance(leaf.code, int) else _BUG
        if isinstance(leaf, click.exceptions.Exit):
            return leaf.exit_code
        if isinstance(leaf, click.exceptions.NoArgsIsHelpError):
            tell(leaf.format_message())
            return errors.InputError.exit_code
        if isinstance(leaf, click.ClickException):
            _say(type(leaf).__name__, leaf.format_message(), _usage(leaf), asked)
            return errors.InputError.exit_code
    known = [leaf for leaf in leaves if isinstance(leaf, OmniError)]
    if len(known) < len(leaves):
        return _report_bug(error, asked)
    for leaf in known:
        _say(type(leaf).__name__, leaf.message, leaf.remedy, asked)
    if os.environ.get("OMNI_DEBUG") == "1":
        traceback.print_exception(error)
    return known[0].exit_code


def _silence_stdout() -> None:
    """Python flushes stdout at exit and would complain about the same fault again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_bug(error: BaseException, asked: _Asked) -> int:
    leaf = next(leaf for leaf in _leaves(error) if not isinstance(leaf, OmniError))
    remedy = "This is a bug in omni. Set OMNI_DEBUG=1 to see where, and report it."
    _say(type(leaf).__name__, f"{type(leaf).__name__}: {leaf}", remedy, asked)
    if os.environ.get("OMNI_DEBUG") == "1":
        traceback.print_exception(error)
    return _BUG


def _usage(error: click.ClickException) -> str | None:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"See `{context.command_path} --help`." if context else None


def _say(kind: str, message: str, remedy: str | None, asked: _Asked) -> None:
    diagnosis = OmniError(message, remedy=remedy).diagnosis()
    if asked.log_json:
        complain(diagnosis)
    else:
        tell(f"omni: {diagnosis}")
    if asked.json:
        # The exit code says it as well, should stdout be what failed.
        with contextlib.suppress(OSError):
            click.echo(json.dumps({"event": "error", "error": kind, "message": message, "remedy": remedy}))


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors inside groups, which trio's nurseries wrap around whatever a task raised."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


if __name__ == "__main__":
    sys.exit(main())

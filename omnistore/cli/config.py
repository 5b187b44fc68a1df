"""`omni config`: every setting, its value, where that came from, and what it may be."""

from __future__ import annotations

import os
import textwrap

import click

from omnistore.cli.output import Output, with_output
from omnistore.config import FILE_NAME, Config, read_config, settings
from omnistore.settings import Setting, Value, allowed_range, written


@click.command()
@with_output
def config(output: Output) -> None:
    """Show every setting, as a configuration file that says the same.

    Settings are changed in config.toml in the home; an option on the command line goes before it.
    """
    read = read_config(os.environ)
    path = read.config.home / FILE_NAME
    defaults = Config(read.config.home)
    output.line(f"# {path}{'' if path.exists() else ' (not there: these are the defaults)'}")
    rows = []
    for name, described in settings().items():
        value, default = getattr(read.config, name), getattr(defaults, name)
        source = read.sources.get(name, "default")
        rows.append(
            {
                "name": name, "value": value, "default": default, "source": source, "unit": described.unit,
                "low": described.low, "high": described.high, "reason": described.reason,
            }
        )  # fmt: skip
        output.line(_told(name, described, value, default, source))
    output.result({"file": path, "home": read.config.home, "settings": rows})


def _told(name: str, described: Setting, value: Value, default: Value, source: str) -> str:
    """A setting for people, and for a configuration file: what has its default is a comment."""
    reason = textwrap.fill(described.reason, 100, initial_indent="# ", subsequent_indent="# ")
    assigned = f"{name} = {written(described, value)}"
    beside = allowed_range(described)
    if beside != described.unit:
        beside = f"{described.unit}, {beside}"
    if source == "default":
        return f"\n{reason}\n# {assigned}  # default; {beside}"
    line = source.rpartition(os.sep)[2]
    return f"\n{reason}\n{assigned}  # {line}; default: {written(described, default)}; {beside}"

"""Options that are settings of the configuration too, and that several commands have.

Imports nothing but click: `omni --help` reads this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import click


def with_caps(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--up-limit` and `--down-limit`, and pass what was given as `caps`, for `home.config`."""

    @click.option("--up-limit", metavar="RATE", help="Most to send, over all peers, such as 10MB/s.")
    @click.option("--down-limit", metavar="RATE", help="Most to fetch, over all peers, such as 10MB/s.")
    @functools.wraps(command)
    def capped(*args: Any, up_limit: str | None, down_limit: str | None, **kwargs: Any) -> None:
        command(*args, caps={"up_limit": up_limit, "down_limit": down_limit}, **kwargs)

    return capped


def with_mdns(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--no-mdns` to the settings that `with_caps` passes as `caps`."""

    @click.option("--no-mdns", is_flag=True, help="Look for nobody on the local network, nor be found there.")
    @functools.wraps(command)
    def found(*args: Any, no_mdns: bool, caps: Mapping[str, Any], **kwargs: Any) -> None:
        command(*args, caps={**caps, "mdns": False if no_mdns else None}, **kwargs)

    return found


def with_hints(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--mirrors` to the settings that `with_caps` passes as `caps`."""

    @click.option("--mirrors", "hints", is_flag=True, help="Also fetch from web servers that peers name.")
    @functools.wraps(command)
    def hinted(*args: Any, hints: bool, caps: Mapping[str, Any], **kwargs: Any) -> None:
        command(*args, caps={**caps, "mirrors": hints or None}, **kwargs)

    return hinted


def with_http(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--http` to the settings that `with_caps` passes as `caps`."""

    @click.option(
        "--http", metavar="[HOST:]PORT",
        help="Answer IPFS programs over HTTP too; on this machine only, unless HOST says otherwise.",
    )  # fmt: skip
    @functools.wraps(command)
    def served(*args: Any, http: str | None, caps: Mapping[str, str | None], **kwargs: Any) -> None:
        command(*args, caps={**caps, "http": http}, **kwargs)

    return served

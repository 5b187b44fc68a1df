"""What commands take of HTTP: the sources of a pin beside peers, and the port of a seed's gateway."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from omnistore.net.addresses import parse_dialable_untrusted
from omnistore.transfer.ranges import check_url


@dataclass(frozen=True, slots=True)
class Sources:
    """Whom to ask, as named on a command line; all checked."""

    peers: tuple[str, ...]
    mirrors: tuple[str, ...]
    gateways: tuple[str, ...]


def with_sources(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--peer`, `--from` and `--gateway`, and pass what was given as `sources`."""

    @click.option("--peer", "peers", multiple=True, metavar="MADDR", help="Ask this peer; can be repeated.")
    @click.option(
        "--from", "mirrors", multiple=True, metavar="URL",
        help="Also fetch from a web server that has the file; can be repeated.",
    )  # fmt: skip
    @click.option(
        "--gateway", "gateways", multiple=True, metavar="URL",
        help="Also fetch from an IPFS trustless gateway; can be repeated.",
    )  # fmt: skip
    @functools.wraps(command)
    def sourced(
        *args: Any, peers: tuple[str, ...], mirrors: tuple[str, ...], gateways: tuple[str, ...], **kwargs: Any
    ) -> None:
        for addr in peers:
            parse_dialable_untrusted(addr)
        for url in (*mirrors, *gateways):
            check_url(url)
        command(*args, sources=Sources(peers, mirrors, gateways), **kwargs)

    return sourced


def with_hints(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--mirrors` to the settings that `home.with_caps` passes as `caps`."""

    @click.option("--mirrors", "hints", is_flag=True, help="Also fetch from web servers that peers name.")
    @functools.wraps(command)
    def hinted(*args: Any, hints: bool, caps: Mapping[str, Any], **kwargs: Any) -> None:
        command(*args, caps={**caps, "mirrors": hints or None}, **kwargs)

    return hinted


def with_http(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--http` to the settings that `home.with_caps` passes as `caps`."""

    @click.option(
        "--http", metavar="[HOST:]PORT",
        help="Answer IPFS programs over HTTP too; on this machine only, unless HOST says otherwise.",
    )  # fmt: skip
    @functools.wraps(command)
    def served(*args: Any, http: str | None, caps: Mapping[str, str | None], **kwargs: Any) -> None:
        command(*args, caps={**caps, "http": http}, **kwargs)

    return served

"""Whom a command is to fetch from, as it was named: peers, and web servers beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable
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

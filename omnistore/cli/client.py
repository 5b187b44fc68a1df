"""The node of a command that asks and leaves: whom it joins the network through."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from omnistore.config import Config
from omnistore.errors import InputError
from omnistore.net.acquaintances import recall

if TYPE_CHECKING:
    from omnistore.net.interface import ContentRouting
    from omnistore.node import Node


@asynccontextmanager
async def open_client(
    settings: Config, *, named: bool = False, alone_ok: bool = False
) -> AsyncIterator[Node]:
    """A node that joins through the bootstrap nodes, or whoever is near or was met before.

    `named`: a peer or server to ask was named, so that nobody is looked for but through bootstrap nodes.
    Unless somebody was named or `alone_ok`, raises `PeerUnreachable` when nobody answers and `InputError`
    when there is nobody to ask.
    """
    from omnistore.node import NodeOptions, open_node

    if not alone_ok:
        check_reachable(settings, named=named)
    untold = not (named or settings.bootstrap)
    options = NodeOptions(
        bootstrap=settings.bootstrap,
        lan=untold and settings.mdns,
        recall=untold,
        alone_ok=named or alone_ok,
    )
    async with open_node(settings, options) as node:
        yield node


def routing_of(node: Node, *, named: bool) -> ContentRouting | None:
    """Where to look for providers; nowhere for a node that joined nobody because somebody was `named`."""
    return node.routing if node.options.bootstrap or not named else None


def check_reachable(settings: Config, missing: str = "", *, named: bool, remedy: str = "") -> None:
    """Raise `InputError` when there is nobody at all to ask for what is `missing`.

    `remedy`: what else a person can do.
    """
    if named or settings.bootstrap or settings.mdns or recall(settings.home, time.time()):
        return
    raise InputError(
        f"{missing}, and there is nobody to ask for it" if missing else "there is nobody to ask",
        remedy=f"Give a seed's address with --peer, or any node's with --bootstrap.{remedy}",
    )

"""What commands about names share: a node for looking things up, and from `PUBLISHER/NAME` to a CID."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from omnistore.cid import CID
from omnistore.cli.output import Output
from omnistore.config import Config
from omnistore.dht.names import check_name
from omnistore.naming import NameBook, resolve
from omnistore.trust import TrustStore, is_publisher_name

if TYPE_CHECKING:
    from omnistore.node import Node


@asynccontextmanager
async def open_client(settings: Config, *, alone_ok: bool = False) -> AsyncIterator[Node]:
    """A node that asks and leaves: through the bootstrap nodes, or whoever is near or was met before."""
    from omnistore.node import NodeOptions, open_node

    untold = not settings.bootstrap
    options = NodeOptions(
        bootstrap=settings.bootstrap, lan=untold and settings.mdns, recall=untold, alone_ok=alone_ok
    )
    async with open_node(settings, options) as node:
        yield node


def is_published_name(text: str) -> bool:
    """Whether a text is meant as `PUBLISHER/NAME`, and not as a CID or a path of IPFS."""
    who, _, name = text.partition("/")
    return bool(name) and "/" not in name and is_publisher_name(who)


async def find_named(output: Output, settings: Config, text: str, peers: tuple[str, ...] = ()) -> CID:
    """The CID that `PUBLISHER/NAME` stands for now; `peers` are asked too. Says whose word that is.

    Raises `UnknownSigner`, `NoProviders`, `BadNameRecord`.
    """
    who, _, name = text.partition("/")
    trust = TrustStore(settings.home)
    publisher = trust.resolve(who)
    check_name(name)
    asked = replace(settings, bootstrap=tuple(dict.fromkeys([*settings.bootstrap, *peers])))
    async with open_client(asked) as node:
        choice = await resolve(node.routing, NameBook(settings.home), publisher, name, now=time.time())
    record = choice.record
    if choice.forked:
        output.note(
            f"warning: {who} signed two different values of {name} under number {record.sequence};"
            " its key may be in two places"
        )
    output.note(f"{name} of {trust.describe(publisher)} is {record.value} (number {record.sequence})")
    output.event(
        "resolved",
        reference=text,
        publisher=publisher.peer_id,
        cid=record.value,
        sequence=record.sequence,
        forked=choice.forked,
    )
    return record.value

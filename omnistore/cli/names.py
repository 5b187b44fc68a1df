"""From `PUBLISHER/NAME` to a CID, as every command that takes one needs it."""

from __future__ import annotations

import time
from dataclasses import replace

from omnistore.cid import CID
from omnistore.cli.client import open_client
from omnistore.cli.output import Output
from omnistore.config import Config
from omnistore.dht.names import check_name
from omnistore.naming import NameBook, resolve
from omnistore.trust import TrustStore, is_publisher_name


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

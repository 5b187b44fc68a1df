"""`omni publish`: say under one's own key which model a name stands for."""

from __future__ import annotations

import time

import click

from omnistore.cid import CID
from omnistore.cli.client import open_client
from omnistore.cli.home import config, home_store
from omnistore.cli.output import Output, with_output
from omnistore.config import Config, load_key
from omnistore.dht.names import NameRecord, check_name
from omnistore.errors import InputError
from omnistore.naming import NameBook
from omnistore.naming import publish as put


@click.command()
@click.argument("name", required=False)
@click.argument("model", required=False)
@click.option("--withdraw", is_flag=True, help="Publish NAME no more; what others keep of it expires.")
@click.option("--bootstrap", multiple=True, metavar="MADDR", help="Reach the network through this node.")
@with_output
def publish(
    output: Output, name: str | None, model: str | None, withdraw: bool, bootstrap: tuple[str, ...]
) -> None:
    """Publish NAME for MODEL (a CID, its beginning, or its name here); without them, list what is published.

    Others fetch it with `omni pin PEERID/NAME`, whatever it stands for by then. The record is good for 30
    days; a running `omni seed` of this home keeps it in the network and signs a new one in time.
    """
    settings = config(bootstrap=bootstrap)
    book = NameBook(settings.home)
    if name is None:
        _list(output, book.own(load_key(settings.home).public))
    elif withdraw:
        if model is not None:
            raise InputError("--withdraw takes a name and no model")
        if not book.withdraw(name):
            raise InputError(f"{name!r} was not published from here", remedy="`omni publish` lists what was.")
        output.result({"name": name, "withdrawn": True}, f"{name} is published no more")
    elif model is None:
        raise InputError(f"no model was given for {name!r}", remedy="Give a CID; `omni ls` lists them.")
    else:
        _publish(output, settings, check_name(name), _signed_manifest(model))


def _signed_manifest(model: str) -> CID:
    with home_store() as store:
        found = store.find(model)
    if found.publisher is None:
        raise InputError(
            f"{found.cid} is a manifest without a signature",
            remedy="Publish the CID that `omni add` printed for it.",
        )
    return found.cid


def _publish(output: Output, settings: Config, name: str, value: CID) -> None:
    import trio

    key = load_key(settings.home)

    async def run() -> tuple[NameRecord, int]:
        async with open_client(settings, alone_ok=True) as node:
            return await put(node.routing, NameBook(settings.home), key, name, value, now=time.time())

    record, copies = trio.run(run)
    if not copies:
        output.note("nobody was reached who keeps it: a running `omni seed` of this home publishes it")
    output.result(
        {**_document(record), "copies": copies}, f"{key.public.peer_id}/{name}  (number {record.sequence})"
    )


def _list(output: Output, records: list[NameRecord]) -> None:
    output.result([_document(record) for record in records])
    for record in records:
        until = time.strftime("%Y-%m-%d", time.gmtime(record.not_after))
        output.line(f"{record.name:<32} {record.value}  number {record.sequence}, until {until}")


def _document(record: NameRecord) -> dict[str, object]:
    return {
        "name": record.name,
        "publisher": record.publisher.peer_id,
        "cid": record.value,
        "sequence": record.sequence,
        "not_after": record.not_after,
    }

"""`omni du`: where the bytes are."""

from __future__ import annotations

import time

import click

from omnistore.cli.home import home_store
from omnistore.cli.output import Output, size, with_output
from omnistore.store.disk import allocated
from omnistore.store.packed import packed_bytes
from omnistore.store.sweep import sweep


@click.command()
@with_output
def du(output: Output) -> None:
    """Show the disk space of files held and referenced, of the index and of what engines packed, and what
    `omni gc` would free."""
    with home_store() as store:
        files = [file for _, file in store.index.files() if not file.lost]
        blocks, nodes = store.index.totals()
        document = {
            "home": store.config.home,
            "held": sum(allocated(file.where) for file in files if file.owned),
            "referenced": sum(file.size for file in files if not file.owned),
            "index": sum(allocated(path) for path in store.config.home.glob("index.sqlite*")),
            "packed": packed_bytes(store.config.home),
            "freeable": sweep(store, now=time.time(), dry_run=True).bytes,
            "blocks": blocks,
            "nodes": nodes,
        }
    output.result(document)
    output.line(f"{document['home']}")
    for label in ("held", "referenced", "index", "packed", "freeable"):
        output.line(f"{label:<11} {size(int(str(document[label]))):>10}")
    output.line(f"{'blocks':<11} {blocks:>10}")

"""`omni unpin`: stop keeping."""

from __future__ import annotations

import click

from omnistore.cli.home import home_store
from omnistore.cli.output import Output, with_output
from omnistore.manifest import PartKey
from omnistore.selection import describe_parts, parse_parts


@click.command()
@click.argument("model")
@click.option("--layers", help="Only these: layer numbers and ranges, embed, head (default: everything).")
@with_output
def unpin(output: Output, model: str, layers: str | None) -> None:
    """Let `omni gc` have MODEL, or some of its layers. Nothing is deleted yet."""
    with home_store() as store:
        found = store.find(model)
        pinned = store.status(found.cid).pinned
        gone = pinned if layers is None else pinned & _own(parse_parts(layers, found.manifest))
        store.unpin(found.cid, gone)
        left = store.status(found.cid).pinned
    document = {"cid": found.cid, "unpinned": sorted(map(str, gone)), "pinned": sorted(map(str, left))}
    output.result(document, f"{found.manifest.name}: {describe_parts(left) or 'nothing'} stays pinned")
    output.note("`omni gc` frees what no pin keeps.")


def _own(parts: frozenset[PartKey]) -> frozenset[PartKey]:
    """Without what every other layer still needs."""
    return frozenset(key for key in parts if key.kind not in ("header", "shared"))

"""`omni ls`: what is here."""

from __future__ import annotations

import click

from omnistore.cli.home import home_store
from omnistore.cli.output import Output, size, with_output
from omnistore.selection import describe_parts
from omnistore.store.interface import ModelStatus


@click.command()
@with_output
def ls(output: Output) -> None:
    """List the models held here: CID, size, how much of it is here, name."""
    with home_store() as store:
        models = store.models()
        output.result([_document(status) for status in models])
        for status in models:
            cid = str(status.model.cid)
            output.line(cid if output.quiet else f"{cid}  {_state(status):>24}  {status.model.manifest.name}")
        if not models:
            output.note("No models yet. `omni add FILE.gguf` publishes one, `omni pin CID` fetches one.")


def _state(status: ModelStatus) -> str:
    total = size(status.model.manifest.size)
    if status.whole:
        return f"{total} {'in place' if status.referenced else 'held'}"
    layers = describe_parts(status.complete) or "nothing whole"
    return f"{size(status.bytes_held)} of {total} ({layers})"


def _document(status: ModelStatus) -> dict[str, object]:
    return {
        "cid": status.model.cid,
        "manifest": status.model.manifest_cid,
        "name": status.model.manifest.name,
        "size": status.model.manifest.size,
        "bytes_held": status.bytes_held,
        "whole": status.whole,
        "pinned": bool(status.pinned),
        "layers": describe_parts(status.complete),
        "referenced": status.referenced,
        "files": list(status.files),
        "mirrors": list(status.mirrors),
    }

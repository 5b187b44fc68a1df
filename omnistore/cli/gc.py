"""`omni gc`: free what no pin keeps."""

from __future__ import annotations

import time

import click

from omnistore.cli.home import home_store
from omnistore.cli.output import Output, size, with_output
from omnistore.store.sweep import sweep


@click.command()
@click.option("--dry-run", is_flag=True, help="Only show what would be freed.")
@with_output
def gc(output: Output, dry_run: bool) -> None:
    """Free what no pin keeps. A file of yours that is referenced in place is never touched."""
    with home_store() as store:
        swept = sweep(store, now=time.time(), dry_run=dry_run)
    for path in swept.files:
        output.note(f"{'would delete' if dry_run else 'deleted'} {path}")
    for path in swept.released:
        output.note(f"{path} is yours and stays; it is no longer referenced")
    output.result(
        {
            "dry_run": dry_run,
            "bytes": swept.bytes,
            "files": list(swept.files),
            "models": list(swept.models),
            "nodes": swept.nodes,
            "released": list(swept.released),
        },
        f"{'would free' if dry_run else 'freed'} {size(swept.bytes)}: {len(swept.files)} files,"
        f" {len(swept.models)} models",
    )

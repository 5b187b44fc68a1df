"""`omni export`: the files, somewhere else."""

from __future__ import annotations

from pathlib import Path

import click

from omnistore.cli.home import home_store
from omnistore.cli.output import Output, with_output
from omnistore.store.export import export as export_model


@click.command()
@click.argument("model")
@click.option(
    "--output", "to", required=True, type=click.Path(path_type=Path), help="File or directory to write."
)
@with_output
def export(output: Output, model: str, to: Path) -> None:
    """Write MODEL's GGUF files to a path of yours, byte for byte, checked on the way."""
    with home_store() as store:
        found = store.find(model)
        with output.progress(f"exporting {found.manifest.name}", found.manifest.size) as bar:
            paths = export_model(store, found, to.absolute(), progress=bar.advance)
    output.result({"cid": found.cid, "files": paths}, "\n".join(map(str, paths)))

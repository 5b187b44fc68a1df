"""`omni add`: publish GGUF files."""

from __future__ import annotations

from pathlib import Path

import click

from omnistore.chunker.cut import model_files
from omnistore.cli.home import home_store
from omnistore.cli.output import Output, size, with_output
from omnistore.config import load_key
from omnistore.errors import InputError
from omnistore.store.publish import Published, publish, total_size


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--copy", is_flag=True, help="Take a copy in; by default the file is referenced where it lies.")
@click.option("--name", help="The model's name (default: the file's name).")
@click.option("--sha256", is_flag=True, help="Also record each file's SHA-256, to match model hubs.")
@with_output
def add(output: Output, files: tuple[Path, ...], copy: bool, name: str | None, sha256: bool) -> None:
    """Publish each FILE: cut it into blocks, sign its manifest, print the CID.

    Any member of a split set (NAME-00001-of-0000N.gguf) stands for the whole set.
    """
    # Members of one set, or one file named twice, are one model.
    models = {tuple(model_files(path)): path for path in files}
    if name is not None and len(models) > 1:
        raise InputError(f"--name {name!r} was given for {len(models)} models", remedy="Add them one by one.")
    with home_store() as store:
        key = load_key(store.config.home)
        for path in models.values():
            with output.progress(f"adding {path.name}", total_size(path)) as bar:
                found = publish(store, path, key, name=name, sha256=sha256, copy=copy, progress=bar.advance)
            output.note(
                f"{found.name}: {size(found.bytes)} in {found.blocks} blocks, {len(found.parts)} parts"
                f" ({'copied to' if copy else 'referenced at'} {found.files[0]})"
            )
            output.result(_document(found), str(found.cid))


def _document(found: Published) -> dict[str, object]:
    return {
        "cid": found.cid,
        "manifest": found.manifest,
        "name": found.name,
        "parts": [{"part": str(ref.key), "size": ref.size, "cid": ref.cid} for ref in found.parts],
        "bytes": found.bytes,
        "blocks": found.blocks,
        "files": list(found.files),
    }

"""`omni add`: publish GGUF files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
@click.option(
    "--url",
    "urls",
    multiple=True,
    metavar="URL",
    help="A web server that has the file too, or its directory; peers are told. Can be repeated; those given"
    " replace those recorded before, and `none` forgets them.",
)
@click.option("--no-check", is_flag=True, help="Record each --url without asking the server.")
@click.option("--sha256", is_flag=True, help="Also record each file's SHA-256, to match model hubs.")
@with_output
def add(
    output: Output,
    files: tuple[Path, ...],
    urls: tuple[str, ...],
    no_check: bool,
    **options: Any,
) -> None:
    """Publish each FILE: cut it into blocks, sign its manifest, print the CID.

    Any member of a split set (NAME-00001-of-0000N.gguf) stands for the whole set.
    """
    # Members of one set, or one file named twice, are one model.
    models = {tuple(model_files(path)): path for path in files}
    for option, given in (("--name", options["name"]), ("--url", urls)):
        if given and len(models) > 1:
            raise InputError(f"{option} was given for {len(models)} models", remedy="Add them one by one.")
    mirrors: Sequence[str] = () if urls == ("none",) else urls
    for paths in models if mirrors else ():
        mirrors = _checked(output, mirrors, paths, asks=not no_check)
    with home_store() as store:
        key = load_key(store.config.home)
        for path in models.values():
            with output.progress(f"adding {path.name}", total_size(path)) as bar:
                found = publish(store, path, key, **options, progress=bar.advance)
            if urls:
                store.set_mirrors(found.cid, mirrors)
            output.note(
                f"{found.name}: {size(found.bytes)} in {found.blocks} blocks, {len(found.parts)} parts"
                f" ({'copied to' if options['copy'] else 'referenced at'} {found.files[0]})"
            )
            output.result(_document(found, store.mirrors(found.cid)), str(found.cid))


def _checked(output: Output, given: Sequence[str], paths: Sequence[Path], *, asks: bool) -> Sequence[str]:
    """Refuse what is no mirror of these files; say what others will not follow. Raises as `check_mirrors`."""
    # 10 ms to import, and few name mirrors.
    from omnistore.transfer.hints import check_hints, is_public

    urls = check_hints(given, [path.name for path in paths])
    if asks:
        import trio

        # An HTTP client takes a tenth of a second to import.
        from omnistore.transfer.compare import check_mirrors

        trio.run(check_mirrors, urls, paths)
    for url in urls:
        if not is_public(url):
            output.note(f"{url} is not on the public network: peers are told, but none goes there by itself")
    return urls


def _document(found: Published, mirrors: Sequence[str]) -> dict[str, object]:
    return {
        "cid": found.cid,
        "manifest": found.manifest,
        "name": found.name,
        "parts": [{"part": str(ref.key), "size": ref.size, "cid": ref.cid} for ref in found.parts],
        "bytes": found.bytes,
        "blocks": found.blocks,
        "files": list(found.files),
        "mirrors": list(mirrors),
    }

"""`omni show`: everything known of one model."""

from __future__ import annotations

import click

from omnistore.cli.home import config, home_store
from omnistore.cli.output import Output, size, with_output
from omnistore.store.interface import ModelStatus
from omnistore.trust import TrustStore


@click.command()
@click.argument("model")
@with_output
def show(output: Output, model: str) -> None:
    """Describe MODEL (a CID, its beginning, or a name): parts, sizes, files, publisher."""
    with home_store() as store:
        status = store.status(store.find(model).cid)
    output.result(_document(status))
    manifest = status.model.manifest
    publisher = status.model.publisher
    for label, value in (
        ("name", manifest.name),
        ("cid", status.model.cid),
        ("manifest", status.model.manifest_cid),
        ("publisher", TrustStore(config().home).describe(publisher)),
        ("model", f"{manifest.architecture}, {manifest.quantisation}, {manifest.layers} layers"),
        *manifest.facts.items(),
        ("held", f"{size(status.bytes_held)} of {size(manifest.size)}"),
    ):
        output.line(f"{label:<15} {value}")
    for number, entry in enumerate(manifest.files):
        where = f"  {status.files[number]}" if status.files else ""
        output.line(f"{'file':<15} {entry.name} ({size(entry.size)}){where}")
    for url in status.mirrors:
        output.line(f"{'mirror':<15} {url}")
    for ref in manifest.parts:
        marks = ("held" if ref.key in status.complete else "-") + (
            ", pinned" if ref.key in status.pinned else ""
        )
        output.line(f"{'part':<15} {ref.key!s:<12} {size(ref.size):>10}  {ref.cid}  {marks}")


def _document(status: ModelStatus) -> dict[str, object]:
    manifest = status.model.manifest
    publisher = status.model.publisher
    return {
        "cid": status.model.cid,
        "manifest": status.model.manifest_cid,
        "name": manifest.name,
        "publisher": publisher.peer_id if publisher else None,
        "architecture": manifest.architecture,
        "quantisation": manifest.quantisation,
        "layers": manifest.layers,
        "facts": dict(manifest.facts),
        "base": manifest.base,
        "size": manifest.size,
        "bytes_held": status.bytes_held,
        "whole": status.whole,
        "files": [
            {"name": entry.name, "size": entry.size, "sha256": entry.sha256}
            | ({"path": status.files[number]} if status.files else {})
            for number, entry in enumerate(manifest.files)
        ],
        "mirrors": list(status.mirrors),
        "parts": [
            {
                "part": str(ref.key),
                "size": ref.size,
                "cid": ref.cid,
                "held": ref.key in status.complete,
                "pinned": ref.key in status.pinned,
            }
            for ref in manifest.parts
        ],
    }

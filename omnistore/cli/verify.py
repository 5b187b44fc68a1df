"""`omni verify`: read everything again."""

from __future__ import annotations

import sys
from collections import Counter

import click

from omnistore.cli.home import home_store
from omnistore.cli.output import Output, size, with_output
from omnistore.errors import IntegrityError
from omnistore.store.verify import Verdict, paths_of, size_to_verify
from omnistore.store.verify import verify as verify_model


@click.command()
@click.argument("model", required=False)
@click.option(
    "--repair", is_flag=True, help="Forget bad bytes, and copy good ones from elsewhere on this machine."
)
@with_output
def verify(output: Output, model: str | None, repair: bool) -> None:
    """Check every byte of MODEL (default: of all models) against its CIDs. Exits with 4 if any is bad."""
    with home_store() as store:
        cids = [store.find(model).cid] if model else [status.model.cid for status in store.models()]
        bad = False
        for cid in cids:
            with output.progress("verifying", size_to_verify(store, cid)) as bar:
                verdict = verify_model(store, cid, repair=repair, progress=bar.advance)
            output.result(_document(verdict))
            _tell(output, verdict)
            bad = bad or any(not fault.repaired for fault in verdict.faults)
    if bad:
        sys.exit(IntegrityError.exit_code)


def _tell(output: Output, verdict: Verdict) -> None:
    model, status = verdict.status.model, verdict.status
    # A file that is gone is one fault to a person, however many blocks were in it.
    said = Counter(f"{fault.message}{' (repaired)' if fault.repaired else ''}" for fault in verdict.faults)
    for message, blocks in said.items():
        output.note(message if blocks == 1 else f"{message} ({blocks} blocks)")
    left = [fault for fault in verdict.faults if not fault.repaired]
    found = f"{len(left)} of {verdict.blocks} blocks are bad" if left else f"{verdict.blocks} blocks are good"
    output.line(f"{model.manifest.name}: {found} ({size(verdict.bytes)} read)")
    if not status.whole and not left:
        output.note(f"  It is not whole: {size(status.bytes_held)} of {size(model.manifest.size)} is here.")
    gone = [path for path in paths_of(left) if not path.exists()]
    if gone:
        where = ", ".join(map(str, gone))
        output.note(f"  Put {where} back, run `omni add` where it is now, or `omni pin {model.cid}`.")
    elif left:
        again = f"`omni add {left[0].path}`" if status.referenced else f"`omni pin {model.cid}`"
        output.note(f"  To mend it, run `omni verify --repair`, then {again}.")


def _document(verdict: Verdict) -> dict[str, object]:
    return {
        "cid": verdict.status.model.cid,
        "name": verdict.status.model.manifest.name,
        "blocks": verdict.blocks,
        "bytes": verdict.bytes,
        "whole": verdict.status.whole,
        "faults": [
            {
                "path": fault.path,
                "offset": fault.offset,
                "length": fault.length,
                "cid": fault.cid,
                "message": fault.message,
                "repaired": fault.repaired,
            }
            for fault in verdict.faults
        ],
    }

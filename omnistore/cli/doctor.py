"""`omni doctor`: what is wrong here, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from omnistore.cli.home import config
from omnistore.cli.output import Output, with_output

if TYPE_CHECKING:
    from omnistore.doctor import Finding


@click.command()
@click.option("--bootstrap", multiple=True, metavar="MADDR", help="A node to join the network through.")
@click.option("--no-mdns", is_flag=True, help="Look for nobody on the local network.")
@with_output
def doctor(output: Output, bootstrap: tuple[str, ...], no_mdns: bool) -> None:
    """Check home, disk, clock, port, engines and network, and say what to do about what is wrong.

    Exits with 0 unless there is a problem. A warning may be none to you; unknown is what can not be told.
    """
    settings = config(bootstrap=bootstrap, mdns=False if no_mdns else None)
    # The network takes half a second to import: not for `omni doctor --help`.
    import trio

    from omnistore.doctor import diagnose

    findings: list[Finding] = []

    def tell(finding: Finding) -> None:
        findings.append(finding)
        output.line(f"{finding.state:<8} {finding.check:<12} {finding.text}")
        if finding.remedy is not None:
            output.line(f"{'':<22}{finding.remedy}")

    trio.run(diagnose, settings, tell)
    output.result([asdict(finding) for finding in findings])
    code = next((finding.exit_code for finding in findings if finding.state == "problem"), 0)
    click.get_current_context().exit(code)

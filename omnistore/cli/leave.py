"""`omni leave`: go back from a private swarm to the public network."""

from __future__ import annotations

import click

from omnistore.cli.home import config
from omnistore.cli.output import Output, with_output
from omnistore.membership import leave as forget


@click.command()
@with_output
def leave(output: Output) -> None:
    """Forget the private swarm of this home, its secret included; what the home holds stays.

    From then on `omni seed` serves that to everybody who asks.
    """
    was_member = forget(config().home)
    if was_member:
        output.note("A running `omni seed` of this home leaves when it is started again.")
    output.result(
        {"left": was_member},
        "left the private swarm" if was_member else "this home is in no private swarm",
    )

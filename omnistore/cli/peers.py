"""`omni peers`: whom the seed of this home is connected to."""

from __future__ import annotations

import click
import trio

from omnistore.cli.home import config
from omnistore.cli.output import Output, size, with_output
from omnistore.http.client import ask_seed


@click.command()
@with_output
def peers(output: Output) -> None:
    """Show the peers of the seed that runs on this home, and the traffic. Exit code 9 when none runs."""
    rows = trio.run(ask_seed, config().home, "/v1/peers")
    output.result(rows)
    for row in rows:
        state = "connected" if row["connected"] else "gone"
        output.line(
            f"{row['peer']}  {state:<9}  sent {size(row['bytes_sent'])},"
            f" received {size(row['bytes_received'])}, {row['streams']} transfers open"
        )
    if not rows:
        output.note("nobody is connected")

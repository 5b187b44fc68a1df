"""`omni id`: who this node is."""

from __future__ import annotations

import os

import click

from omnistore.cli.output import Output, with_output
from omnistore.config import Config, load_key


@click.command()
@with_output
def id(output: Output) -> None:
    """Show this node's peer ID; the identity is made on first use."""
    key = load_key(Config.from_environment(os.environ).home)
    output.result({"peer_id": key.public.peer_id}, key.public.peer_id)

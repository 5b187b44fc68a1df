"""`omni trust`: publishers known by name."""

from __future__ import annotations

import click

from omnistore.cli.home import config
from omnistore.cli.output import Output, with_output
from omnistore.errors import InputError
from omnistore.trust import TrustStore


@click.command()
@click.argument("action", type=click.Choice(["add", "ls", "rm"]))
@click.argument("name", required=False)
@click.argument("peer_id", metavar="[PEERID]", required=False)
@with_output
def trust(output: Output, action: str, name: str | None, peer_id: str | None) -> None:
    """Know publishers by name: `add NAME PEERID`, `ls`, `rm NAME`.

    The name is what `omni pin NAME/MODEL` and `--signer NAME` mean on this machine, and nowhere else. Ask
    the publisher for the peer ID in a way that nobody else can answer.
    """
    known = TrustStore(config().home)
    match action, name, peer_id:
        case "add", str(), str():
            known.add(name, peer_id)
            output.result({"name": name, "peer_id": peer_id}, f"{name} is {peer_id}")
        case "rm", str(), None:
            known.remove(name)
            output.result({"name": name, "removed": True}, f"{name} is forgotten")
        case "ls", None, None:
            publishers = known.publishers()
            output.result([{"name": one, "peer_id": peer} for one, peer in publishers.items()])
            for one, peer in publishers.items():
                output.line(f"{one:<24} {peer}")
        case _:
            raise InputError("it is `omni trust add NAME PEERID`, `omni trust ls` or `omni trust rm NAME`")

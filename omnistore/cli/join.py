"""`omni join`: enter a private swarm."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from omnistore.cli.home import config
from omnistore.cli.output import Output, with_output
from omnistore.errors import InputError, UnknownSigner
from omnistore.invite import MAX_TOKEN, token_untrusted
from omnistore.membership import join as enter
from omnistore.trust import TrustStore


@click.command()
@click.argument("token", required=False)
@click.option("--file", "file", type=click.Path(path_type=Path), help="Read the token from a file, or - .")
@click.option("--signer", metavar="NAME|PEERID", help="Refuse an invitation that is not from this peer.")
@with_output
def join(output: Output, token: str | None, file: Path | None, signer: str | None) -> None:
    """Enter the private swarm that TOKEN invites to: from then on this home speaks to its members only.

    What it holds stays, and is served to members. Give the token with --file where others can see the
    command lines of this machine.
    """
    home = config().home
    invitation = token_untrusted(_read(token, file), time.time())
    trust = TrustStore(home)
    if signer is not None and trust.resolve(signer) != invitation.inviter:
        raise UnknownSigner(f"the invitation is from {trust.describe(invitation.inviter)}, not from {signer}")
    member = enter(home, invitation)
    output.note(
        "A running `omni seed` of this home enters when it is started again; `omni leave` undoes this."
    )
    output.result(
        {"inviter": invitation.inviter.peer_id, "bootstrap": list(member.bootstrap)},
        f"joined the private swarm of {trust.describe(invitation.inviter)}",
    )


def _read(token: str | None, file: Path | None) -> str:
    """The token's text. Raises `InputError`."""
    if (token is None) == (file is None):
        raise InputError("give either a token or --file")
    if file is None:
        return token or ""
    try:
        if str(file) == "-":
            return sys.stdin.read(4 * MAX_TOKEN)
        with file.open(encoding="ascii", errors="replace") as opened:
            return opened.read(4 * MAX_TOKEN)
    except OSError as error:
        raise InputError(f"{file} can not be read: {error.strerror}") from None

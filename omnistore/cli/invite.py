"""`omni invite`: let somebody into this home's private swarm."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import click
import trio

from omnistore.cli.home import config
from omnistore.cli.output import Output, with_output
from omnistore.config import Config, load_key
from omnistore.documents import write_private
from omnistore.errors import InputError
from omnistore.http.client import running_seed
from omnistore.invite import MAX_ADDRESSES
from omnistore.invite import invite as make
from omnistore.membership import found, membership
from omnistore.net.addresses import (
    default_listen,
    expand,
    interface_addresses,
    parse_dialable_untrusted,
    parse_untrusted,
)
from omnistore.settings import parse_quantity_untrusted

DEFAULT_EXPIRY: Final = "7d"


@click.command()
@click.option("--expires", default=DEFAULT_EXPIRY, show_default=True, help="For how long the token is good.")
@click.option(
    "--address", "addresses", multiple=True, metavar="MADDR",
    help="Where members reach this node; default: what its running seed says, else its settings say.",
)  # fmt: skip
@click.option("--output", "to", type=click.Path(path_type=Path), help="Write it to this file, mode 0600.")
@with_output
def invite(output: Output, expires: str, addresses: tuple[str, ...], to: Path | None) -> None:
    """Print a token that lets a home into this home's private swarm; make the swarm if there is none.

    The token is a secret: whoever has it can join until it expires, and stay. Members speak to nobody else.
    """
    settings = config()
    seconds = parse_quantity_untrusted(expires, "seconds")
    if not 0 < seconds < 1e10:
        raise InputError(f"--expires {expires} is no time to be good for", remedy="For example 7d, or 12h.")
    key = load_key(settings.home)
    bootstrap = _bootstrap(settings, key.public.peer_id, addresses)
    is_new = membership(settings.home) is None
    member = found(settings.home)
    if is_new:
        output.note(
            "This home now is the first member of a private swarm: it speaks to members only, once"
            " `omni seed` is started again. `omni leave` undoes that."
        )
    output.note("The token is a secret: whoever reads it can join. Send it over a channel that you trust.")
    invitation = make(key, member.psk, bootstrap, int(time.time() + seconds))
    token = invitation.encode()
    if to is not None:
        write_private(to.absolute(), token.encode() + b"\n")
    document = {"bootstrap": list(bootstrap), "not_after": invitation.not_after, "new_swarm": is_new}
    output.result(document | ({"token": token} if to is None else {"path": to}), str(to or token))


def _bootstrap(settings: Config, peer_id: str, given: tuple[str, ...]) -> tuple[str, ...]:
    """The addresses to put into the token. Raises `InputError`."""
    for addr in given:
        if parse_dialable_untrusted(_of_peer(addr, peer_id))[0].is_wildcard:
            raise InputError(f"{addr} is no address that others can reach")
    wanted = list(given) or _of_seed(settings) or list(settings.announce)
    if not wanted:
        listening = [parse_untrusted(text) for text in settings.listen or default_listen()]
        reachable = expand(listening, interface_addresses())
        wanted = [address.transport for address in reachable if address.port and not address.is_loopback]
    if not wanted:
        raise InputError(
            "this machine has no address to name in the token",
            remedy="Name one with --address, as others see it: /ip4/…/tcp/4141.",
        )
    return tuple(_of_peer(addr, peer_id) for addr in dict.fromkeys(wanted))[:MAX_ADDRESSES]


def _of_seed(settings: Config) -> list[str]:
    """Where others reach the seed that runs on this home, whatever options it was started with."""

    async def ask() -> list[str]:
        seed = await running_seed(settings.home)
        return [] if seed is None else (await seed.get("/v1/status"))["addrs"]

    return [addr for addr in trio.run(ask) if not parse_dialable_untrusted(addr)[0].is_loopback]


def _of_peer(addr: str, peer_id: str) -> str:
    return addr if "/p2p/" in addr else f"{addr}/p2p/{peer_id}"

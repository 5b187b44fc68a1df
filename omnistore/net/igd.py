"""One question to the router over UPnP (Internet Gateway Device 1 and 2), as a program of its own.

    python -P -m omnistore.net.igd '{"port": 4141, "listening": {"192.168.1.20": 4141}, "lease": 3600}'
    python -P -m omnistore.net.igd '{"ports": [4141], "listening": {"192.168.1.20": 4141}}'

One JSON object on stdout; `port_mapping.answer_untrusted` reads it. miniupnpc, which libp2p brings along,
does the work, and directly: py-libp2p 0.8.1's own layer asks for mappings without an end, and gives no
reason for what fails. It is C that reads whatever answers on the LAN, without a bound on size or time:
an answer that drips holds it for ever, an endless one fills the memory, and a thread in it can not be
ended. Hence a process, with bounds that the system keeps.

Whoever answers on the LAN says where the description and the control point are: requests may go to
any HTTP server that it names. They carry nothing but what is above.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

import miniupnpc

from omnistore.net.reachability import scope

SECONDS: Final = 20
"""For everything; then the process is gone."""
MEMORY: Final = 256 << 20
"""Bytes of address space; twenty of these suffice."""
DISCOVER_MS: Final = 2000
"""For each of four kinds of device to answer, until one does."""
NAME: Final = "omni seed"
"""What the router's list of mappings shows."""
TAKEN: Final = ("ConflictInMappingEntry", "ConflictWithOtherMechanisms")
"""Errors 718 and 729, in the library's words."""

_T = TypeVar("_T")


class _Failed(Exception):
    """Why (`port_mapping.Why`), and the particulars."""


def _tried(why: str, call: Callable[..., _T], *args: object) -> _T:
    try:
        return call(*args)
    except Exception as error:  # noqa: BLE001  # the library knows no kind more exact
        said = str(error)
        # So it says that it succeeded in finding nobody.
        said = "nobody does" if said == "Success" else said
        raise _Failed("taken" if said in TAKEN else why, said) from None


def _find(gateway: Any) -> None:
    gateway.discoverdelay = DISCOVER_MS
    _tried("no gateway", gateway.discover)
    _tried("no gateway", gateway.selectigd)


def map_port(gateway: Any, port: int, listening: dict[str, int], lease: int) -> dict[str, Any]:
    """Have TCP `port` forwarded; what the router says of it."""
    _find(gateway)
    host = _tried("no gateway", gateway.externalipaddress)
    lan = gateway.lanaddr
    found = {"host": host, "lan": lan, "lease": 0}
    try:
        useful = scope(host) == "public" and lan in listening
    except ValueError:
        useful = False
    if not useful:
        # No port is opened for nothing.
        return found
    own = (lan, listening[lan])
    # Some routers overwrite what another machine has without a word.
    _entry(gateway, port, own)
    _tried("refused", gateway.addportmapping, port, "TCP", *own, NAME, "", lease)
    entry = _entry(gateway, port, own)
    return found | {"lease": entry[4] if entry is not None else 0}


def _entry(gateway: Any, port: int, own: tuple[str, int]) -> Any:
    """What the router has of `port`, if that is not another's; some do not tell."""
    entry = _tried("no answer", gateway.getspecificportmapping, port, "TCP")
    if entry is not None and entry[:2] != own:
        raise _Failed("taken", f"port {port} is forwarded to {entry[0]}")
    return entry


def unmap(gateway: Any, ports: list[int], listening: dict[str, int]) -> dict[str, Any]:
    """Take back those of `ports` that are ours, or that the router tells nothing of."""
    _find(gateway)
    for port in ports:
        entry = _tried("no answer", gateway.getspecificportmapping, port, "TCP")
        if entry is None or listening.get(entry[0]) == entry[1]:
            with suppress(_Failed):
                _tried("refused", gateway.deleteportmapping, port, "TCP")
    return {}


def answer(text: str, seconds: float = SECONDS) -> None:
    """Print what came of one question; ends the process where that takes longer."""
    # The default action of the signal: it ends C code too, and what the parent does plays no part.
    signal.setitimer(signal.ITIMER_REAL, seconds)
    # macOS knows the limit and takes no value for it: there the time has to do.
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    asked = json.loads(text)
    gateway = miniupnpc.UPnP()
    try:
        if "ports" in asked:
            found = unmap(gateway, asked["ports"], asked["listening"])
        else:
            found = map_port(gateway, asked["port"], asked["listening"], asked["lease"])
    except _Failed as failed:
        why, said = failed.args
        found = {"why": why, "said": said}
    print(json.dumps(found))


if __name__ == "__main__":
    answer(sys.argv[1])

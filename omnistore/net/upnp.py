"""Keeping a port of the router forwarded to us: the shell around `port_mapping` (spec/04-discovery §10).

Only where a person asked for it. The router is spoken to by `igd`, a process for each question.
"""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from omnistore.net.libp2p import Libp2pNetwork
from omnistore.net.port_mapping import Failed, Map, PortMapping, Unmap, answer_untrusted, question

logger = logging.getLogger(__name__)

PROGRAM: Final = "omnistore.net.igd"
LOOK_EVERY: Final = 5.0
"""Seconds between looks whether something is due, or our addresses changed."""
UNMAP_SECONDS: Final = 8.0
"""For taking the mapping back at the end; then the lease has to do."""


@dataclass(slots=True, eq=False)
class PortMapper:
    """One port of the router, for as long as it runs. `run` it beside the network."""

    network: Libp2pNetwork
    on_change: Callable[[], None] = lambda: None
    """Called when the address changed, or the reason why there is none."""
    on_move: Callable[[], None] = lambda: None
    """Called when the address changed."""
    state: PortMapping = field(default_factory=lambda: PortMapping(random.SystemRandom()))
    answered: trio.Event = field(default_factory=trio.Event)
    """The router answered once, or nobody did."""
    _told: Failed | None = None

    @property
    def address(self) -> str | None:
        """The multiaddr that the router says it forwards."""
        return self.state.address(trio.current_time())

    @property
    def why(self) -> str | None:
        """Why the last attempt failed, if it did."""
        return self.state.failed.why if self.state.failed is not None else None

    def described(self) -> tuple[str, str | None]:
        """How it stands, for people, and what to do about it."""
        return self.state.described(trio.current_time())

    async def run(self) -> None:
        """Keep it mapped, for ever; unmapped at the end."""
        try:
            while True:
                await self._look()
                await trio.sleep(LOOK_EVERY)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(UNMAP_SECONDS):
                await self._unmap()

    async def _look(self) -> None:
        listening = {
            address.host: address.port
            for address in self.network.bound()
            if address.kind == "ip4" and not address.is_loopback
        }
        while (asked := self.state.due(listening, trio.current_time())) is not None:
            data = await _ask(asked)
            late = Failed("no answer", "none in time, or none that can be read")
            answer = late if data is None else answer_untrusted(data, asked)
            self.state.answered(answer, trio.current_time())
            logger.info("asked for port %d: %s", asked.port, answer)
        self._tell()

    def _tell(self) -> None:
        addrs, failed = [self.address] if self.address is not None else [], self.state.failed
        self.answered.set()
        moved = addrs != self.network.mapped
        self.network.mapped[:] = addrs
        if moved or failed != self._told:
            self._told = failed
            self.on_change()
        if moved:
            self.on_move()

    async def _unmap(self) -> None:
        self.network.mapped.clear()
        asked = self.state.closing()
        if asked is not None and await _ask(asked) is None:
            logger.info("the router was not told that the port is no longer needed")


async def _ask(asked: Map | Unmap) -> bytes | None:
    """What `igd` has to say; None where it did not come to an end."""
    command = [sys.executable, "-P", "-m", PROGRAM, question(asked)]
    try:
        done = await trio.run_process(
            command, stdin=subprocess.DEVNULL, capture_stdout=True, capture_stderr=True, check=False
        )
    except OSError as error:
        logger.warning("the router can not be asked: %s", error)
        return None
    if done.returncode:
        said = done.stderr[-500:].decode(errors="replace")
        logger.info("asking the router ended with %d: %s", done.returncode, said)
        return None
    return done.stdout

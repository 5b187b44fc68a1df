"""py-libp2p's logging, kept from a person's terminal.

It reports ordinary disconnects as warnings and errors with tracebacks, and partly through
`logging.warning`, which installs a root logger's output as a side effect. Here the level of its
loggers is raised unless somebody chose one, and those calls are pointed at a logger. To see
everything, set the library's own environment variable: `LIBP2P_DEBUG=DEBUG omni seed`.
"""

from __future__ import annotations

import logging
import os

from libp2p.network.connection import swarm_connection


def quieten() -> None:
    """Raise the level of the library's loggers from the one it sets itself on import."""
    root = logging.getLogger("libp2p")
    if root.level == logging.WARNING and not os.environ.get("LIBP2P_DEBUG"):
        root.setLevel(logging.CRITICAL)
        # A few of its modules set their own level, against their parent's.
        for name, logger in list(logging.Logger.manager.loggerDict.items()):
            if name.startswith("libp2p.") and isinstance(logger, logging.Logger):
                logger.setLevel(logging.NOTSET)
    swarm_connection.logging = logging.getLogger("libp2p.network.connection.swarm_connection")

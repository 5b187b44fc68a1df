"""py-libp2p's logging, kept from a person's terminal.

It reports ordinary disconnects as warnings and errors with tracebacks, and partly through
`logging.warning`, which installs a root logger's output as a side effect. Here the level of its
loggers is raised where nobody set one, and those calls are pointed at a logger. To see everything:
`logging.getLogger("libp2p").setLevel(logging.DEBUG)` before the network is opened.
"""

from __future__ import annotations

import logging


def quieten() -> None:
    """Raise the level of the library's loggers, unless somebody chose one."""
    from libp2p.network.connection import swarm_connection

    root = logging.getLogger("libp2p")
    if root.level == logging.NOTSET:
        root.setLevel(logging.CRITICAL)
        # A few of its modules set their own level, against their parent's.
        for name, logger in list(logging.Logger.manager.loggerDict.items()):
            if name.startswith("libp2p.") and isinstance(logger, logging.Logger):
                logger.setLevel(logging.NOTSET)
    swarm_connection.logging = logging.getLogger("libp2p.network.connection.swarm_connection")

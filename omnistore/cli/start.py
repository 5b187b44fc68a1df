"""Where the installed `omni` begins: an interrupt while Python still imports is as quiet as any other.

Imports nothing before it can catch that. What a command does, and every other error, is `main`'s.
"""

from __future__ import annotations


def start() -> int:
    """Run the command line of this process; its exit code."""
    try:
        from omnistore.cli.main import main

        return main()
    except KeyboardInterrupt:
        return 130

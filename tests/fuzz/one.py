"""One target under atheris: `python -m tests.fuzz.one NAME CORPUS [libFuzzer's options]`; see `run`."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["omnistore", "omninfer"]):
    import omninfer.framing  # noqa: F401  # the target imports it late
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Fuzz until libFuzzer's options end it, or something is found."""
    name, corpus = sys.argv[1], Path(sys.argv[2])
    target = TARGETS[name]
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], str(corpus), *sys.argv[3:]], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

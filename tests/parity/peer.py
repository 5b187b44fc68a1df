"""Talks to `llama_peer.py` in the Python that has llama-cpp-python."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
PYTHON = Path(os.environ.get("PEERS", HERE.parent.parent / ".peers")) / "bin" / "python"


class Peer:
    """llama.cpp in a process of its own; leaves with the `with` block."""

    def __enter__(self) -> Peer:
        if not PYTHON.exists():
            raise SystemExit(f"{PYTHON} is not here: `make .peers` installs llama-cpp-python beside omni")
        self._process = subprocess.Popen(
            [PYTHON, HERE / "llama_peer.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp ended at {str(request)[:300]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

"""What a node does not need is not imported, and is there for whoever imports it afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(code: str) -> None:
    """In a process where nothing is imported yet."""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_libp2p_comes_without_http_clients() -> None:
    run(
        "import sys\n"
        "from omnistore.net.slim import import_libp2p\n"
        "import_libp2p()\n"
        "import_libp2p()\n"
        "assert not {'requests', 'httpx'} & sys.modules.keys()\n"
        "import httpx, requests\n"
        "assert issubclass(httpx.ConnectError, Exception) and callable(requests.get)\n"
    )


def test_upstream_brings_them() -> None:
    """Were it not so, `slim` could go."""
    run("import sys, libp2p\nassert {'requests', 'httpx'} <= sys.modules.keys()")


def test_an_older_index_is_brought_up_to_date_without_numpy(tmp_path: Path) -> None:
    run(
        "import sqlite3, sys\n"
        "from pathlib import Path\n"
        "from omnistore.store.database import Database\n"
        f"path = Path({str(tmp_path / 'index.sqlite')!r})\n"
        "Database(path, 1.0).close()\n"
        "assert 'sqlite_utils' not in sys.modules\n"
        "db = sqlite3.connect(path)\n"
        "db.execute('DROP TABLE mirrors')\n"
        "db.execute('PRAGMA user_version = 2')\n"
        "db.close()\n"
        "Database(path, 1.0).close()\n"
        "assert 'sqlite_utils' in sys.modules and 'numpy' not in sys.modules\n"
        "import numpy\n"
        "assert numpy.arange(3).sum() == 3\n"
    )

"""The house rules, read from the source: who may import whom, and what stays out of the pure core.

The order is the one drawn in README ("The house"); to change it on purpose, change it here and
write a decision in spec/decisions.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from omnistore.testing.tiny_gguf import tiny_model

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("omnistore/**/*.py"), *ROOT.glob("omninfer/**/*.py")])

# Lowest first; a module imports only from its own rank or below. The longest matching prefix counts.
RANKS: dict[str, int] = {
    "omnistore.errors": 0,
    "omnistore.cid": 0,
    "omnistore.dagcbor": 0,
    "omnistore.block": 0,
    "omnistore.varint": 0,
    "omnistore.chunker.ggml": 1,
    "omnistore.chunker.gguf": 1,
    "omnistore.chunker.layout": 1,
    "omnistore.chunker.describe": 1,
    "omnistore.chunker.split": 1,
    "omnistore.manifest": 1,
    "omnistore.selection": 1,
    "omnistore.settings": 1,
    "omnistore.invite": 1,
    "omnistore.keys": 1,
    "omnistore.dht.interface": 1,
    "omnistore.dht.lookup": 1,
    "omnistore.dht.names": 1,
    "omnistore.dht.records": 1,
    "omnistore.dht.schedule": 1,
    "omnistore.dht.values": 1,
    "omnistore.transfer": 1,
    "omnistore.store.interface": 1,
    "omnistore.net.agreement": 1,
    "omnistore.net.circuits": 1,
    "omnistore.net.dialback": 1,
    "omnistore.net.frames": 1,
    "omnistore.net.admission": 1,
    "omnistore.net.holepunch": 1,
    "omnistore.net.interface": 1,
    "omnistore.net.muxing": 1,
    "omnistore.net.pauses": 1,
    "omnistore.net.port_mapping": 1,
    "omnistore.net.reachability": 1,
    "omnistore.net.records": 1,
    "omnistore.net.relay_choice": 1,
    "omnistore.net.stream_state": 1,
    "omnistore.chunker": 2,
    "omnistore.config": 2,
    "omnistore.dht": 2,
    "omnistore.documents": 2,
    "omnistore.membership": 2,
    "omnistore.naming": 2,
    "omnistore.trust": 2,
    "omnistore.net": 2,
    "omnistore.store": 2,
    "omnistore.transfer.bitswap_server": 2,
    "omnistore.transfer.bridge": 2,
    "omnistore.transfer.client": 2,
    "omnistore.transfer.compare": 2,
    "omnistore.transfer.hinting": 2,
    "omnistore.transfer.outside": 2,
    "omnistore.transfer.pacing": 2,
    "omnistore.transfer.probe": 2,
    "omnistore.transfer.server": 2,
    "omnistore.transfer.swarm": 2,
    "omnistore.transfer.web": 2,
    "omnistore.joining": 3,
    "omnistore.node": 3,
    "omnistore.pinning": 3,
    "omnistore.http": 4,
    "omnistore.doctor": 4,
    "omnistore.cli": 5,
    "omninfer.arch": 10,
    "omninfer.chat": 10,
    "omninfer.conversation": 10,
    "omninfer.frames": 10,
    "omninfer.framing": 10,
    "omninfer.labels": 10,
    "omninfer.plan": 10,
    "omninfer.prefixes": 10,
    "omninfer.sampling": 10,
    "omninfer.tokenizer": 10,
    "omninfer.engines": 11,
    "omninfer.profile": 11,
    "omninfer.sources": 11,
    "omninfer.kept": 10,
    "omninfer.link": 11,
    "omninfer.stage": 11,
    "omninfer.checks": 11,
    "omninfer.threads": 11,
    "omninfer.warm": 11,
    "omninfer.weights": 11,
    "omninfer.coordinator": 12,
    "omninfer.generation": 12,
    "omninfer.grammar": 12,
    "omninfer.lenders": 12,
    "omninfer.pipeline": 12,
    "omninfer.running": 12,
    "omninfer.cli": 13,
    "omninfer.http": 13,
}
# Shipped test support stands outside the order: it may see everything, nothing may see it.
TESTING = ("omnistore.testing", "omninfer.testing")
PURE_RANKS = {0, 1, 10}
IMPURE = {
    "trio", "sqlite3", "sqlite_utils", "libp2p", "socket", "time", "random", "os", "threading", "mlx",
    "onnx", "onnxruntime", "click", "subprocess", "asyncio", "secrets", "tempfile",
}  # fmt: skip
# A library is imported in one place, so that its faults are mended in one place.
HOMES = {
    "libp2p": ("omnistore.net", "omnistore.dht.service"),
    "multiaddr": ("omnistore.net", "omnistore.dht.service"),
    "miniupnpc": ("omnistore.net.igd",),
    "zeroconf": ("omnistore.net",),
    "sqlite3": ("omnistore.store",),
    "sqlite_utils": ("omnistore.store",),
    "llguidance": ("omninfer.grammar",),
    "mlx": ("omninfer.engines",),
    "onnx": ("omninfer.engines",),
    "onnxruntime": ("omninfer.engines",),
    "click": ("omnistore.cli", "omninfer.cli"),
    "rich": ("omnistore.cli", "omninfer.cli"),
    "cbor2": ("omnistore.dagcbor",),
    "h11": ("omnistore.http",),
    "httpcore": ("omnistore.transfer.outside",),
    "httpx": ("omnistore.transfer.outside", "omnistore.transfer.web"),
}
BANNED_NAMES = re.compile(r"shard|manager|handler|utils|helper", re.IGNORECASE)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module, and whether only the type checker sees the import."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing_only
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = (ROOT / (full.replace(".", "/") + ".py")).exists()
                yield (full if is_module else str(node.module)), id(node) in typing_only


def rank(module: str) -> int | None:
    parts = module.split(".")
    while parts:
        found = RANKS.get(".".join(parts))
        if found is not None:
            return found
        parts.pop()
    return None


def within(module: str, homes: tuple[str, ...]) -> bool:
    return any(module == home or module.startswith(home + ".") for home in homes)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_module_imports_only_from_below(path: Path) -> None:
    module = module_name(path)
    if module in ("omnistore", "omninfer") or within(module, TESTING):
        return
    own = rank(module)
    assert own is not None, f"{module} has no place in the house: give it a rank in {Path(__file__).name}"
    for imported, typing_only in imports(path):
        top = imported.partition(".")[0]
        if top not in ("omnistore", "omninfer"):
            assert own not in PURE_RANKS or top not in IMPURE or typing_only, (
                f"{module} is pure but imports {top}"
            )
            continue
        assert not within(imported, TESTING), f"{module} imports test support {imported}"
        assert not (module.startswith("omnistore") and top == "omninfer"), f"{module} imports {imported}"
        other = rank(imported)
        if other is not None and not typing_only:
            assert other <= own, f"{module} (rank {own}) imports {imported} (rank {other})"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_libraries_stay_in_their_homes(path: Path) -> None:
    module = module_name(path)
    for imported, _ in imports(path):
        homes = HOMES.get(imported.partition(".")[0])
        assert homes is None or within(module, (*homes, *TESTING)), f"{module} imports {imported}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_names_say_what_a_thing_is(path: Path) -> None:
    assert not BANNED_NAMES.search(path.relative_to(ROOT).as_posix())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            assert not BANNED_NAMES.search(node.name), f"{path.name}:{node.lineno}: {node.name}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < 650, f"{path.name} outgrew one idea"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 80, f"{path.name}:{node.lineno}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_module_says_what_it_is(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc is not None and len(doc) > 20, f"{path.name} has no module docstring"


HEAVY = {
    "libp2p",
    "mlx",
    "numpy",
    "onnx",
    "onnxruntime",
    "sqlite_utils",
    "rich",
    "httpx",
    "zeroconf",
    "jinja2",
}
LOCAL = {*HEAVY, "trio", "omnistore.node", "omnistore.transfer.client", "omnistore.net.libp2p"}


@pytest.mark.parametrize(
    ("command", "unneeded"),
    [
        (["--help"], {*LOCAL, "cryptography", "cbor2", "sqlite3"}),
        (["add", "--json", "FILE"], {*LOCAL, "hashlib", "omnistore.transfer.hints", "omnistore.membership"}),
        (["ls", "--json"], {*LOCAL, "omnistore.membership"}),
        (["show", "--json", "m"], LOCAL),
        (["du"], LOCAL),
        (["id"], {*LOCAL, "sqlite3"}),
        (["config"], {*LOCAL, "sqlite3"}),
        (["status"], {*HEAVY, "omnistore.node", "omnistore.transfer.client", "omnistore.http.daemon"}),
        (["peers"], {*HEAVY, "omnistore.node", "omnistore.transfer.client", "omnistore.http.daemon"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_imports_what_it_uses(command: list[str], unneeded: set[str], tmp_path: Path) -> None:
    """By names: half of a short command's time is imports, and nobody sees them come."""
    file = tmp_path / "m.gguf"
    file.write_bytes(tiny_model(layers=1).build())
    code = (
        "import sys; from omnistore.cli.main import main\n"
        "code = main(sys.argv[2:])\n"
        "print('LOADED', code, sorted(set(sys.argv[1].split()) & sys.modules.keys()))"
    )
    environ = {**os.environ, "OMNI_HOME": str(tmp_path / "home")}

    def loaded(words: list[str]) -> str:
        called = [sys.executable, "-c", code, " ".join(unneeded), *words]
        done = subprocess.run(called, capture_output=True, text=True, check=True, env=environ)
        return done.stdout.splitlines()[-1]

    if command[0] in ("ls", "show", "du"):
        loaded(["add", str(file)])
    words = [str(file) if word == "FILE" else word for word in command]
    # No seed runs here, which is what the last two find.
    assert loaded(words) == f"LOADED {9 if command[0] in ('status', 'peers') else 0} []"

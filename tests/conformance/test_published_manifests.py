"""The signed manifests in `manifests/`: each names the file beside it, under its listed publisher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omnistore.block import Block
from omnistore.chunker.cut import cut, model_files
from omnistore.manifest import signed_untrusted

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
PUBLISHERS = json.loads((MANIFESTS / "publishers.json").read_text())
SIGNED = [(name, path) for name, entry in PUBLISHERS.items() for path in entry["signs"]]


@pytest.mark.parametrize(("publisher", "path"), SIGNED)
def test_a_signed_manifest_names_the_file_beside_it(publisher: str, path: str) -> None:
    file = MANIFESTS / path
    signed = signed_untrusted(Block.node(file.read_bytes()))
    assert signed.publisher.peer_id == PUBLISHERS[publisher]["peer_id"]
    assert signed.manifest == cut(model_files(file.with_suffix(".gguf"))).node.cid


def test_every_signed_manifest_is_listed() -> None:
    listed = {MANIFESTS / path for _, path in SIGNED}
    assert set(MANIFESTS.rglob("*.manifest")) == listed

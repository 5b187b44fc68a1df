"""spec/vectors/transfer-*.json and the tables of spec/05-transfer against the code."""

from __future__ import annotations

import json
from typing import Any

import pytest

from omnistore.errors import RemoteProtocolError
from omnistore.transfer.life import TRANSITIONS
from omnistore.transfer.messages import ERROR_CODES, LIMITS, PROTOCOL, REQUESTER, SERVER, Decoder
from tests.conformance.write_transfer_vectors import VECTORS, documents, named

MESSAGES = json.loads((VECTORS / "transfer-messages.json").read_text())
SPEC = (VECTORS.parent / "05-transfer.md").read_text()


@pytest.mark.parametrize("name", documents())
def test_the_vectors_are_what_the_code_does(name: str) -> None:
    written = json.loads((VECTORS / name).read_text())
    assert json.loads(json.dumps(documents()[name])) == written


@pytest.mark.parametrize("vector", MESSAGES["accepted"], ids=lambda vector: str(vector["name"]))
def test_accepted(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    for accepts in (REQUESTER, SERVER):
        try:
            (message,) = Decoder(accepts).feed_untrusted(data)
        except RemoteProtocolError:
            continue
        assert named(message) == vector["message"]
        return
    raise AssertionError("no side takes it")


@pytest.mark.parametrize("vector", MESSAGES["refused"], ids=lambda vector: str(vector["name"]))
def test_refused(vector: dict[str, Any]) -> None:
    decoder = Decoder({"server": REQUESTER, "requester": SERVER}[vector["by"]])
    with pytest.raises(RemoteProtocolError):
        decoder.feed_untrusted(bytes.fromhex(vector["hex"]))


def test_the_specification_has_every_transition() -> None:
    rows = [line.split("|")[1:4] for line in SPEC.splitlines() if line.startswith("| ")]
    told = {tuple(cell.strip() for cell in row) for row in rows}
    for (state, verb), after in TRANSITIONS.items():
        assert (state.name, verb, after.name) in told


def test_the_specification_has_every_name_and_limit() -> None:
    assert f"`{PROTOCOL}`" in SPEC
    for name in (*REQUESTER, *SERVER):
        assert f"| `{name}` |" in SPEC
    for code in ERROR_CODES:
        assert f"`{code}`" in SPEC
    for number in (LIMITS.message, LIMITS.payload, LIMITS.links, LIMITS.asks, LIMITS.queries, LIMITS.bitmap):
        assert str(number) in SPEC or f"{number:,}" in SPEC

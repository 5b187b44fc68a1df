"""spec/vectors/names.json and invites.json, run against this implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omnistore.cid import CID
from omnistore.dht.names import name_key, record_untrusted, select, sign
from omnistore.errors import BadConfig, BadNameRecord
from omnistore.invite import invite, token_untrusted
from omnistore.keys import PrivateKey
from omnistore.net.private import xsalsa20

VECTORS = Path(__file__).parents[2] / "spec" / "vectors"
NAMES: dict[str, Any] = json.loads((VECTORS / "names.json").read_text())
INVITES: dict[str, Any] = json.loads((VECTORS / "invites.json").read_text())
RECORDS = [record_untrusted(bytes.fromhex(vector["record"])) for vector in NAMES["records"]]


@pytest.mark.parametrize("vector", NAMES["records"], ids=lambda vector: str(vector["sequence"]))
def test_records(vector: dict[str, Any]) -> None:
    key = PrivateKey(bytes.fromhex(NAMES["seed"]))
    value = CID.parse_untrusted(vector["value"])
    made = sign(key, vector["name"], value, vector["sequence"], vector["not_after"])
    assert made.encode().hex() == vector["record"]
    assert name_key(made.publisher, made.name).decode() == vector["key"]
    assert made in RECORDS


@pytest.mark.parametrize("fault", NAMES["bad"])
def test_records_to_refuse(fault: str) -> None:
    with pytest.raises(BadNameRecord):
        record_untrusted(bytes.fromhex(NAMES["bad"][fault]))


@pytest.mark.parametrize("number", range(len(NAMES["selection"])))
def test_which_record_counts(number: int) -> None:
    vector = NAMES["selection"][number]
    found = [RECORDS[index] for index in vector["found"]]
    seen = None if vector["seen"] is None else RECORDS[vector["seen"]]
    if vector["record"] is None:
        with pytest.raises(BadNameRecord):
            select(found, seen, vector["now"])
        return
    choice = select(found, seen, vector["now"])
    assert (RECORDS.index(choice.record), choice.forked) == (vector["record"], vector["forked"])


@pytest.mark.parametrize("vector", INVITES["tokens"], ids=lambda vector: vector["psk"][:2])
def test_tokens(vector: dict[str, Any]) -> None:
    key = PrivateKey(bytes.fromhex(INVITES["seed"]))
    made = invite(key, bytes.fromhex(vector["psk"]), tuple(vector["bootstrap"]), vector["not_after"])
    assert made.encode() == vector["token"]
    assert token_untrusted(vector["token"], now=0) == made


@pytest.mark.parametrize("fault", INVITES["bad"])
def test_tokens_to_refuse(fault: str) -> None:
    with pytest.raises(BadConfig):
        token_untrusted(INVITES["bad"][fault], now=0)


def test_the_cipher() -> None:
    vector = {name: bytes.fromhex(text) for name, text in INVITES["cipher"].items()}
    assert xsalsa20(vector["key"], vector["nonce"]).encrypt(bytes(32)) == vector["stream"]

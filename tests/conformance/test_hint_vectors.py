"""spec/vectors/mirror-hints.json, and what spec/05-transfer says of hints, against the code."""

from __future__ import annotations

import json
from typing import Any

import pytest

from omnistore.cid import CID
from omnistore.errors import RemoteProtocolError
from omnistore.transfer import hinting
from omnistore.transfer.hints import (
    FOLLOWED,
    LIMITS,
    PROTOCOL,
    decode_answer_untrusted,
    decode_question_untrusted,
    fault_of,
    is_public,
    length_untrusted,
    mirrors_of,
)
from tests.conformance.write_hint_vectors import document
from tests.conformance.write_transfer_vectors import VECTORS

FILE = json.loads((VECTORS / "mirror-hints.json").read_text())
MODEL = CID.parse_untrusted(FILE["model"])
TEXT = (VECTORS.parent / "05-transfer.md").read_text().partition("## Mirror hints")[2].partition("\n## ")[0]


def test_the_vectors_are_what_the_code_does() -> None:
    assert json.loads(json.dumps(document())) == FILE


@pytest.mark.parametrize("vector", FILE["accepted"], ids=lambda vector: str(vector["name"]))
def test_accepted(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    assert length_untrusted(data[:4]) == len(data) - 4
    if "urls" in vector:
        assert list(decode_answer_untrusted(data[4:], MODEL)) == vector["urls"]
    else:
        assert str(decode_question_untrusted(data[4:])) == vector["model"]


@pytest.mark.parametrize("vector", FILE["refused"], ids=lambda vector: str(vector["name"]))
def test_refused(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])

    def asker() -> None:
        length_untrusted(data[:4])
        decode_answer_untrusted(data[4:], MODEL)

    def teller() -> None:
        length_untrusted(data[:4])
        decode_question_untrusted(data[4:])

    for side in {"asker": [asker], "teller": [teller], "both": [asker, teller]}[vector["by"]]:
        with pytest.raises(RemoteProtocolError):
            side()


def test_urls_and_hosts() -> None:
    assert [fault_of(url) for url in FILE["urls"]["accepted"]] == [None, None]
    assert all(fault_of(url) is not None for url in FILE["urls"]["refused"])
    for public, hosts in ((True, FILE["hosts"]["public"]), (False, FILE["hosts"]["not public"])):
        for host in hosts:
            assert fault_of(f"http://{host}/x") is None
            assert is_public(f"http://{host}/x") is public, host


@pytest.mark.parametrize("vector", FILE["sets"])
def test_which_file_a_url_is_of(vector: dict[str, Any]) -> None:
    found = {mirror.url: list(mirror.urls) for mirror in mirrors_of(vector["urls"], vector["files"])}
    assert found == vector["mirrors"]


def test_the_specification_has_every_limit() -> None:
    words = {2: "two", 4: "four", 8: "eight"}
    assert f"`{PROTOCOL}`" in TEXT and f"{LIMITS.message:,} bytes" in TEXT
    assert f"0 to {LIMITS.urls} different" in TEXT and f"1 to {LIMITS.url} characters" in TEXT
    assert f"first {words[hinting.ASKED]} peers" in TEXT and f"{words[FOLLOWED]} of them at most" in TEXT
    assert f"answers {hinting.STREAMS} at once, each within {hinting.PATIENCE:.0f} s" in TEXT

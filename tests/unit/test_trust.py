"""Publishers known by name."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from omnistore.errors import BadConfig, InputError, UnknownSigner
from omnistore.keys import PrivateKey
from omnistore.trust import FILE_NAME, TrustStore

ANNA, BELA = PrivateKey(b"a" * 32).public, PrivateKey(b"b" * 32).public


def test_a_publisher_is_known_by_name_until_forgotten(home: Path) -> None:
    trust = TrustStore(home)
    assert trust.publishers() == {}
    trust.add("bela", BELA.peer_id)
    trust.add("Anna@home", ANNA.peer_id)
    trust.add("bela", BELA.peer_id)
    assert list(trust.publishers().items()) == [("Anna@home", ANNA.peer_id), ("bela", BELA.peer_id)]
    assert trust.resolve("bela") == trust.resolve(BELA.peer_id) == BELA
    assert stat.S_IMODE((home / FILE_NAME).stat().st_mode) == 0o600
    trust.remove("bela")
    with pytest.raises(UnknownSigner, match="no publisher is called 'bela'"):
        trust.resolve("bela")
    with pytest.raises(InputError, match="no publisher"):
        trust.remove("bela")


def test_a_name_does_not_change_its_meaning_silently(home: Path) -> None:
    trust = TrustStore(home)
    trust.add("anna", ANNA.peer_id)
    with pytest.raises(InputError, match=f"is {ANNA.peer_id} already"):
        trust.add("anna", BELA.peer_id)
    assert trust.resolve("anna") == ANNA


@pytest.mark.parametrize("name", ["", "a/b", "a b", "-a", "a" * 64, "a\n", ANNA.peer_id])
def test_names_that_are_none(home: Path, name: str) -> None:
    with pytest.raises(InputError, match="can not be a publisher's name"):
        TrustStore(home).add(name, ANNA.peer_id)


@pytest.mark.parametrize("peer", ["", "12D3KooWnobody", ANNA.peer_id + "x", "anna"])
def test_peer_ids_that_are_none(home: Path, peer: str) -> None:
    with pytest.raises(InputError, match="not the peer ID"):
        TrustStore(home).add("anna", peer)
    assert TrustStore(home).publishers() == {}


@pytest.mark.parametrize("text", ["[]", "{", "\xff", '{"anna": 1}', '{"anna": "12D3KooWx"}', "[" * 100_000])
def test_a_damaged_file_is_named(home: Path, text: str) -> None:
    home.mkdir()
    (home / FILE_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(BadConfig, match=r"trust\.json is damaged"):
        TrustStore(home).publishers()


def test_who_signed_for_people(home: Path) -> None:
    trust = TrustStore(home)
    trust.add("anna", ANNA.peer_id)
    assert trust.describe(ANNA) == f"anna ({ANNA.peer_id})"
    assert trust.describe(BELA) == f"unknown publisher {BELA.peer_id}"
    assert "no signature" in trust.describe(None)

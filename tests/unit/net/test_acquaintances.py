"""The file of peers met before: bounded, aged, and harmless whatever stands in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omnistore.keys import PrivateKey
from omnistore.net.acquaintances import FILE_NAME, MAX_AGE, MAX_PEERS, recall, remember
from omnistore.net.interface import Provider

NOW = 1_800_000_000.0
ADDR = "/ip4/10.0.0.1/tcp/4141"


def peer(number: int) -> str:
    return PrivateKey(number.to_bytes(32, "big")).public.peer_id


def test_who_was_met_last_comes_first_and_who_was_not_met_for_long_goes(tmp_path: Path) -> None:
    remember(tmp_path, [Provider(peer(1), (ADDR,)), Provider(peer(2), (ADDR,))], NOW)
    remember(tmp_path, [Provider(peer(3), (ADDR,)), Provider(peer(1), (ADDR + "2",))], NOW + 60)
    found = recall(tmp_path, NOW + 100)
    assert {one.peer for one in found[:2]} == {peer(1), peer(3)}
    assert {one.addrs for one in found if one.peer == peer(1)} == {(ADDR + "2",)}
    assert found[2].peer == peer(2)
    later = recall(tmp_path, NOW + MAX_AGE + 30)
    assert {one.peer for one in later} == {peer(1), peer(3)}
    assert recall(tmp_path, NOW + 2 * MAX_AGE) == []


def test_the_file_is_bounded(tmp_path: Path) -> None:
    for round_ in range(3):
        numbers = range(round_ * MAX_PEERS, (round_ + 1) * MAX_PEERS)
        remember(tmp_path, [Provider(peer(n), (ADDR,) * 50) for n in numbers], NOW + round_)
    found = recall(tmp_path, NOW + 3)
    assert len(found) == MAX_PEERS
    assert {one.met for one in found} == {NOW + 2}
    assert (tmp_path / FILE_NAME).stat().st_size < 1 << 18


def test_peers_without_an_address_of_use_are_not_kept(tmp_path: Path) -> None:
    remember(tmp_path, [Provider(peer(1)), Provider(peer(2), ("/ip4/10.0.0.1/udp/1", "nonsense"))], NOW)
    assert recall(tmp_path, NOW) == []


BAD: dict[str, Any] = {
    "no object": [],
    "no peers": {},
    "peers no list": {"peers": 7},
    "entry no object": {"peers": [7]},
    "no peer ID": {"peers": [{"peer": "x", "addrs": [ADDR], "met": NOW}]},
    "address no text": {"peers": [{"peer": peer(1), "addrs": [7], "met": int(NOW)}]},
    "no addresses": {"peers": [{"peer": peer(1), "addrs": [], "met": int(NOW)}]},
    "from the future": {"peers": [{"peer": peer(1), "addrs": [ADDR], "met": int(NOW + 10 * 86400)}]},
    "met no number": {"peers": [{"peer": peer(1), "addrs": [ADDR], "met": "now"}]},
}


@pytest.mark.parametrize("document", BAD.values(), ids=BAD)
def test_a_bad_file_counts_as_empty_and_is_replaced(document: Any, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps(document))
    assert recall(tmp_path, NOW) == []
    remember(tmp_path, [Provider(peer(5), (ADDR,))], NOW)
    assert [one.peer for one in recall(tmp_path, NOW)] == [peer(5)]
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"{", b"[" * 100_000, b" " * (2 << 20)])
def test_a_broken_file_counts_as_empty(data: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(data)
    assert recall(tmp_path, NOW) == []


def test_a_home_that_can_not_be_written_is_no_failure(tmp_path: Path) -> None:
    remember(tmp_path / "absent", [Provider(peer(1), (ADDR,))], NOW)
    assert recall(tmp_path / "absent", NOW) == []

"""Ranges, URLs and answers of web servers, without any server."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnistore.errors import BadConfig, RemoteProtocolError
from omnistore.transfer.ranges import (
    GAP_MOST,
    RANGE_MOST,
    RETRY_MOST,
    Place,
    Range,
    RangeQueue,
    check_answer_untrusted,
    check_url,
    file_urls,
    retry_after_untrusted,
    shown_url,
)

MIB = 1 << 20
SET = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]


def queue(*places: Place) -> RangeQueue:
    found = RangeQueue()
    for ask, place in enumerate(places):
        found.add(ask, place)
    return found


def test_neighbours_share_a_request_whatever_their_order() -> None:
    asks = queue(*(Place(0, 100 + n * MIB, MIB) for n in (3, 1, 2, 9)))
    found = asks.next(RANGE_MOST)
    assert found is not None
    assert (found.first, found.last) == (100 + MIB, 100 + 4 * MIB - 1)
    assert [ask for ask, _ in found.asks] == [1, 2, 0]
    assert asks.bytes == MIB


def test_the_oldest_ask_goes_first_and_requests_are_bounded() -> None:
    asks = queue(Place(0, 50 * MIB, MIB), *(Place(0, n * MIB, MIB) for n in range(20)))
    first, second, third = (asks.next(RANGE_MOST) for _ in range(3))
    assert first is not None and second is not None and third is not None
    assert first.first == 50 * MIB
    assert (second.first, second.last) == (0, RANGE_MOST - 1)
    assert third.first == RANGE_MOST


def test_other_files_and_wide_gaps_are_other_requests() -> None:
    asks = queue(
        Place(0, 0, 10), Place(1, 10, 10), Place(0, 10 + GAP_MOST, 10), Place(0, 11 + 2 * GAP_MOST, 1)
    )
    found = asks.next(RANGE_MOST)
    assert found is not None and [ask for ask, _ in found.asks] == [0, 2, 3]
    asks = queue(Place(0, 0, 10), Place(0, 11 + GAP_MOST, 10))
    found = asks.next(RANGE_MOST)
    assert found is not None and len(found.asks) == 1


def test_a_cancelled_ask_is_not_requested() -> None:
    asks = queue(Place(0, 0, 10), Place(0, 10, 10))
    assert asks.cancel(0) and not asks.cancel(0)
    found = asks.next(RANGE_MOST)
    assert found is not None and (found.first, asks.bytes) == (10, 0)
    assert asks.next(RANGE_MOST) is None


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(0, 6 * MIB))
def test_every_ask_is_requested_once_and_every_request_is_in_order(places: list[int], most: int) -> None:
    asks = queue(*(Place(n % 2, n * MIB, MIB) for n in places))
    seen: list[int] = []
    while (found := asks.next(most)) is not None:
        seen += [ask for ask, _ in found.asks]
        inside = [place for _, place in found.asks]
        assert found.first == inside[0].offset and found.last == inside[-1].offset + MIB - 1
        assert all(a.offset + MIB <= b.offset for a, b in pairwise(inside))
        assert len(inside) == 1 or found.last - found.first < most
    assert sorted(seen) == list(range(len(places)))
    assert asks.bytes == 0


# --- URLs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["ftp://x/a", "http:///a", "x", "", "http://x:99999/", "http://[/", "http://x/a b"]
)
def test_what_is_no_url(text: str) -> None:
    with pytest.raises(BadConfig):
        check_url(text)


def test_secrets_stay_out_of_reports() -> None:
    assert check_url("https://me:pass@x:1/a.gguf?key=1") == "https://me:pass@x:1/a.gguf?key=1"
    assert shown_url("https://me:pass@x:1/a.gguf?key=1") == "https://x:1/a.gguf"


def test_where_the_files_of_a_model_are() -> None:
    assert file_urls("http://x/any?a=1", ["m.gguf"]) == ("http://x/any?a=1",)
    assert file_urls("http://x/d/?a=1", ["m é.gguf"]) == ("http://x/d/m%20%C3%A9.gguf?a=1",)
    other = tuple(f"http://x/other-{n:05d}-of-00002.gguf" for n in (1, 2))
    assert file_urls(other[1], SET) == other
    assert file_urls("http://x/b.gguf", ["a.gguf", "b.gguf"]) == (None, "http://x/b.gguf")
    for url in ("http://x/other.gguf", "http://x/m-00001-of-00003.gguf"):
        with pytest.raises(BadConfig, match="none of the model's 2 files"):
            file_urls(url, SET)


# --- answers --------------------------------------------------------------------------------

WANTED = Range(0, 100, 199, ())


def test_good_answers() -> None:
    check_answer_untrusted(206, {"content-range": "bytes 100-199/1000"}, WANTED, 1000)
    check_answer_untrusted(206, {"content-range": "bytes 100-199/*"}, WANTED, 1000)
    check_answer_untrusted(200, {}, replace(WANTED, first=0), 1000)
    check_answer_untrusted(200, {"content-length": "1000"}, replace(WANTED, first=0), 1000)


@pytest.mark.parametrize(
    ("status", "headers", "why"),
    [
        (206, {}, "without a usable Content-Range"),
        (206, {"content-range": "bytes 100-199"}, "without a usable Content-Range"),
        (206, {"content-range": "bytes 100-199/" + "9" * 5000}, "without a usable Content-Range"),
        (206, {"content-range": "bytes 100-199/999"}, "999 bytes"),
        (206, {"content-range": "bytes 100-198/1000"}, "100 to 198"),
        (206, {"content-range": "bytes 0-99/1000"}, "0 to 99"),
        (206, {"content-range": "bytes 100-199/1000", "content-encoding": "gzip"}, "encoded"),
        (200, {}, "does not answer range requests"),
        (200, {"content-length": "7"}, "7 bytes"),
        (416, {"content-range": "bytes */50"}, "50 bytes"),
        (416, {}, "ends before"),
        (404, {}, "404"),
        (304, {}, "304"),
    ],
)
def test_answers_that_will_not_do(status: int, headers: dict[str, str], why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        check_answer_untrusted(status, headers, WANTED, 1000)


def test_how_long_to_leave_a_server_alone() -> None:
    assert retry_after_untrusted(None, 0, 2) == 2
    assert retry_after_untrusted("120", 0, 2) == 120
    assert retry_after_untrusted("99999999", 0, 2) == RETRY_MOST
    assert retry_after_untrusted("Thu, 01 Jan 1970 00:01:00 GMT", 10, 2) == 50
    assert retry_after_untrusted("Thu, 01 Jan 1970 00:01:00 GMT", 100, 2) == 0
    for nonsense in ("soon", "-5", "9" * 400, "Thu, 99 Jan 1970"):
        assert retry_after_untrusted(nonsense, 0, 2) == 2

"""Mirror hints: which URLs may be named, which may be followed, and the two messages."""

from __future__ import annotations

import pytest

from omnistore import dagcbor
from omnistore.cid import CID, DAG_CBOR
from omnistore.errors import InputError, RemoteProtocolError
from omnistore.transfer.hints import (
    LIMITS,
    Mirror,
    check_hints,
    decode_answer_untrusted,
    decode_question_untrusted,
    encode_answer,
    encode_question,
    fault_of,
    is_public,
    is_public_address,
    length_untrusted,
    mirrors_of,
)

MODEL, OTHER = CID.of_digest(DAG_CBOR, bytes(32)), CID.of_digest(DAG_CBOR, bytes([1] * 32))
SET = ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/model.gguf",
        "http://example.org:8080/a/b%20c/(v1)/model~1.gguf",
        "https://example.org/models/",
        "https://[2606:4700::1]/x.gguf",
        "http://1.2.3.4/x.gguf",
        "https://example.org/" + "x" * (LIMITS.url - 20),
    ],
)
def test_what_may_be_named(url: str) -> None:
    assert fault_of(url) is None and is_public(url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "at most 512"),
        ("https://example.org/" + "x" * (LIMITS.url - 19), "at most 512"),
        ("ftp://example.org/x.gguf", "http"),
        ("file:///etc/passwd", "http"),
        ("HTTPS://example.org/x.gguf", "http"),
        ("example.org/x.gguf", "http"),
        ("https:example.org/x.gguf", "http"),
        ("https:///x.gguf", "no host"),
        ("https://example.org:0/x.gguf", "no host"),
        ("https://example.org:/x.gguf", "no host"),
        ("https://example.org:99999/x.gguf", "no URL"),
        ("https://[::1/x.gguf", "no URL"),
        ("https://me:secret@example.org/x.gguf", "password"),
        ("https://me@example.org/x.gguf", "password"),
        ("https://example.org\\@127.0.0.1/x.gguf", "password"),
        ("https://example.org/x.gguf?token=secret", "query"),
        ("https://example.org/x.gguf#top", "fragment"),
        ("https://example.org", "no path"),
        ("https://exämple.org/x.gguf", "%XX"),
        ("https://example.org/ä.gguf", "%XX"),
        ("https://example.org/a\nb.gguf", "%XX"),
        ("https://example.org/a b.gguf", "no URL has"),
        ("https://example.org/<b>.gguf", "no URL has"),
        ("https://exa mple.org/x.gguf", "no URL has"),
    ],
)
def test_what_may_not_be_named(url: str, said: str) -> None:
    assert said in str(fault_of(url))
    with pytest.raises(InputError):
        check_hints([url], ["x.gguf"])


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "router", "printer.local", "db.internal", "a.localhost", "a..b", "127.0.0.1", "10.1.2.3",
        "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "203.0.113.5", "[::1]", "[::]", "[fe80::1]", "[fc00::1]", "[ff02::1]",
        "[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[2002:7f00:1::]", "[64:ff9b::a00:1]",
        "[2001:0:4136:e378:8000:63bf:3fff:fdd2]",
    ],
)  # fmt: skip
def test_what_is_never_followed(host: str) -> None:
    assert fault_of(f"http://{host}/x.gguf") is None
    assert not is_public(f"http://{host}/x.gguf")


def test_addresses_that_are_none() -> None:
    assert is_public_address("9.9.9.9") and is_public_address("2620:fe::fe")
    assert not is_public_address("nowhere") and not is_public_address("fe80::1%eth0")


def test_urls_go_to_files_by_their_names() -> None:
    single = ["https://a.example/x.gguf", "https://b.example/dir/"]
    assert mirrors_of(single, ["m.gguf"]) == (
        Mirror("https://a.example/x.gguf", ("https://a.example/x.gguf",)),
        Mirror("https://b.example/dir/", ("https://b.example/dir/m.gguf",)),
    )
    spread = [f"https://a.example/{SET[2]}", f"https://b.example/m/{SET[0]}", f"https://a.example/{SET[0]}"]
    assert check_hints(spread, SET) == tuple(spread)
    assert mirrors_of([*spread, "https://c.example/else.gguf"], SET) == (
        Mirror("https://a.example/", (spread[2], None, spread[0])),
        Mirror("https://b.example/m/", (spread[1], None, None)),
    )
    assert mirrors_of(["https://d.example/"], SET)[0].urls == tuple(f"https://d.example/{n}" for n in SET)


def test_urls_that_are_refused_to_a_person() -> None:
    with pytest.raises(InputError, match="none of the model's 3 files"):
        check_hints(["https://a.example/other-00001-of-00003.gguf"], SET)
    with pytest.raises(InputError, match="at most 64"):
        check_hints([f"https://a.example/{n}.gguf" for n in range(65)], ["x.gguf"])
    assert check_hints(["https://a.example/x"] * 99, ["x.gguf"]) == ("https://a.example/x",)


def test_messages_come_back() -> None:
    question = encode_question(MODEL)
    assert length_untrusted(question[:4]) == len(question) - 4
    assert decode_question_untrusted(question[4:]) == MODEL
    urls = ("https://a.example/x.gguf", "http://10.0.0.1/x.gguf")
    assert decode_answer_untrusted(encode_answer(MODEL, urls)[4:], MODEL) == urls
    assert decode_answer_untrusted(encode_answer(MODEL, ())[4:], MODEL) == ()
    longest = [f"https://a.example/{n:02}/" + "x" * (LIMITS.url - 21) for n in range(LIMITS.urls)]
    assert len(decode_answer_untrusted(encode_answer(MODEL, longest)[4:], MODEL)) == LIMITS.urls


@pytest.mark.parametrize("length", [0, LIMITS.message + 1, (1 << 32) - 1])
def test_a_length_that_is_refused(length: int) -> None:
    with pytest.raises(RemoteProtocolError):
        length_untrusted(length.to_bytes(4, "big"))


@pytest.mark.parametrize(
    "message",
    [
        [],
        {},
        {"which": {"model": MODEL}},
        {"mirrors": {"model": MODEL}},
        {"mirrors": {"model": MODEL, "urls": [], "more": 1}},
        {"mirrors": {"model": MODEL, "urls": []}, "more": 1},
        {"mirrors": {"model": OTHER, "urls": []}},
        {"mirrors": {"model": "x", "urls": []}},
        {"mirrors": {"model": MODEL, "urls": "https://a.example/"}},
        {"mirrors": {"model": MODEL, "urls": [1]}},
        {"mirrors": {"model": MODEL, "urls": ["https://u@a.example/"]}},
        {"mirrors": {"model": MODEL, "urls": ["https://a.example/"] * 2}},
        {"mirrors": {"model": MODEL, "urls": [f"https://a.example/{n}" for n in range(65)]}},
    ],
)
def test_an_answer_that_is_refused(message: dagcbor.Value) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_answer_untrusted(dagcbor.encode(message), MODEL)


@pytest.mark.parametrize("message", [{"which": {}}, {"which": {"model": 1}}, {"mirrors": {"model": MODEL}}])
def test_a_question_that_is_refused(message: dagcbor.Value) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_question_untrusted(dagcbor.encode(message))

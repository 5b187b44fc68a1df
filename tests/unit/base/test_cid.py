"""The one CID profile: what it writes, what it reads, what it refuses and how it says so."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiformats import CID as AnyCID

from omnistore.block import Block
from omnistore.cid import CID, CID_SIZE, DAG_CBOR, RAW
from omnistore.errors import InputError, MalformedCID

DIGESTS = st.binary(min_size=32, max_size=32)
CODECS = st.sampled_from([RAW, DAG_CBOR])
GOOD = Block.raw(b"omni").cid
TEXT = str(GOOD)


@given(CODECS, DIGESTS)
def test_multiformats_agrees(codec: int, digest: bytes) -> None:
    ours = CID.of_digest(codec, digest)
    theirs = AnyCID("base32", 1, {RAW: "raw", DAG_CBOR: "dag-cbor"}[codec], ("blake3", digest))
    assert bytes(theirs) == ours.binary
    assert str(theirs) == str(ours)
    assert CID.from_bytes_untrusted(bytes(theirs)) == CID.parse_untrusted(str(theirs)) == ours
    assert theirs.digest == ours.multihash


@given(CODECS, DIGESTS)
def test_its_properties(codec: int, digest: bytes) -> None:
    cid = CID.of_digest(codec, digest)
    assert (cid.codec, cid.digest, cid.multihash) == (codec, digest, b"\x1e\x20" + digest)
    assert len(cid.binary) == CID_SIZE
    assert len(str(cid)) == 59
    assert str(cid).startswith("bafkr4i" if codec == RAW else "bafyr4i")
    assert repr(cid) == f"CID({cid})"


@given(st.lists(DIGESTS))
def test_they_sort_by_their_bytes(digests: list[bytes]) -> None:
    cids = [CID.of_digest(RAW, digest) for digest in digests]
    assert [cid.digest for cid in sorted(cids)] == sorted(digests)


@given(DIGESTS, st.integers(0, 3), st.integers(0, 255))
def test_any_other_prefix_is_refused(digest: bytes, place: int, value: int) -> None:
    altered = bytearray(CID.of_digest(RAW, digest).binary)
    altered[place] = value
    if bytes(altered[:4]) in (b"\x01\x55\x1e\x20", b"\x01\x71\x1e\x20"):
        assert CID.from_bytes_untrusted(bytes(altered)).binary == altered
    else:
        with pytest.raises(MalformedCID):
            CID.from_bytes_untrusted(bytes(altered))


@given(st.binary(max_size=80))
def test_bytes_are_a_cid_or_are_refused(data: bytes) -> None:
    try:
        assert CID.from_bytes_untrusted(data).binary == data
    except MalformedCID as error:
        assert len(error.message) < 200


@given(st.text(max_size=300) | st.from_regex("[bBzfmukQ1][a-zA-Z2-7]{0,70}", fullmatch=True))
def test_text_is_a_cid_or_is_refused(text: str) -> None:
    try:
        cid = CID.parse_untrusted(text)
    except MalformedCID as error:
        assert len(error.message) < 1000
    else:
        assert str(cid) in text.lower()


@given(st.integers(1, 58), st.characters())
def test_one_other_letter_is_another_cid_or_none(place: int, letter: str) -> None:
    text = TEXT[:place] + letter + TEXT[place + 1 :]
    try:
        assert str(CID.parse_untrusted(text)) == text.strip()
    except MalformedCID:
        assert text != TEXT


@pytest.mark.parametrize("final", "abcdefghijklmnopqrstuvwxyz234567")
def test_stray_bits_are_refused(final: str) -> None:
    """59 letters hold 290 bits, a CID has 288: of four last letters only one is canonical."""
    text = TEXT[:-1] + final
    if "abcdefghijklmnopqrstuvwxyz234567".index(final) % 4 == 0:
        assert str(CID.parse_untrusted(text)) == text
    else:
        with pytest.raises(MalformedCID, match="not canonical"):
            CID.parse_untrusted(text)


@pytest.mark.parametrize(
    "text", [TEXT, TEXT.upper(), f"ipfs://{TEXT}", f"/ipfs/{TEXT}", f"\n {TEXT}\t", f" ipfs://{TEXT} "]
)
def test_what_people_paste(text: str) -> None:
    assert CID.parse_untrusted(text) == GOOD


@pytest.mark.parametrize(
    "text",
    [
        TEXT[:-1] + TEXT[-1].upper(),
        TEXT.capitalize(),
        "b" + TEXT[1:].upper(),
        TEXT.replace("i", "ı", 1),
        TEXT.upper().replace("S", "ſ", 1),
        TEXT.replace("k", "\u212a", 1),
        TEXT[:9] + "=" + TEXT[9:],
        TEXT + "=====",
        TEXT[:-1],
        TEXT + "a",
        TEXT + "aaaaaaaa",
        f"ipfs://{TEXT}/model.gguf",
        f"https://example.org/ipfs/{TEXT}",
        f"b{TEXT}",
        "b",
        "",
        " ",
        "ipfs://",
    ],
    ids=ascii,
)
def test_what_only_looks_like_it(text: str) -> None:
    assert text != TEXT
    with pytest.raises(MalformedCID):
        CID.parse_untrusted(text)


def other(codec: str, function: str, size: int, base: str = "base32") -> str:
    return str(AnyCID(base, 1, codec, (function, bytes(size))))


@pytest.mark.parametrize(
    ("text", "explained"),
    [
        ("QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWP63EX", "CIDv0"),
        ("12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN", "peer ID"),
        (other("raw", "sha2-256", 32), "raw and sha2-256"),
        (other("dag-pb", "sha2-256", 32), "dag-pb and sha2-256"),
        (other("dag-pb", "blake3", 32), "dag-pb and blake3"),
        (other("raw", "blake2b-256", 32), "blake2b-256"),
        (other("dag-cbor", "blake3", 32, "base58btc"), "dag-cbor and blake3"),
        (other("raw", "blake3", 32, "base16"), "raw and blake3"),
        ("model.gguf", "omni add"),
    ],
)
def test_a_mistake_is_explained(text: str, explained: str) -> None:
    with pytest.raises(MalformedCID) as caught:
        CID.parse_untrusted(text)
    assert caught.value.remedy is not None
    assert explained in caught.value.remedy
    assert "bafyr4i" in caught.value.remedy
    assert isinstance(caught.value, InputError)


def test_a_long_text_is_not_repeated() -> None:
    with pytest.raises(MalformedCID) as caught:
        CID.parse_untrusted("b" + "a" * 1_000_000)
    assert len(caught.value.diagnosis()) < 500

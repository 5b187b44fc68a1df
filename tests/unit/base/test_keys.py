"""Ed25519 keys, peer IDs and envelopes, held against RFC 8032 and libp2p."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.rsa import create_new_key_pair as create_rsa
from libp2p.crypto.secp256k1 import create_new_key_pair as create_secp256k1
from libp2p.peer.envelope import make_unsigned, pub_key_to_protobuf
from libp2p.peer.id import ID

from omnistore.errors import BadConfig, BadSignature
from omnistore.keys import PUBLIC_KEY_PREFIX, PrivateKey, PublicKey, base58, envelope_bytes

SEED = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
FIELD = 2**255 - 19
GROUP = 2**252 + 27742317777372353535851937790883648493
ENVELOPE = {"domain": "d", "payload_type": b"t", "payload": b"p"}


def test_the_key_of_rfc_8032() -> None:
    assert PrivateKey(SEED).public.raw == PUBLIC
    assert PrivateKey(SEED).seed == SEED


def test_the_signature_of_rfc_8032() -> None:
    """Its first test signs nothing: an envelope never is, so the primitive is looked at alone."""
    signature = bytes.fromhex(
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b"
    )
    assert PrivateKey(SEED)._key.sign(b"") == signature


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_seed_of_another_length(size: int) -> None:
    with pytest.raises(BadConfig, match=f"32 bytes, not {size}"):
        PrivateKey(bytes(size))


@given(st.binary(min_size=32, max_size=32))
def test_libp2p_gives_the_same_key_and_peer_id(seed: bytes) -> None:
    ours, theirs = PrivateKey(seed), create_new_key_pair(seed)
    assert ours.public.raw == theirs.public_key.to_bytes()
    assert ours.public.protobuf == theirs.public_key.serialize()
    assert ours.public.peer_id == str(ID.from_pubkey(theirs.public_key))
    assert PublicKey.from_protobuf_untrusted(theirs.public_key.serialize()) == ours.public


@given(st.text(max_size=300), st.binary(max_size=300), st.binary(max_size=20_000))
def test_libp2p_signs_the_same_bytes(domain: str, payload_type: bytes, payload: bytes) -> None:
    assert envelope_bytes(domain, payload_type, payload) == make_unsigned(domain, payload_type, payload)


def test_libp2p_verifies_our_signature_and_we_its() -> None:
    ours, theirs = PrivateKey(SEED), create_new_key_pair(SEED)
    unsigned = make_unsigned("d", b"t", b"p")
    assert theirs.public_key.verify(unsigned, ours.sign(**ENVELOPE))
    ours.public.verify_untrusted(theirs.private_key.sign(unsigned), **ENVELOPE)


def test_fields_of_an_envelope_can_not_be_moved() -> None:
    signature = PrivateKey(SEED).sign(domain="ab", payload_type=b"c", payload=b"d")
    public = PrivateKey(SEED).public
    public.verify_untrusted(signature, domain="ab", payload_type=b"c", payload=b"d")
    for domain, payload_type, payload in [("a", b"bc", b"d"), ("ab", b"cd", b""), ("abc", b"", b"d")]:
        with pytest.raises(BadSignature, match=public.peer_id):
            public.verify_untrusted(signature, domain=domain, payload_type=payload_type, payload=payload)


@given(st.integers(min_value=0, max_value=511))
def test_any_bit_of_a_signature_counts(bit: int) -> None:
    key = PrivateKey(SEED)
    flipped = int.from_bytes(key.sign(**ENVELOPE), "little") ^ 1 << bit
    with pytest.raises(BadSignature):
        key.public.verify_untrusted(flipped.to_bytes(64, "little"), **ENVELOPE)


def test_a_signature_has_one_encoding() -> None:
    """S plus the order of the group satisfies the equation, and is refused all the same."""
    key = PrivateKey(SEED)
    signature = key.sign(**ENVELOPE)
    scalar = int.from_bytes(signature[32:], "little") + GROUP
    with pytest.raises(BadSignature):
        key.public.verify_untrusted(signature[:32] + scalar.to_bytes(32, "little"), **ENVELOPE)


@pytest.mark.parametrize("size", [0, 63, 65, 1000])
def test_a_signature_of_another_length(size: int) -> None:
    with pytest.raises(BadSignature):
        PrivateKey(SEED).public.verify_untrusted(bytes(size), **ENVELOPE)


BAD_KEYS = {
    "empty": b"",
    "bare": PUBLIC,
    "RSA": create_rsa(2048).public_key.serialize(),
    "secp256k1": create_secp256k1().public_key.serialize(),
    "RSA type over an Ed25519 key": b"\x08\x00" + PUBLIC_KEY_PREFIX[2:] + PUBLIC,
    "31 bytes": b"\x08\x01\x12\x1f" + PUBLIC[:31],
    "33 bytes": b"\x08\x01\x12\x21" + PUBLIC + b"\0",
    "a byte short": PUBLIC_KEY_PREFIX + PUBLIC[:31],
    "a byte over": PUBLIC_KEY_PREFIX + PUBLIC + b"\0",
    "fields swapped": b"\x12\x20" + PUBLIC + b"\x08\x01",
    "type in two bytes": b"\x08\x81\x00" + PUBLIC_KEY_PREFIX[2:] + PUBLIC,
    "a private key": b"\x08\x01\x12\x40" + SEED + PUBLIC,
}


@pytest.mark.parametrize("fault", BAD_KEYS)
def test_a_public_key_that_is_refused(fault: str) -> None:
    with pytest.raises(BadSignature, match="Ed25519"):
        PublicKey.from_protobuf_untrusted(BAD_KEYS[fault])


def test_libp2p_reads_some_of_what_we_refuse() -> None:
    """The table above is not vacuous: these are keys, only not of our one form."""
    key = create_secp256k1().public_key
    assert pub_key_to_protobuf(key).SerializeToString() == key.serialize()


def times_eight(y: int, sign: int) -> tuple[int, int]:
    """8·P on edwards25519, P given by its encoding; (0, 1) is the neutral point."""
    d = -121665 * pow(121666, -1, FIELD) % FIELD
    square = (y * y - 1) * pow(d * y * y + 1, -1, FIELD) % FIELD
    x = pow(square, (FIELD + 3) // 8, FIELD)
    if (x * x - square) % FIELD:
        x = x * pow(2, (FIELD - 1) // 4, FIELD) % FIELD
    assert (x * x - square) % FIELD == 0, "no point has this y"
    x = x if x % 2 == sign else -x % FIELD
    for _ in range(3):
        k = d * x * x * y * y
        x, y = (
            2 * x * y * pow(1 + k, -1, FIELD) % FIELD,
            (y * y + x * x) * pow(1 - k, -1, FIELD) % FIELD,
        )
    return x, y


ORDER_EIGHT = int.from_bytes(
    bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little"
)


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("y", [0, 1, FIELD - 1, ORDER_EIGHT, FIELD - ORDER_EIGHT, FIELD, FIELD + 1])
def test_a_key_of_small_order_is_nobodys(y: int, sign: int) -> None:
    assert times_eight(y % FIELD, sign) == (0, 1)
    raw = (y | sign << 255).to_bytes(32, "little")
    with pytest.raises(BadSignature, match="small order"):
        PublicKey.from_protobuf_untrusted(PUBLIC_KEY_PREFIX + raw)


def test_a_key_of_small_order_would_sign_anything() -> None:
    """Why they are refused: the library underneath accepts them."""
    neutral = (1).to_bytes(32, "little")
    PublicKey(neutral).verify_untrusted(neutral + bytes(32), **ENVELOPE)


@pytest.mark.parametrize("y", range(FIELD, 2**255))
def test_a_point_has_one_encoding(y: int) -> None:
    with pytest.raises(BadSignature):
        PublicKey.from_protobuf_untrusted(PUBLIC_KEY_PREFIX + y.to_bytes(32, "little"))


def test_nothing_shows_the_secret() -> None:
    key = PrivateKey(SEED)
    shown = f"{key!r} {key} {[key]} {key.public!r}"
    assert key.public.peer_id in shown
    for secret in (SEED.hex(), repr(SEED)[2:-1], str(SEED), SEED.hex().upper()):
        assert secret not in shown


@given(st.binary(max_size=60))
def test_base58_can_be_read_back(data: bytes) -> None:
    alphabet = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    number = 0
    for letter in base58(data):
        number = number * 58 + alphabet.index(letter)
    zeros = len(data) - len(data.lstrip(b"\0"))
    assert base58(data).startswith("1" * zeros)
    assert number == int.from_bytes(data, "big")

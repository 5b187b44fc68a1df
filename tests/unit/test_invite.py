"""Invitations: what is refused, and what a membership keeps."""

from __future__ import annotations

import base64
import stat
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from omnistore import dagcbor
from omnistore.errors import BadConfig, InputError
from omnistore.invite import MAX_TOKEN, PREFIX, invite, token_untrusted
from omnistore.keys import PrivateKey
from omnistore.membership import FILE_NAME, found, join, leave, membership

KEY, OTHER = PrivateKey(bytes(31) + b"\x01"), PrivateKey(bytes(31) + b"\x02")
ADDR = f"/ip4/192.0.2.1/tcp/4141/p2p/{KEY.public.peer_id}"
GOOD = invite(KEY, b"s" * 32, (ADDR,), 2000)
TOKEN = GOOD.encode()


def body(token: str) -> bytes:
    letters = token[len(PREFIX) :].upper()
    return base64.b32decode(letters + "=" * (-len(letters) % 8))[:-4]


def token_of(data: bytes, checksum: bytes | None = None) -> str:
    text = base64.b32encode(data + (blake3(data).digest()[:4] if checksum is None else checksum))
    return PREFIX + text.decode().rstrip("=").lower()


NODE: dict[str, Any] = dict(dagcbor.decode_untrusted(body(TOKEN), limit=MAX_TOKEN))  # type: ignore[arg-type]


def changed(**fields: Any) -> str:
    return token_of(dagcbor.encode(NODE | {name.replace("_", "-"): value for name, value in fields.items()}))


HOSTILE: dict[str, str] = {
    "empty": "",
    "another prefix": "omniswarm2" + TOKEN[len(PREFIX) :],
    "the prefix alone": PREFIX,
    "not base32": PREFIX + "!" * 40,
    "letters outside ASCII": PREFIX + "ä" * 40,
    "cut short": TOKEN[:-1],
    "one letter more": TOKEN + "a",
    "one letter changed": TOKEN[:40] + ("a" if TOKEN[40] != "a" else "b") + TOKEN[41:],
    "a wrong checksum": token_of(body(TOKEN), b"\0\0\0\0"),
    "too long": PREFIX + "a" * (3 * MAX_TOKEN),
    "not cbor": token_of(b"\xff\xff"),
    "trailing bytes": token_of(body(TOKEN) + b"\0"),
    "a list": token_of(dagcbor.encode([])),
    "another version": changed(omni=2),
    "a version that is true": changed(omni=True),
    "a field more": changed(more=1),
    "a field missing": token_of(dagcbor.encode({k: v for k, v in NODE.items() if k != "psk"})),
    "another key": changed(psk=b"t" * 32),
    "a short key": changed(psk=b"s" * 31),
    "a key as text": changed(psk="s" * 32),
    "other addresses": changed(bootstrap=[]),
    "an address that is none": changed(bootstrap=[1]),
    "a long address": changed(bootstrap=["/" * 257]),
    "many addresses": changed(bootstrap=[ADDR] * 17),
    "addresses as text": changed(bootstrap=ADDR),
    "a later expiry": changed(not_after=3000),
    "no expiry": changed(not_after=None),
    "a negative expiry": changed(not_after=-1),
    "an expiry that is true": changed(not_after=True),
    "another inviter": changed(inviter=OTHER.public.protobuf),
    "an inviter as text": changed(inviter=KEY.public.peer_id),
    "an inviter of small order": changed(inviter=OTHER.public.protobuf[:4] + bytes(32)),
    "a short signature": changed(signature=GOOD.signature[:-1]),
    "a flipped signature": changed(signature=GOOD.signature[:-1] + bytes((GOOD.signature[-1] ^ 1,))),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_bad_token_is_refused(fault: str) -> None:
    with pytest.raises(BadConfig):
        token_untrusted(HOSTILE[fault], now=1000)


def test_a_token_comes_back_also_wrapped_and_in_capitals() -> None:
    assert token_untrusted(TOKEN, now=2000) == GOOD
    wrapped = "\n".join(TOKEN[i : i + 60] for i in range(0, len(TOKEN), 60))
    assert token_untrusted(f"  {wrapped}\n", now=1) == GOOD
    assert token_untrusted(TOKEN.upper(), now=1) == GOOD


def test_an_expired_token_is_refused() -> None:
    with pytest.raises(BadConfig, match="expired"):
        token_untrusted(TOKEN, now=2001)


def test_no_representation_shows_the_secret(home: Path) -> None:
    assert "ssss" not in repr(GOOD)
    assert "ssss" not in repr(join(home, GOOD))


@given(st.text(max_size=200))
def test_noise_is_refused_in_one_way(text: str) -> None:
    for token in (text, PREFIX + text):
        with pytest.raises(BadConfig):
            token_untrusted(token, now=0)


@given(st.data())
def test_a_mistake_in_copying_is_noticed(data: st.DataObject) -> None:
    place = data.draw(st.integers(len(PREFIX), len(TOKEN) - 1))
    letter = data.draw(
        st.sampled_from("abcdefghijklmnopqrstuvwxyz234567").filter(lambda x: x != TOKEN[place])
    )
    with pytest.raises(BadConfig):
        token_untrusted(TOKEN[:place] + letter + TOKEN[place + 1 :], now=0)


@pytest.mark.parametrize(
    "psk, addrs, until", [(b"", (), 1), (b"s" * 32, (ADDR,) * 17, 1), (b"s" * 32, (), 0)]
)
def test_what_can_not_be_in_one(psk: bytes, addrs: tuple[str, ...], until: int) -> None:
    with pytest.raises(InputError):
        invite(KEY, psk, addrs, until)


def test_a_home_is_in_one_swarm_until_it_leaves(home: Path) -> None:
    assert membership(home) is None
    assert not leave(home)
    member = join(home, GOOD)
    assert (member.psk, member.bootstrap, member.inviter) == (b"s" * 32, (ADDR,), KEY.public.peer_id)
    assert membership(home) == member
    assert stat.S_IMODE((home / FILE_NAME).stat().st_mode) == 0o600
    # A second invitation to the same swarm adds its addresses.
    other = f"/ip4/192.0.2.2/tcp/4141/p2p/{OTHER.public.peer_id}"
    assert join(home, invite(OTHER, b"s" * 32, (other, ADDR), 2000)).bootstrap == (ADDR, other)
    with pytest.raises(BadConfig, match="another private swarm"):
        join(home, invite(OTHER, b"t" * 32, (), 2000))
    assert leave(home)
    assert membership(home) is None


def test_a_swarm_is_made_once(home: Path) -> None:
    first = found(home)
    assert len(first.psk) == 32 and first.inviter is None
    assert found(home) == first == membership(home)


def test_an_invitation_with_an_address_nobody_can_dial_is_refused(home: Path) -> None:
    with pytest.raises(BadConfig):
        join(home, invite(KEY, b"s" * 32, ("/ip4/0.0.0.0/tcp/1",), 2000))
    assert membership(home) is None


def test_a_secret_that_others_can_read_is_refused(home: Path) -> None:
    found(home)
    (home / FILE_NAME).chmod(0o640)
    with pytest.raises(BadConfig, match="can be read or written by others"):
        membership(home)


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"psk": "00"}', '{"psk": "zz", "bootstrap": [], "inviter": null}',
             '{"psk": "%s", "bootstrap": [1], "inviter": null}' % ("00" * 32)],
)  # fmt: skip
def test_a_damaged_file_is_named(home: Path, text: str) -> None:
    home.mkdir()
    (home / FILE_NAME).touch(0o600)
    (home / FILE_NAME).write_text(text)
    with pytest.raises(BadConfig, match=r"swarm\.json is damaged"):
        membership(home)

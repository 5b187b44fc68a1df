"""Holding a `Block` means its digest was checked."""

from __future__ import annotations

import dataclasses

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from omnistore.block import BLOCK_SIZE, MAX_BLOCK_SIZE, Block
from omnistore.cid import CID, DAG_CBOR, RAW
from omnistore.errors import DigestMismatch, IntegrityError


@given(st.binary(max_size=5000))
def test_it_is_named_by_its_bytes(data: bytes) -> None:
    assert Block.raw(data).cid == CID.of_digest(RAW, blake3(data).digest())
    assert Block.node(data).cid == CID.of_digest(DAG_CBOR, blake3(data).digest())
    for cid in (Block.raw(data).cid, Block.node(data).cid):
        block = Block.verify_untrusted(cid, memoryview(data))
        assert (block.cid, bytes(block.data), len(block)) == (cid, data, len(data))


@given(st.binary(min_size=1, max_size=200), st.integers(min_value=0))
def test_any_other_bit_is_refused(data: bytes, bit: int) -> None:
    altered = bytearray(data)
    altered[bit // 8 % len(data)] ^= 1 << bit % 8
    with pytest.raises(DigestMismatch, match=str(Block.raw(data).cid)):
        Block.verify_untrusted(Block.raw(data).cid, bytes(altered))


@pytest.mark.parametrize("data", [b"", b"om", b"omni\0"])
def test_other_lengths_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        Block.verify_untrusted(Block.raw(b"omni").cid, data)


def test_the_largest_block() -> None:
    assert BLOCK_SIZE < MAX_BLOCK_SIZE
    data = bytes(MAX_BLOCK_SIZE)
    assert len(Block.verify_untrusted(Block.raw(data).cid, data)) == MAX_BLOCK_SIZE


def test_an_oversize_block_is_refused_even_if_true() -> None:
    data = bytes(MAX_BLOCK_SIZE + 1)
    with pytest.raises(DigestMismatch, match="at most"):
        Block.verify_untrusted(Block.raw(data).cid, data)


@pytest.mark.parametrize("proof", [None, True, object()])
def test_it_can_not_be_made_without_checking(proof: object) -> None:
    with pytest.raises(TypeError, match="verify_untrusted"):
        Block(Block.raw(b"x").cid, b"y", proof)


def test_it_can_not_be_altered() -> None:
    block = Block.raw(b"x")
    with pytest.raises(ValueError, match="_proof"):
        dataclasses.replace(block, data=b"y")
    with pytest.raises(dataclasses.FrozenInstanceError):
        block.data = b"y"  # type: ignore[misc]


def test_equality_ignores_how_it_was_made() -> None:
    assert Block.raw(b"x") == Block.verify_untrusted(Block.raw(b"x").cid, b"x")
    assert Block.raw(b"x") != Block.node(b"x")

"""Which record of a name counts: the same for everybody, and never an old one."""

from __future__ import annotations

from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from omnistore.cid import CID, DAG_CBOR
from omnistore.dht.names import NameRecord, record_untrusted, select, sign
from omnistore.errors import BadNameRecord
from omnistore.keys import PrivateKey

KEY = PrivateKey(bytes(32))
NOW = 1000.0


@st.composite
def records(draw: st.DrawFn) -> NameRecord:
    value = CID.of_digest(DAG_CBOR, blake3(bytes((draw(st.integers(0, 3)),))).digest())
    return sign(KEY, "name", value, draw(st.integers(1, 5)), draw(st.sampled_from((500, 1500, 2500))))


@settings(deadline=None)
@given(st.lists(records(), min_size=1, max_size=6), st.none() | records(), st.randoms())
def test_selection(found: list[NameRecord], seen: NameRecord | None, rng: object) -> None:
    def outcome(order: list[NameRecord]) -> object:
        try:
            return select(order, seen, NOW)
        except BadNameRecord as error:
            return error.message

    result = outcome(found)
    highest = max(record.sequence for record in found)
    shuffled = list(found)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    # In whatever order, and however often, the answers come.
    assert outcome(shuffled) == result == outcome(found + shuffled)
    if seen is not None and seen.sequence > highest:
        assert isinstance(result, str) and "was seen before" in result
        return
    candidates = [*found, seen] if seen else found
    best = [record for record in candidates if record.sequence == highest]
    if isinstance(result, str):
        assert "expired" in result and any(record.not_after < NOW for record in best)
        return
    choice = select(found, seen, NOW)
    assert choice.record in best and choice.record.not_after >= NOW
    assert choice.forked == (len({record.value for record in best}) > 1)
    # Seen from then on, nothing older is taken, and the same answers give the same.
    assert select(found, choice.record, NOW).record == choice.record


@settings(deadline=None)
@given(records())
def test_a_record_survives_its_bytes(record: NameRecord) -> None:
    assert record_untrusted(record.encode()) == record


@given(st.binary(max_size=600))
def test_noise_is_refused_in_one_way(data: bytes) -> None:
    try:
        record_untrusted(data)
    except BadNameRecord:
        return
    raise AssertionError("noise was taken for a record")

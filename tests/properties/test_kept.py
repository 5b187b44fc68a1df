"""What a lender keeps for its peers against a plain model, and that no peer ever meets another's."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from omninfer.kept import KEPT_SECONDS, Kept, KeptPrompts
from omninfer.labels import Labels

PER_PEER = 100

labels = st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=4).map(tuple)
peers = st.sampled_from(["anna", "bob"])
stages = st.sampled_from(["first", "last"])
actions = st.one_of(
    st.tuples(st.just("add"), peers, stages, labels, st.integers(1, 120)),
    st.tuples(st.just("recall"), peers, stages, labels, st.just(0)),
    st.tuples(st.just("wait"), peers, stages, labels, st.integers(1, int(KEPT_SECONDS))),
)


def shared(a: tuple[bytes, ...], b: tuple[bytes, ...]) -> int:
    return next((n for n in range(min(len(a), len(b))) if a[n] != b[n]), min(len(a), len(b)))


@settings(max_examples=300, deadline=None)
@given(st.lists(actions, max_size=20))
def test_kept_prompts_are_those_of_a_plain_list(
    asked: list[tuple[str, str, str, tuple[bytes, ...], int]],
) -> None:
    table: KeptPrompts[str] = KeptPrompts(PER_PEER)
    model: dict[Kept[str], float] = {}
    now = 0.0
    for slot, (action, peer, stage, words, number) in enumerate(asked):
        now += 1
        if action == "add":
            new = Kept(peer, stage, slot, words, number)
            gone = set(table.add(new, now))
            assert gone <= {*model, new}
            covered = {
                old
                for old in model
                if (old.peer, old.stage) == (peer, stage) and words[: len(old.labels)] == old.labels
            }
            before = model
            model = {old: used for old, used in {**model, new: now}.items() if old not in gone}
            assert gone == {new} if number > PER_PEER else covered <= gone
            own = {old: used for old, used in model.items() if old.peer == peer}
            assert sum(old.bytes for old in own) <= PER_PEER
            others = [one for one in gone - covered if one != new]
            assert all(one.peer == peer for one in others), "nobody pays for another peer's prompts"
            if others:  # the least recently used went first, and the last to go had to
                last = max(others, key=lambda one: before[one])
                assert sum(old.bytes for old in own) + last.bytes > PER_PEER
                assert all(before[last] < used for old, used in own.items() if old != new)
        elif action == "recall":
            own = {old: used for old, used in model.items() if (old.peer, old.stage) == (peer, stage)}
            best = max((shared(old.labels, words) for old in own), default=0)
            found = table.recall(peer, stage, words, now)
            assert (found is None) == (best == 0)
            if found is not None:
                assert found[0] in own and found[1] == best == shared(found[0].labels, words)
                model[found[0]] = now
        else:
            now += number
            gone = set(table.expired(now))
            assert gone == {old for old, used in model.items() if now - used > KEPT_SECONDS}
            model = {old: used for old, used in model.items() if old not in gone}
        assert {kept: used for used, kept in table.by_age()} == model
        assert [used for used, _ in table.by_age()] == sorted(model.values())
        for one in ("first", "last"):
            assert table.held(one) == sum(old.bytes for old in model if old.stage == one)


def test_nothing_is_kept_where_nothing_is_to_be() -> None:
    table: KeptPrompts[str] = KeptPrompts(0)
    one = Kept("anna", "first", 0, (b"a",), 1)
    assert table.add(one, 0.0) == [one]
    assert table.recall("anna", "first", (b"a",), 1.0) is None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=260), st.integers(0, 260))
def test_labels_name_beginnings_and_nothing_else(tokens: list[int], cut: int) -> None:
    mine = Labels(b"secret")
    whole = mine.of(tokens)
    assert len(whole) == len(tokens) // 64 and all(len(label) == 16 for label in whole)
    changed = [*tokens[:cut], 9, *tokens[cut + 1 :]]
    if cut < len(tokens):
        assert mine.of(changed)[: cut // 64] == whole[: cut // 64]
        assert not set(mine.of(changed)[cut // 64 :]) & set(whole)
    assert not set(Labels(b"another").of(tokens)) & set(whole)

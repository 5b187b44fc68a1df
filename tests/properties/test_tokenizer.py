"""Tokenizers on arbitrary text: nothing is lost, and streams say what `decode` says."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omninfer.chat import ChatTemplate
from omninfer.testing.tiny_vocab import tiny_bpe, tiny_spm
from omninfer.tokenizer import Tokenizer
from omninfer.tokenizer.spm import SPACE
from omnistore.errors import MalformedGGUF, UnsupportedModel

TOKENIZERS = {
    "spm": Tokenizer.from_metadata_untrusted(tiny_spm()),
    "bpe": Tokenizer.from_metadata_untrusted(tiny_bpe()),
}
# Texts that merge, beside texts that don't.
texts = st.one_of(st.text(), st.text(alphabet="then <|im_end|>s/é\n"))


@pytest.mark.parametrize("family", TOKENIZERS)
@given(text=texts)
def test_round_trip(family: str, text: str) -> None:
    tokenizer = TOKENIZERS[family]
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    expected = " " + text if family == "spm" and text else text
    assert tokenizer.decode(ids) == (expected.replace(SPACE, " ") if family == "spm" else expected)
    assert not tokenizer.eog.intersection(ids)


@pytest.mark.parametrize("family", TOKENIZERS)
@given(data=st.data())
def test_a_stream_says_what_decode_says(family: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[family]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    special = data.draw(st.booleans())
    stream = tokenizer.stream(special=special)
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids, special=special)


def merged_slowly(symbols: list[str], scores: dict[str, float]) -> list[str]:
    """The definition: join the best pair, the leftmost of equals, until there is none."""
    while True:
        unions = [(scores.get(a + b), i) for i, (a, b) in enumerate(pairwise(symbols))]
        possible = [(-score, i) for score, i in unions if score is not None]
        if not possible:
            return symbols
        _, i = min(possible)
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


@given(
    words=st.lists(st.text(alphabet="ab", min_size=2, max_size=5), min_size=1, max_size=8),
    text=st.text(alphabet="ab", max_size=30),
    ranks=st.randoms(use_true_random=False),
)
def test_merging_by_score_is_its_definition(words: list[str], text: str, ranks: object) -> None:
    metadata = tiny_spm(words, **{"tokenizer.ggml.add_space_prefix": False})
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]  # type: ignore[assignment]
    scores = [float(ranks.randint(0, 3)) for _ in tokens]  # type: ignore[attr-defined]
    tokenizer = Tokenizer.from_metadata_untrusted(metadata | {"tokenizer.ggml.scores": scores})
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert [tokens[id_] for id_ in ids] == merged_slowly(list(text), dict(zip(tokens, scores, strict=True)))


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
values = st.one_of(
    scalars, st.lists(scalars, max_size=3), st.lists(st.lists(scalars, max_size=2), max_size=2)
)


@pytest.mark.parametrize("metadata", [tiny_spm(), tiny_bpe()], ids=["spm", "bpe"])
@given(data=st.data())
def test_any_metadata_is_understood_or_refused(metadata: dict[str, object], data: st.DataObject) -> None:
    keys = [
        *metadata,
        "tokenizer.ggml.add_bos_token",
        "tokenizer.ggml.eot_token_id",
        "tokenizer.chat_template",
    ]
    changed = metadata | data.draw(st.dictionaries(st.sampled_from(keys), values, min_size=1, max_size=3))
    long = data.draw(st.sampled_from(keys))
    if isinstance(metadata.get(long), list) and data.draw(st.booleans()):  # right in length, wrong in content
        junk = data.draw(st.lists(scalars, min_size=1, max_size=4))
        changed[long] = (junk * 1000)[: len(metadata[long])]  # type: ignore[arg-type]
    try:
        tokenizer = Tokenizer.from_metadata_untrusted(changed)
    except (MalformedGGUF, UnsupportedModel):
        pass
    else:
        ids = tokenizer.encode("the<|im_end|>", add_special=True, parse_special=True)
        assert all(0 <= id_ < tokenizer.vocab_size for id_ in [*ids, *tokenizer.eog])
        tokenizer.decode(range(tokenizer.vocab_size))
    with suppress(MalformedGGUF, UnsupportedModel):
        ChatTemplate.from_metadata_untrusted(changed)

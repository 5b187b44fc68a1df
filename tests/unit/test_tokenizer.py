"""Tokenizers: the rules one by one, and vocabularies written to do harm."""

from __future__ import annotations

import logging
import re
import unicodedata
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from omninfer.testing.tiny_vocab import CONTROL, NORMAL, USER_DEFINED, tiny_bpe, tiny_spm
from omninfer.tokenizer import Tokenizer
from omninfer.tokenizer.pretokenizers import PRE_TOKENIZERS
from omnistore.errors import InputError, MalformedGGUF, UnsupportedModel


def key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def spm(**changes: object) -> Tokenizer:
    return Tokenizer.from_metadata_untrusted(tiny_spm() | {key(k): v for k, v in changes.items()})


def bpe(special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"), **changes: object) -> Tokenizer:
    return Tokenizer.from_metadata_untrusted(
        tiny_bpe(special=special) | {key(k): v for k, v in changes.items()}
    )


def pieces(
    tokenizer: Tokenizer, text: str, *, add_special: bool = False, parse_special: bool = False
) -> list[str]:
    ids = tokenizer.encode(text, add_special=add_special, parse_special=parse_special)
    return [tokenizer.decode([id_], special=True) for id_ in ids]


# SentencePiece


def test_the_highest_score_merges_first() -> None:
    assert pieces(spm(), "then the") == [" then", " the"]
    words = ["ab", "bc", "abc"]
    high_ab = Tokenizer.from_metadata_untrusted(tiny_spm(["ab", "bc"]))
    high_bc = Tokenizer.from_metadata_untrusted(tiny_spm(["bc", "ab"]))
    assert pieces(high_ab, "abc")[-2:] == ["ab", "c"]
    assert pieces(high_bc, "abc")[-2:] == ["a", "bc"]
    assert pieces(Tokenizer.from_metadata_untrusted(tiny_spm(words)), "abc")[-1] == "abc"


def test_equal_scores_merge_from_the_left() -> None:
    metadata = tiny_spm(["aa"])
    metadata[key("scores")] = [0.0] * len(metadata[key("tokens")])  # type: ignore[arg-type]
    assert pieces(Tokenizer.from_metadata_untrusted(metadata), "aaa")[1:] == ["aa", "a"]


def test_characters_outside_the_vocabulary_become_bytes() -> None:
    tokenizer = spm()
    ids = tokenizer.encode("é", add_special=False, parse_special=False)
    assert ids[-2:] == [3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(ids) == " é"


def test_without_byte_tokens_unknown_stands_in() -> None:
    metadata = tiny_spm()
    metadata[key("tokens")] = [text.replace("<0xC3>", "<gone>") for text in metadata[key("tokens")]]  # type: ignore[attr-defined]
    tokenizer = Tokenizer.from_metadata_untrusted(metadata)
    assert tokenizer.encode("é", add_special=False, parse_special=False)[-2:] == [0, 3 + 0xA9]


def test_the_leading_space_and_bos_follow_the_metadata() -> None:
    assert pieces(spm(), "a", add_special=True) == ["<s>", " ", "a"]
    assert pieces(spm(add_bos_token=False), "a", add_special=True) == [" ", "a"]
    assert pieces(spm(add_eos_token=True), "a", add_special=True) == ["<s>", " ", "a", "</s>"]
    assert pieces(spm(add_space_prefix=False), "a", add_special=True) == ["<s>", "a"]
    assert pieces(spm(), "", add_special=True) == ["<s>"]
    assert pieces(spm(), "") == []


def test_a_space_goes_before_text_after_a_special_token() -> None:
    assert pieces(spm(), "a</s>b", parse_special=True) == [" ", "a", "</s>", " ", "b"]


def test_text_never_merges_into_a_control_token() -> None:
    metadata = tiny_spm(["</s", "s>"])
    tokenizer = Tokenizer.from_metadata_untrusted(metadata)
    assert tokenizer.eos not in tokenizer.encode("</s>", add_special=False, parse_special=False)
    assert tokenizer.encode("</s>", add_special=False, parse_special=True) == [tokenizer.eos]


def test_a_long_text_is_not_quadratic() -> None:
    tokenizer = spm()
    assert len(tokenizer.encode("a" * 200_000, add_special=False, parse_special=False)) == 200_001


# Byte-level BPE


def test_merges_stay_within_words() -> None:
    assert pieces(bpe(), "he then the") == ["he", " then", " the"]
    assert pieces(bpe(), "hethe") == ["he", "t", "he"]


def test_all_bytes_round_trip() -> None:
    text = "".join(map(chr, [*range(0x250), 0x1F999, 0x4E00]))
    tokenizer = bpe()
    assert tokenizer.decode(tokenizer.encode(text, add_special=False, parse_special=False)) == text


def test_user_defined_tokens_are_found_always_and_control_tokens_when_asked() -> None:
    metadata = tiny_bpe(special=("<a>", "<ab>", "<|end|>"))
    metadata[key("token_type")] = [NORMAL] * (len(metadata[key("tokens")]) - 3) + [
        USER_DEFINED,
        CONTROL,
        CONTROL,
    ]  # type: ignore[arg-type]
    tokenizer = Tokenizer.from_metadata_untrusted(metadata)
    assert pieces(tokenizer, "x<a>y<ab>") == ["x", "<a>", "y", "<", "a", "b", ">"]
    assert pieces(tokenizer, "x<a>y<ab>", parse_special=True) == ["x", "<a>", "y", "<ab>"]


def test_a_longer_special_token_wins() -> None:
    tokenizer = bpe(special=("<|x", "<|x|>"))
    assert pieces(tokenizer, "<|x|><|x", parse_special=True) == ["<|x|>", "<|x"]


def test_phi3_drops_whitespace_after_special_tokens() -> None:
    metadata = tiny_bpe(**{"general.name": "Phi-3-mini"})
    tokenizer = Tokenizer.from_metadata_untrusted(metadata)
    assert pieces(tokenizer, "<|im_start|> \n a", parse_special=True) == ["<|im_start|>", "a"]


def test_bos_is_the_default_of_llama3_and_not_of_gpt2() -> None:
    special = ("<|begin_of_text|>", "<|eot_id|>")
    bos = len(tiny_bpe(special=special)[key("tokens")]) - 2  # type: ignore[arg-type]
    assert pieces(bpe(special, pre="llama-bpe", bos_token_id=bos), "a", add_special=True)[0] == special[0]
    assert pieces(bpe(special, pre="gpt-2", bos_token_id=bos), "a", add_special=True) == ["a"]
    assert pieces(bpe(special, pre="llama-bpe"), "a", add_special=True) == ["a"]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "I'll 12345  go", ["I", "'ll", " 12345", " ", " go"]),
        ("llama-bpe", "I'LL 12345  go\n\n x", ["I", "'LL", " ", "123", "45", " ", " go", "\n\n", " x"]),
        ("qwen2", "a12 b", ["a", "1", "2", " b"]),
        ("starcoder", "a12 b", ["a", "1", "2", " b"]),
        ("falcon", "a,b 1234", ["a", ",", "b", " ", "123", "4"]),
        ("deepseek-llm", "ab 12中文,", ["ab", " ", "12", "中文", ","]),
        ("deepseek-coder", "ab 12中", ["ab", " ", "1", "2", "中"]),
        ("deepseek-v3", "ab1234かな.x", ["ab", "123", "4", "かな", ".x"]),
        ("tekken", "aBc12", ["a", "Bc", "1", "2"]),
        ("gpt-4o", "HTTPServer's 1234", ["HTTPServer's", " ", "123", "4"]),
        ("default", "a12345", ["a", "123", "45"]),
        ("bloom", "a.b c", ["a", ".", "b", " c"]),
        ("viking", "a1b", ["a", "1", "b"]),
    ],
)
def test_pre_tokenizers_cut_where_their_models_do(pre: str, text: str, words: list[str]) -> None:
    cut = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre].patterns]
    )
    assert [word for word, _ in cut.pre_tokenize_str(text)] == words


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        # Letters beyond ASCII have case, and marks go with their letters: llama.cpp knows neither here.
        ("gpt-4o", "\u00e9cole\u00c9cole cafe\u0301s", ["\u00e9cole", "\u00c9cole", " cafe\u0301s"]),
        ("tekken", "\u00e9cole\u00c9cole cafe\u0301s", ["\u00e9cole", "\u00c9cole", " cafe\u0301s"]),
        ("kimi-k2", "ab\u4e2d\u6587Cd 1234", ["ab", "\u4e2d\u6587", "Cd", " ", "123", "4"]),
        ("deepseek-llm", "\u2003em", ["\u2003", "em"]),  # its range for CJK begins at U+0800
    ],
)
def test_the_models_own_expressions_stand(pre: str, text: str, words: list[str]) -> None:
    test_pre_tokenizers_cut_where_their_models_do(pre, text, words)


@pytest.mark.parametrize(
    "pre", sorted({entry.patterns: name for name, entry in PRE_TOKENIZERS.items()}.values())
)
def test_no_pre_tokenizer_is_quadratic(pre: str) -> None:
    tokenizer = bpe(pre=pre, bos_token_id=0)
    for letter in (" ", "\n", "7", "a", "A", "\u4e2d", "!", "\u0301", "'s", " a", "\n "):
        text = letter * 5_000
        assert tokenizer.decode(tokenizer.encode(text, add_special=False, parse_special=False)) == text


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_every_character(pre: str) -> None:
    text = "I'LL go: 12345 ſ\u2029\t\n  中文かな한 e\u0301 🦙 <|x|> ÀÉ ǅ … ()`~"
    tokenizer = bpe(pre=pre, bos_token_id=0)
    assert tokenizer.decode(tokenizer.encode(text, add_special=False, parse_special=False)) == text


def test_the_cased_letters_of_deepseek_are_cased() -> None:
    pattern = re.compile(PRE_TOKENIZERS["deepseek-llm"].patterns[1].removeprefix(r"\s?"))
    members = [chr(point) for point in range(0x20000) if pattern.fullmatch(chr(point))]
    assert len(members) > 1900
    assert {unicodedata.category(member) for member in members} == {"Lu", "Ll", "Lt"}


@pytest.mark.parametrize("pre", ["brand-new", None])
def test_an_unknown_pre_tokenizer_is_a_warning(pre: str | None, caplog: pytest.LogCaptureFixture) -> None:
    metadata = tiny_bpe()
    del metadata[key("pre")]
    with caplog.at_level(logging.WARNING):
        Tokenizer.from_metadata_untrusted(metadata | ({key("pre"): pre} if pre else {}))
    assert "pre-tokenizer" in caplog.text
    assert pre is None or pre in caplog.text


def test_merges_of_unknown_tokens_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tokenizer = bpe(merges=["h e", "q q", "zz z", "h e"])
    assert "3 of 4 merges" in caplog.text
    assert pieces(tokenizer, "heqq") == ["he", "q", "q"]


# Special ids


def test_ends_of_generation() -> None:
    tokenizer = bpe(("<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|file_sep|>"))
    names = {tokenizer.decode([id_], special=True) for id_ in tokenizer.eog}
    assert names == {"<|im_end|>", "<|return|>", "<|call|>", "<|file_sep|>"}  # there <|end|> ends a part
    assert {bpe(("<|end|>",)).decode([id_], special=True) for id_ in bpe(("<|end|>",)).eog} == {"<|end|>"}


def test_ids_named_by_the_metadata_end_too() -> None:
    tokenizer = spm(eot_token_id=260, eom_token_id=261, eos_token_id=262)
    assert tokenizer.eog == {2, 260, 261, 262}
    assert tokenizer.eos == 262


def test_the_html_tag_is_no_end_to_a_model_that_has_another() -> None:
    metadata = tiny_bpe(special=("</s>", "<|im_end|>"))
    count = len(metadata[key("tokens")])  # type: ignore[arg-type]
    metadata[key("token_type")] = [NORMAL] * (count - 1) + [CONTROL]
    assert Tokenizer.from_metadata_untrusted(metadata).eog == {count - 1}


def test_a_special_id_outside_the_vocabulary_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = spm(bos_token_id=10**9)
    assert tokenizer.bos == 1
    assert "1000000000" in caplog.text


# Streams and hostile input


def test_a_stream_holds_back_a_split_character() -> None:
    tokenizer = bpe()
    ids = tokenizer.encode("é🦙", add_special=False, parse_special=False)
    stream = tokenizer.stream()
    assert [stream.push(id_) for id_ in ids] == ["", "é", "", "", "", "🦙"]
    assert stream.flush() == ""
    stream.push(ids[0])
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


@pytest.mark.parametrize("id_", [-1, 10**6])
def test_decoding_an_id_outside_the_vocabulary(id_: int) -> None:
    with pytest.raises(InputError, match=str(id_)):
        spm().decode([id_])
    with pytest.raises(InputError, match=str(id_)):
        spm().stream().push(id_)


def test_text_that_is_no_unicode_or_too_long() -> None:
    with pytest.raises(InputError, match=r"UTF-8 at character 1$"):
        spm().encode("a\ud800", add_special=False, parse_special=False)
    with pytest.raises(InputError, match="characters"):
        spm().encode("a" * ((1 << 24) + 1), add_special=False, parse_special=False)


BAD_SPM: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"tokens": None}, "tokens is missing"),
    "empty": ({"tokens": []}, "missing or empty"),
    "tokens are a string": ({"tokens": "abc"}, "not an array"),
    "tokens are numbers": ({"tokens": [1, 2]}, "other than strings"),
    "a surrogate": ({"tokens": ["a", "\ud800"]}, "surrogate"),
    "twice the same": ({"tokens": ["a", "b", "a"]}, "tokens 0 and 2"),
    "no scores": ({"scores": None}, "scores"),
    "few scores": ({"scores": [1.0]}, "1 elements"),
    "scores are strings": ({"scores": ["x"] * 2000}, "other than numbers"),
    "scores are lists": ({"scores": [[1.0]] * 2000}, "other than numbers"),
    "scores hold a list": ({"scores": [1.0, [2.0]] * 1000}, "other than numbers"),
    "a score is no number": ({"scores": [0.0, float("nan")] * 1000}, "score of token 1"),
    "few kinds": ({"token_type": [1]}, "1 elements"),
    "kinds are floats": ({"token_type": [1.5] * 2000}, "other than integers"),
    "bos is a string": ({"bos_token_id": "1"}, "bos_token_id is str"),
    "bos is a flag": ({"bos_token_id": True}, "bos_token_id is bool"),
    "add_bos is a number": ({"add_bos_token": 1}, "not a boolean"),
    "model is a number": ({"model": 3}, "not a string"),
    "no model": ({"model": None}, "no tokenizer.ggml.model"),
}


@pytest.mark.parametrize("fault", BAD_SPM)
def test_bad_sentencepiece(fault: str) -> None:
    changes, message = BAD_SPM[fault]
    with pytest.raises(MalformedGGUF, match=message):
        spm(**changes)


def test_neither_bytes_nor_unknown() -> None:
    metadata = {
        key("model"): "llama",
        key("tokens"): ["a"],
        key("scores"): [0.0],
        key("add_bos_token"): False,
    }
    tokenizer = Tokenizer.from_metadata_untrusted(metadata)  # id 0 is the unknown token by default
    assert tokenizer.encode("é", add_special=False, parse_special=False) == [0] * 5


BAD_BPE: dict[str, tuple[dict[str, Any], str]] = {
    "no merges": ({"merges": None}, "merges"),
    "merges are numbers": ({"merges": [1]}, "other than strings"),
    "a merge of one": ({"merges": ["he"]}, "merge 0"),
    "an empty merge": ({"merges": [""]}, "merge 0"),
    "a merge with nothing": ({"merges": ["h e", "h "]}, "merge 1"),
    "add_bos without bos": ({"add_bos_token": True}, "bos_token_id"),
    "add_eos without eos": ({"add_eos_token": True}, "eos_token_id"),
}


@pytest.mark.parametrize("fault", BAD_BPE)
def test_bad_bpe(fault: str) -> None:
    changes, message = BAD_BPE[fault]
    with pytest.raises(MalformedGGUF, match=message):
        bpe(**changes)


@pytest.mark.parametrize(
    ("model", "kind"),
    [("bert", "WPM"), ("t5", "UGM"), ("rwkv", "RWKV"), ("plamo2", "PLaMo"), ("x" * 5000, "x")],
)
def test_other_families_are_unsupported(model: str, kind: str) -> None:
    with pytest.raises(UnsupportedModel, match=model[:40]) as caught:
        spm(model=model)
    assert kind in caught.value.message


def test_odd_but_harmless_vocabularies() -> None:
    huge = spm(scores=[1e308, float("inf"), -float("inf")] * 500)
    text = "then the hen"
    assert huge.decode(huge.encode(text, add_special=False, parse_special=False)) == " " + text
    tokens = [*tiny_spm()[key("tokens")], "", "x" * 100_000]  # type: ignore[misc]
    odd = spm(tokens=tokens, scores=[0.0] * len(tokens), token_type=[250] * len(tokens))
    assert odd.decode(odd.encode(text, add_special=False, parse_special=False)) == ""  # no kind is shown

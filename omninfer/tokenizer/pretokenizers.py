r"""How each BPE model cuts text into words before merging: `tokenizer.ggml.pre` to regular expressions.

The expressions of one entry apply one after the other; each cuts the pieces that the one before
left into its matches and what lies between them. They are in Oniguruma's dialect (`tokenizers`
runs them). `(?i:'s)` of the original models is spelled out as `'[sS]`, as in llama.cpp, so that
U+017F does not match; where llama.cpp approximates (case beyond ASCII, marks, Han), the models' own
expressions stand. Not here are models that count digits from the right (afmoe, superbpe, tiny_aya):
as an expression that takes time with the square of the digits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    """A word that is a token needs no merges."""
    add_bos: bool = False
    """The model expects BOS unless its metadata says otherwise."""


_ENGLISH = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = rf"{_ENGLISH}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_TAIL}"
_QWEN2 = rf"{_ENGLISH}|{_WORD}|\p{{N}}|{_MARKS}|{_TAIL}"
_QWEN35 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_SEED_CODER = rf"{_ENGLISH}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}"
_BAILING = rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}|{_MARKS}|\s*[\r\n]|\s+(?!\S)|\s+"

_EXAONE_MOE = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_UFAKZEKA = rf"{_WORD}|\p{{N}}|{_MARKS}|{_TAIL}"
_MINICPM5 = rf"{_ENGLISH}|{_WORD}|\p{{N}}+|{_MARKS}|{_TAIL}"
_SPACES = "".join(
    rf"\s{{{count}}}(?!\S)|" for count in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")
)
_JAIS2 = rf"{_ENGLISH}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|\s*[\r\n]+|{_SPACES}\s"

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENGLISH}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENGLISH}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_NO_HAN = r"&&[^\p{Han}]]"
_KIMI = (
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER[:-1]}{_NO_HAN}*{_LOWER[:-1]}{_NO_HAN}+{_ENGLISH}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER[:-1]}{_NO_HAN}+{_LOWER[:-1]}{_NO_HAN}*{_ENGLISH}?"
    rf"|\p{{N}}{{1,3}}|{_MARKS}|{_TAIL}"
)
_YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    _GPT4O.replace(r"\p{N}{1,3}", r"\p{N}"),
)

_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
# Letters that have case, as of the Unicode version that DeepSeek's authors expanded \p{L&} with.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_SPARK = (
    _DEEPSEEK3.replace(r"[\p{P}\p{S}]+[\r\n]*", r"[\p{P}\p{S}]+").removesuffix(_TAIL)
    + r"[\r\n]|\s+(?!\S)|\s+"
)
_DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{_CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
    r"\p{N}+",
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))


def _table() -> Mapping[str, PreTokenizer]:
    plain = {
        (
            "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat mellum modern-bert a.x-4.0 "
            "jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe"
        ): (_GPT2,),
        "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": (r"\p{N}", _GPT2),
        "qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan solar-open grok-2 kormo f2llmv2": (_QWEN2,),
        "laguna": ("[^\n]+|\n+", _QWEN2),
        "ufakzeka": (_UFAKZEKA,),
        "dbrx smaug-bpe chatglm-bpe": (_LLAMA3,),
        "jais-2": (_JAIS2,),
        "exaone-moe": (_EXAONE_MOE,),
        "qwen35": (_QWEN35,),
        "seed-coder": (_SEED_CODER,),
        "bailingmoe bailingmoe2 llada-moe": (_BAILING,),
        "deepseek-llm": _DEEPSEEK_LLM,
        "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4": (r"\p{N}{1,3}", _HAN_KANA, _DEEPSEEK3),
        "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
        "spark2_5": (r"\p{N}{1,3}", _HAN_KANA, _SPARK, r"\p{N}"),
        "gpt-4o llama4 kanana2 talkie minimax-m2": (_GPT4O,),
        "kimi-k2": (_KIMI,),
        "poro-chat bloom gpt3-finnish": (_BLOOM,),
        "viking": (_BLOOM, r"\p{N}"),
    }
    table = {name: PreTokenizer(patterns) for names, patterns in plain.items() for name in names.split()}
    llama3 = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
    llama3_names = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"
    table |= dict.fromkeys(llama3_names.split(), llama3)
    no_merges = {
        "glm4 glm5": (_LLAMA3,),
        "minicpm5": (r"\p{N}{1,3}", _MINICPM5),
        "youtu": _YOUTU,
        "granite-embed-multi-97m": (_GPT4O,),
    }
    for names, patterns in no_merges.items():
        table |= {name: PreTokenizer(patterns, ignore_merges=True) for name in names.split()}
    table["tekken"] = PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True)
    table["default"] = _DEFAULT
    return MappingProxyType(table)


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = _table()


RAW: Final = frozenset({"gemma4", "granite-embed-multi-311m", "sarvam-moe"})
"""Names that stand for BPE on plain text, which is not cut into words (`omninfer.tokenizer.rawbpe`)."""


def pre_tokenizer(name: str | None) -> PreTokenizer:
    """The entry of a name; one that is absent or unknown is a warning and the default."""
    if name is None:
        logger.warning(
            "the model names no pre-tokenizer: the default may cut text otherwise than its training"
        )
        return _DEFAULT
    found = PRE_TOKENIZERS.get(name)
    if found is None:
        logger.warning("the pre-tokenizer %r is unknown: the default may cut text otherwise", name[:40])
        return _DEFAULT
    return found

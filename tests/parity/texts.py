# ruff: noqa: E501  a text is one line
"""Texts that tokenizers cut differently: general categories, runs of spaces and digits, scripts, emoji."""

from __future__ import annotations

from typing import Final

TEXTS: Final = (
    "",
    " ",
    "Hello, world! How's it going?",
    "I'll can't we've you're I'm he'd it's I'LL CAN'T WE'VE YOU'RE I'M HE'D IT'S",
    "l'\u017fociety o\u2019clock 'tis '90s ''s 's's'",
    "  two   three    four     five\u00a0nbsp\u2003em\u3000wide ",
    "tabs\t\tand\t \tmixed \t\n\n  \n\t\n end\r\n\r\nx\r\ry\x0b\x0cz\x85q\u2028w\u2029e",
    "\n\n\n\n",
    "a\n b\n  c\n   d\n\n\n e   \n",
    " " * 33 + "x" + " " * 9 + "\n",
    "1 12 123 1234 12345 123456 1234567 12345678 123456789 1,234,567.89 0x1F 1e-10",
    "v1.2.3-rc4 2024-01-31T12:34:56Z +49(0)30/123-45 3rd 4x4 a1b22c333d4444",
    "\u0661\u0662\u0663\u0664 \u0967\u0968\u0969\u096a \u00b2\u00b3\u00bd\u2460\u2167\u2188 \u3007\u5341",
    "HTTPServer XMLHttpRequest iPhone camelCase PascalCase SCREAMING_SNAKE snake_case kebab-case",
    'def f(x: int) -> str:\n    return f"{x!r}"  # comment\n\n\nclass A(B):\n\tpass\n',
    "for (int i=0;i<10;++i){a[i]*=2;} // done /* x */ #include <stdio.h>",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\Windows\\System32",
    "$100 \u20ac5.50 \u00a37 5% 10\u00b0C a+b=c x<y>z ^ ` | ~ \u00ac \u00d7 \u00f7 \u221e \u2260 \u2264",
    "...!!!???\u2026\u2026\u2014\u2013- \u201cquoted\u201d \u2018single\u2019 \u00abguillemets\u00bb (par) [sq] {cu}",
    "Sch\u00f6ne Gr\u00fc\u00dfe aus \u00d6sterreich, na\u00efve caf\u00e9 \u00e0 la cr\u00e8me br\u00fbl\u00e9e, \u0141\u00f3d\u017a, \u0130stanbul \u0131",
    "cafe\u0301 A\u030a n\u0303 \u0301 e\u0301\u0302\u0303 \u0928\u093f \u0e19\u0e49\u0e33",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u041a\u0430\u043a \u0434\u0435\u043b\u0430? \u0429\u0401 \u0433\u043e\u0434\u0430",
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u03ba\u03cc\u03c3\u03bc\u03b5 \u03a3\u03c3\u03c2",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4eca\u5929\u662f2024\u5e741\u670831\u65e5\u3002\u300c\u5f15\u7528\u300d\u3001\u9f98",
    "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u3002\u30ab\u30bf\u30ab\u30ca\u30fc\u3068\u6f22\u5b57\u3001\uff76\uff85 ABC\u3067\u3059",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4! \u3131\u3134\u3137 \u1112\u1161\u11ab",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u060c \u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd\u061f \u200f\u06d4",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0ba4\u0bae\u0bbf\u0bb4\u0bcd \u17d4\u1780 \u1010",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd \u2764\ufe0f x\U0001f999y",
    "\U0001d400\U0001d7d8 \U00010330 \U00020000\U0002a6d6 \U0001f170 \uff21\uff22\uff43\uff11\uff12",
    "\ue000\ue001 \ufeffBOM \u200bzw\u200dj \u00adsoft \ufffd \u0378 \ufdd0",
    "\x00\x01\x1b[31m\x7f\x1c\x1f!",
    "\u01c5\u01c8\u01f2 \u1f88 \u02b0\u02b1 \u00aa\u00ba \u05d0\u01bb \u16ee",
    "aAbB aaBB AAbb AaAa Aa1Bb2 \u00e9\u00c9 \u00c9\u00e9 \u00c9COLE \u00e9cole\u00c9cole \u0436\u0416\u0436 \u0416\u0416\u0436\u0436",
    "don\u2019t\u00a0stop 'S'T'RE'VE'M'LL'D 's't're've'm'll'd",
    "=====  -----  *****  _____  #####  ///\n///\r\n//",
    "a/b\\c|d \n/ \r\n/x ./\n..//\n",
    "<|im_start|>user\nHi<|im_end|>\n<s>x</s> <unk> <pad> [INST] a [/INST]",
    "\u2581\u2581lower\u2581one\u2581eighth \u2581 x",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "x" * 50 + "\u4e2d" * 20 + "7" * 20 + "!" * 20,
)
"""All valid UTF-8; what a tokenizer makes of half a character shows in the bytes of its tokens."""

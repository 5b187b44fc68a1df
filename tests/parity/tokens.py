"""Token ids of ours against llama.cpp's, for every pre-tokenizer and variant, over `TEXTS`.

`make parity-tokens` compares; with --write, what llama.cpp answered becomes the vectors of
`tests/conformance/test_token_vectors.py`, which need no llama.cpp. Exits 1 when any differs where llama.cpp
does not approximate the model's own expressions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from omninfer.tokenizer import Tokenizer
from omninfer.tokenizer.pretokenizers import PRE_TOKENIZERS
from tests.parity.peer import Peer
from tests.parity.texts import TEXTS
from tests.parity.vocabularies import BASES, Metadata, key, write_gguf

VECTORS: Final = Path(__file__).resolve().parent.parent / "conformance" / "vectors" / "tokens.json"
MODES: Final = ((False, False), (True, True))
"""(add_special, parse_special)"""

_CASE: Final = "llama.cpp takes every non-ASCII letter for both cases, and marks for none"
APPROXIMATED: Final = {
    **dict.fromkeys(
        ("gpt-4o", "kanana2", "llama4", "minimax-m2", "talkie", "tekken"),
        (frozenset({20, 27}), _CASE),
    ),
    "kimi-k2": (frozenset({12, 13, 20, 27, 33}), _CASE + ", and a Han numeral for no Han"),
    "youtu": (frozenset({13, 33}), _CASE),
    **dict.fromkeys(
        ("deepseek-coder", "deepseek-llm"),
        (frozenset({5, 6}), "llama.cpp takes a wide space for U+000B, which is not in the models' CJK range"),
    ),
}
"""Texts, by place in `TEXTS`, that llama.cpp cuts otherwise than the models' own expressions, and why. Ours
are the models' own there; the vectors leave these out."""

LEFT_OUT: Final = frozenset({"default"})
"""The default has no name in llama.cpp but its absence, which is a case of its own."""


def cases() -> dict[str, tuple[str, Metadata]]:
    """Name → base vocabulary and changes to its metadata."""
    found: dict[str, tuple[str, Metadata]] = {
        name: ("byte-level", {key("pre"): name}) for name in sorted(PRE_TOKENIZERS) if name not in LEFT_OUT
    }
    found["byte-level default"] = ("byte-level", {key("pre"): "default"})
    found["byte-level phi-3"] = ("byte-level", {key("pre"): "gpt-2", "general.name": "Phi-3-mini"})
    for flag in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        found[f"byte-level {flag}"] = ("byte-level", {key("pre"): "gpt-2", key(flag): True})
    spm: dict[str, Metadata] = {
        "": {},
        "no prefix (gemma)": {key("add_space_prefix"): False},
        "no bos": {key("add_bos_token"): False},
        "with eos": {key("add_eos_token"): True},
        "phi-3": {"general.name": "phi3"},
    }
    found |= {f"sentencepiece {name}".strip(): ("sentencepiece", changes) for name, changes in spm.items()}
    found["gemma4"] = ("plain", {})
    for pre in ("sarvam-moe", "granite-embed-multi-311m"):
        found[pre] = ("plain", {key("model"): "gpt2", key("pre"): pre})
    return found


def compare(
    peer: Peer, folder: Path, name: str, metadata: Metadata
) -> tuple[list[list[int]], int, list[str]]:
    """llama.cpp's ids, text by text in each mode; how many texts differ; what should not."""
    path = folder / "vocab.gguf"
    write_gguf(path, metadata)
    theirs = peer.ask(vocab=str(path))
    ours = Tokenizer.from_metadata_untrusted(metadata)
    faults = []
    if set(theirs["eog"]) != ours.eog:
        faults.append(f"ends of generation {sorted(theirs['eog'])}, ours {sorted(ours.eog)}")
    for id_, (plain, special) in enumerate(theirs["pieces"]):
        for shown, text in ((False, plain), (True, special)):
            if (found := ours.piece(id_, special=shown)) != bytes.fromhex(text):
                faults.append(f"token {id_} is {bytes.fromhex(text)!r}, ours {found!r}")
    ids: list[list[int]] = []
    different: set[int] = set()
    expected_to_differ = APPROXIMATED.get(name, (frozenset(), ""))[0]
    for add_special, parse_special in MODES:
        answer = peer.ask(texts=list(TEXTS), add_special=add_special, parse_special=parse_special)
        for place, (text, expected) in enumerate(zip(TEXTS, answer["ids"], strict=True)):
            found_ids = ours.encode(text, add_special=add_special, parse_special=parse_special)
            if found_ids != expected:
                different.add(place)
                if place not in expected_to_differ:
                    faults.append(_difference(ours, text, expected, found_ids))
            ids.append([] if place in expected_to_differ else expected)
    if missing := expected_to_differ - different:
        faults.append(f"texts {sorted(missing)} no longer differ")
    return ids, len(different), faults


def _difference(ours: Tokenizer, text: str, expected: list[int], found: list[int]) -> str:
    at = next((n for n, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), 0)
    parts = [
        " ".join(repr(ours.piece(id_, special=True).decode(errors="replace")) for id_ in ids[at : at + 4])
        for ids in (expected, found)
    ]
    return f"{text[:30]!r} at token {at}: llama.cpp {parts[0]}; ours {parts[1]}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--write", action="store_true", help="make the vectors anew")
    arguments.add_argument("--only", help="just the cases with this in their name")
    asked = arguments.parse_args()
    bases = {name: make() for name, make in BASES.items()}
    answers: dict[str, list[list[int]]] = {}
    failed = 0
    with tempfile.TemporaryDirectory() as folder, Peer() as peer:
        for name, (base, changes) in cases().items():
            if asked.only and asked.only not in name:
                continue
            ids, different, faults = compare(peer, Path(folder), name, bases[base] | changes)
            answers[name] = ids
            failed += bool(faults)
            why = f" ({APPROXIMATED[name][1]})" if name in APPROXIMATED else ""
            print(f"{name:32} {len(ids)} answers, {different} texts differ{why}, {len(faults)} faults")
            for fault in faults[:6]:
                print(f"    {fault}")
    if asked.write:
        VECTORS.parent.mkdir(exist_ok=True)
        VECTORS.write_text(packed(bases, answers))
    sys.exit(1 if failed else 0)


def packed(bases: dict[str, Metadata], answers: dict[str, list[list[int]]]) -> str:
    """The vectors as JSON: many names answer the same, which is written once."""
    pool: dict[str, int] = {}
    rows = {
        name: [pool.setdefault(" ".join(map(str, one)), len(pool)) for one in ids]
        for name, ids in answers.items()
    }
    document: dict[str, Any] = {"texts": TEXTS, "bases": bases, "ids": list(pool), "cases": rows}
    return json.dumps(document, ensure_ascii=True, separators=(",", ":")) + "\n"


if __name__ == "__main__":
    main()

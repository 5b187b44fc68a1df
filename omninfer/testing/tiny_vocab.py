"""Vocabularies of some hundred tokens as GGUF metadata, small enough to reason about in a test.

Both know every byte, so every text can be encoded and comes back. `words` become tokens of their
own, reachable by merges; nothing here resembles a trained vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def tiny_spm(words: Sequence[str] = ("▁the", "▁then", "he", "hen"), **changes: object) -> dict[str, object]:
    """A SentencePiece vocabulary: `words` and all their beginnings, the first word scoring highest."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *([BYTE] * 256)]
    beginnings = [word[:end] for word in words for end in range(1, len(word) + 1)]
    for text in dict.fromkeys([*beginnings, *"▁abcdefghijklmnopqrstuvwxyz"]):
        tokens.append(text)
        kinds.append(NORMAL)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0 if kind != NORMAL else float(-i) for i, kind in enumerate(kinds)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **changes,
    }


def tiny_bpe(
    words: Sequence[str] = ("Ġthe", "Ġthen", "he"),
    special: Sequence[str] = ("<|im_start|>", "<|im_end|>"),
    **changes: object,
) -> dict[str, object]:
    """A byte-level BPE vocabulary: the bytes, `words` with all their beginnings, control tokens."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    tokens = [chr(byte if byte in printable else next(spare)) for byte in range(256)]
    merges = dict.fromkeys(f"{word[:end]} {word[end]}" for word in words for end in range(1, len(word)))
    tokens += dict.fromkeys(merge.replace(" ", "") for merge in merges)
    kinds = [NORMAL] * len(tokens) + [CONTROL] * len(special)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, *special],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": list(merges),
        **changes,
    }

"""Vocabularies as GGUF metadata, trained on `TEXTS` without any cutting: every wrong cut shows in the ids.

A trained model's merges never cross a cut of its pre-tokenizer, so a wrong cut often goes unseen. These do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import gguf
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, pre_tokenizers, trainers

from omninfer.testing.tiny_vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from omninfer.tokenizer.bpe import byte_characters
from tests.parity.texts import TEXTS

Metadata = dict[str, Any]
SPACE: Final = "\u2581"
SPECIAL: Final = ("<|im_start|>", "<|im_end|>", "<unk>", "<s>", "</s>", "<pad>", "[INST]", "<|endoftext|>")


def key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def trained(texts: list[str], size: int, alphabet: list[str], *, bytes_first: bool) -> list[list[str]]:
    """Merges of a BPE over whole texts, most frequent first."""
    library = LibraryTokenizer(models.BPE())
    if bytes_first:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    library.train_from_iterator(texts, trainer)
    merges: list[list[str]] = [list(pair) for pair in json.loads(library.to_str())["model"]["merges"]]
    return merges


def byte_level() -> Metadata:
    """Byte-level BPE: the bytes, what merges make of them, special tokens."""
    alphabet = byte_characters()
    merges = trained(list(TEXTS) * 2, 1100, alphabet, bytes_first=True)
    merges = [pair for pair in merges if "".join(pair) not in SPECIAL]
    tokens = list(dict.fromkeys([*alphabet, *("".join(pair) for pair in merges)]))
    kinds = [NORMAL] * len(tokens) + [
        CONTROL,
        CONTROL,
        UNKNOWN,
        CONTROL,
        CONTROL,
        CONTROL,
        USER_DEFINED,
        CONTROL,
    ]
    return {
        key("model"): "gpt2",
        key("tokens"): [*tokens, *SPECIAL],
        key("token_type"): kinds,
        key("merges"): [" ".join(pair) for pair in merges],
        key("bos_token_id"): len(tokens) + 3,
        key("eos_token_id"): len(tokens) + 4,
    }


def _plain_texts() -> list[str]:
    """As a SentencePiece sees them; NUL would end a token early where tokens are strings of C."""
    return [text.replace(" ", SPACE).replace("\0", "") for text in TEXTS] * 2


def plain(merges: list[list[str]]) -> tuple[list[str], list[int]]:
    """Tokens and kinds of a vocabulary of plain text: special ones, bytes, characters, merges."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    pieces = dict.fromkeys([*(letter for pair in merges for piece in pair for letter in piece)])
    pieces |= dict.fromkeys("".join(pair) for pair in merges)
    special = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<pad>": UNUSED, "[INST]": USER_DEFINED}
    special |= {"\n\n": USER_DEFINED, "<start_of_turn>": CONTROL, "<|endoftext|>": CONTROL}
    for piece in special:
        pieces.pop(piece, None)
    tokens += [*pieces, *special]
    kinds += [NORMAL] * len(pieces) + list(special.values())
    return tokens, kinds


def sentencepiece() -> Metadata:
    """SentencePiece with scores that fall with the rank of the merge; characters score least."""
    merges = trained(_plain_texts(), 1400, [], bytes_first=False)
    tokens, kinds = plain(merges)
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(merges)))}
    return {
        key("model"): "llama",
        key("tokens"): tokens,
        key("token_type"): kinds,
        key("scores"): [float(-ranks.get(token, 2 * len(merges))) for token in tokens],
        key("bos_token_id"): 1,
        key("eos_token_id"): 2,
        key("unknown_token_id"): 0,
    }


def plain_bpe() -> Metadata:
    """BPE on plain text, as Gemma 4's."""
    merges = trained(_plain_texts(), 1400, [], bytes_first=False)
    tokens, kinds = plain(merges)
    return {
        key("model"): "gemma4",
        key("tokens"): tokens,
        key("token_type"): kinds,
        key("merges"): [" ".join(pair) for pair in merges],
        key("bos_token_id"): 1,
        key("eos_token_id"): 2,
        key("unknown_token_id"): 0,
    }


BASES: Final = {"byte-level": byte_level, "sentencepiece": sentencepiece, "plain": plain_bpe}


def write_gguf(path: Path, metadata: Metadata) -> None:
    """A GGUF without tensors, as llama.cpp opens for its vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case str():
                writer.add_string(name, value)
            case list():
                writer.add_array(name, value)
            case _:
                raise TypeError(f"{name} is a {type(value).__name__}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

"""Trains the demo model: made-up sentences in, `omni-demo-F16.gguf` out. One CPU core, minutes, no download.

    python manifests/demo/train.py [--steps N] [--output PATH] [--quiet]

The same machine and the same numpy give the same bytes; another processor's matrix kernels round differently,
so the digest it prints may differ there. Writes no signed manifest: `omni add` does.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy loads: a second thread would change the order of sums

import argparse
import hashlib
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from optimise import Optimiser
from stories import ASSISTANT, USER, documents, where
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformer import Array, Params, Shape, backward, cross_entropy, forward, initial

BEGIN, END = "<|begin|>", "<|end|>"
SPECIAL = (BEGIN, END, USER, ASSISTANT)
VOCABULARY = 1024
ROWS, LENGTH = 8, 256
STEPS = 2200
WEIGHTS_SEED, TRAINING_SEED, HELD_OUT_SEED, VOCABULARY_SEED = 1, 2, 3, 4
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SAMPLES = (
    "One cold night, Luna the cat",
    "Milo the mouse",
    f"{USER}Where does Otto live?{ASSISTANT}",
    f"{USER}The red ball is under the table. Where is the red ball?{ASSISTANT}",
    f"{USER}Tell me a story about Bolt.{ASSISTANT}",
)
Tokens = npt.NDArray[np.int64]


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE with GPT-2's splitting: every byte has a token, so every text can be written."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    plain = [text.replace(END, "") for text in documents(VOCABULARY_SEED, 4000, END)]
    plain = [text.replace(USER, "\n").replace(ASSISTANT, "\n") for text in plain]
    tokenizer.train_from_iterator(plain, trainer)
    return tokenizer


def encoded(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch([BEGIN + text for text in texts])]


def packed_rows(texts: list[list[int]]) -> Iterator[list[int]]:
    """Whole texts one after another; each row starts at the start of a text and its last text is cut."""
    row: list[int] = []
    for ids in texts:
        row += ids
        if len(row) > LENGTH:
            yield row[: LENGTH + 1]
            row = []


def batches(tokenizer: Tokenizer, seed: int, count: int) -> Iterator[Tokens]:
    """`count` batches of [ROWS, LENGTH + 1] tokens, no text drawn twice on purpose."""
    texts = documents(seed, 40 * count + 100, END)  # a row takes about three texts, a batch about 25
    rows = packed_rows(encoded(tokenizer, texts))
    for _ in range(count):
        yield np.array([next(rows) for _ in range(ROWS)], np.int64)


def fit(shape: Shape, tokenizer: Tokenizer, steps: int) -> Params:
    params = initial(shape, np.random.default_rng(WEIGHTS_SEED))
    optimiser = Optimiser(shape, steps)
    began, smooth = time.monotonic(), 0.0
    for step, batch in enumerate(batches(tokenizer, TRAINING_SEED, steps)):
        logits, run = forward(shape, params, batch[:, :-1])
        loss, dlogits = cross_entropy(logits, batch[:, 1:].ravel())
        optimiser.update(params, backward(run, dlogits), step)
        smooth = loss if step == 0 else 0.95 * smooth + 0.05 * loss
        if step % 50 == 49 or step + 1 == steps:
            seconds = time.monotonic() - began
            rate = (step + 1) * ROWS * LENGTH / seconds
            print(
                f"step {step + 1:5d}/{steps}  loss {smooth:.4f}  {rate:,.0f} tokens/s  {seconds:.0f} s",
                flush=True,
            )
    return params


def as_stored(params: Params) -> Params:
    """What a reader of the file will compute with: matrices rounded to half precision."""
    return {
        name: value if value.ndim == 1 else value.astype(np.float16).astype(np.float32)
        for name, value in params.items()
    }


def held_out_perplexity(shape: Shape, params: Params, tokenizer: Tokenizer, steps: int) -> float:
    """Per token, over texts that the training never saw (short dialogues repeat; those are left out)."""
    seen = set(documents(TRAINING_SEED, 40 * steps + 100, END))
    fresh = [text for text in documents(HELD_OUT_SEED, 1500, END) if text not in seen]
    rows = np.array(list(packed_rows(encoded(tokenizer, fresh)))[:64], np.int64)
    losses = []
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        losses.append(cross_entropy(forward(shape, params, part[:, :-1])[0], part[:, 1:].ravel())[0])
    return float(np.exp(np.mean(losses)))


def continued(shape: Shape, params: Params, tokenizer: Tokenizer, prompt: str) -> str:
    """The greedy continuation of a prompt, up to the end of the text."""
    ids = tokenizer.encode(BEGIN + prompt).ids
    start, end = len(ids), tokenizer.token_to_id(END)
    while len(ids) < shape.context:
        logits, _ = forward(shape, params, np.array([ids], np.int64))
        ids.append(int(logits[-1].argmax()))
        if ids[-1] == end:
            break
    return str(tokenizer.decode(ids[start:]))


def share_answered(shape: Shape, params: Params, tokenizer: Tokenizer) -> float:
    """How many questions get the right answer where it stands only in what was told just before."""
    rng, right, asked = random.Random(HELD_OUT_SEED), 0, 50
    for _ in range(asked):
        question, answer = where(rng)[0]
        right += continued(shape, params, tokenizer, USER + question + ASSISTANT) == answer
    return right / asked


def _describe(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_name("Omni demo")
    writer.add_description("A very small model that tells short stories, for showing omni at work")
    writer.add_license("apache-2.0")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)


def _describe_tokens(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [tokenizer.id_to_token(token) for token in range(tokenizer.get_vocab_size())]
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.token_to_id(BEGIN))
    writer.add_eos_token_id(tokenizer.token_to_id(END))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def tensors(shape: Shape, params: Params) -> Iterator[tuple[str, Array]]:
    """GGUF names and values in model order, fused arrays split."""
    for name, value in params.items():
        at, _, kind = name.rpartition(".")
        start = 0
        for part, rows in shape.fused().get(kind, ((kind, len(value)),)):
            yield f"{at}.{part}.weight".lstrip("."), value[start : start + rows]
            start += rows


def write(path: Path, shape: Shape, params: Params, tokenizer: Tokenizer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, shape)
    _describe_tokens(writer, tokenizer)
    for name, value in tensors(shape, params):
        writer.add_tensor(name, value if value.ndim == 1 else value.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Train omni's demo model.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("omni-demo-F16.gguf"))
    parser.add_argument("--quiet", action="store_true", help="write the file and say no more than its digest")
    options = parser.parse_args(arguments)
    tokenizer = train_tokenizer()
    shape = Shape(tokenizer.get_vocab_size())
    stored = as_stored(fit(shape, tokenizer, options.steps))
    write(options.output, shape, stored, tokenizer)
    data = options.output.read_bytes()
    print(f"{options.output}: {len(data):,} bytes, {sum(v.size for v in stored.values()):,} parameters")
    print(f"sha256 {hashlib.sha256(data).hexdigest()}")
    if options.quiet:
        return
    print(f"held-out perplexity {held_out_perplexity(shape, stored, tokenizer, options.steps):.4f}")
    print(f"questions answered {share_answered(shape, stored, tokenizer):.0%}")
    for prompt in SAMPLES:
        print(f"\n{prompt}|{continued(shape, stored, tokenizer, prompt)}")


if __name__ == "__main__":
    main(sys.argv[1:])

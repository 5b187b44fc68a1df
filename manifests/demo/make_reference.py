"""Writes `reference.json`: what llama.cpp says for the demo model at temperature 0, for the tests.

    python manifests/demo/make_reference.py

Needs llama-cpp-python, on which omni does not depend. Run it again after
`train.py`. The key/value cache is kept in single precision, as omni's engines keep it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import llama_cpp
import numpy as np

HERE = Path(__file__).resolve().parent
MODEL = HERE / "omni-demo-F16.gguf"
MOST_TOKENS = 160
PROMPTS = (
    "Once upon a time, Otto the owl",
    "One cold night, Luna the cat",
    "Milo the mouse",
    "On a sunny morning, Bolt the robot",
    "<|user|>Where does Otto live?<|assistant|>",
    "<|user|>What is a layer?<|assistant|>",
    "<|user|>The red ball is under the table. Where is the red ball?<|assistant|>",
    "<|user|>Tell me a story about Fern.<|assistant|>",
)
F32 = 0
"""ggml's number for single precision."""


def greedy(model: llama_cpp.Llama, prompt: str) -> dict[str, object]:
    ids = model.tokenize(prompt.encode(), add_bos=True, special=True)
    model.reset()
    model.eval(ids)
    tokens: list[int] = []
    margin = float("inf")
    while len(tokens) < MOST_TOKENS:
        best = np.sort(model.scores[model.n_tokens - 1])[-2:]
        margin = min(margin, float(best[1] - best[0]))
        token = int(model.scores[model.n_tokens - 1].argmax())
        if token == model.token_eos():
            break
        tokens.append(token)
        model.eval([token])
    text = model.detokenize(tokens, prev_tokens=ids).decode()
    answer: dict[str, object] = {"prompt": prompt, "prompt_tokens": ids, "tokens": tokens, "text": text}
    return answer | {"ended": len(tokens) < MOST_TOKENS, "least_margin": round(margin, 4)}


def main() -> None:
    model = llama_cpp.Llama(
        str(MODEL), n_ctx=256, n_threads=1, logits_all=True, verbose=False, type_k=F32, type_v=F32
    )
    reference = {
        "oracle": f"llama.cpp as vendored by llama-cpp-python {llama_cpp.__version__}, CPU, temperature 0",
        "model": MODEL.name,
        "sha256": hashlib.sha256(MODEL.read_bytes()).hexdigest(),
        "answers": [greedy(model, prompt) for prompt in PROMPTS],
    }
    (HERE / "reference.json").write_text(json.dumps(reference, indent=1) + "\n")
    for answer in reference["answers"]:
        print(f"{answer['least_margin']:8}  {answer['prompt']}|{answer['text']}")


if __name__ == "__main__":
    main()

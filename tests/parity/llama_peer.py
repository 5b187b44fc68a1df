"""llama.cpp as an oracle, run by the Python that has llama-cpp-python: a JSON line in, a JSON line out.

{"vocab": path} opens a GGUF without its weights and answers {"pieces": [[hex, hex], …], "eog":
ids}: the bytes of each token, those of control tokens hidden and shown.

{"texts": […], "add_special": bool, "parse_special": bool} answers {"ids": [[…], …]}.

{"logits": […], "chain": [[name, argument, …], …], "history": ids} answers {"ids": […], "logits": […],
"p": […]}: what a chain of llama.cpp's samplers leaves of the logits.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import llama_cpp

QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)


class Vocabulary:
    """One opened vocabulary."""

    def __init__(self, path: str) -> None:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise SystemExit(f"llama.cpp refuses {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)

    def close(self) -> None:
        llama_cpp.llama_model_free(self._model)

    def describe(self) -> dict[str, Any]:
        count = llama_cpp.llama_vocab_n_tokens(self.vocab)
        return {
            "pieces": [
                [self._piece(id_, special).hex() for special in (False, True)] for id_ in range(count)
            ],
            "eog": [id_ for id_ in range(count) if llama_cpp.llama_vocab_is_eog(self.vocab, id_)],
        }

    def _piece(self, id_: int, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(4096)
        size = llama_cpp.llama_token_to_piece(self.vocab, id_, buffer, len(buffer), 0, special)
        return buffer.raw[: max(0, size)]

    def ids(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode()
        found = (llama_cpp.llama_token * (len(data) * 2 + 16))()
        count = llama_cpp.llama_tokenize(
            self.vocab, data, len(data), found, len(found), add_special, parse_special
        )
        assert count >= 0, (text, count)
        return list(found[:count])


def sampled(logits: list[float], chain: list[list[Any]], history: list[int]) -> dict[str, Any]:
    """What is left of some logits after samplers, in the order in which llama.cpp leaves it."""
    data = (llama_cpp.llama_token_data * len(logits))()
    for id_, logit in enumerate(logits):
        data[id_] = llama_cpp.llama_token_data(id_, logit, 0.0)
    array = llama_cpp.llama_token_data_array(data, len(logits), -1, False)
    samplers = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for name, *arguments in chain:
        if name == "logit_bias":
            biases = (llama_cpp.llama_logit_bias * len(arguments))()
            for place, (id_, bias) in enumerate(arguments):
                biases[place] = llama_cpp.llama_logit_bias(id_, bias)
            made = llama_cpp.llama_sampler_init_logit_bias(len(logits), len(arguments), biases)
        else:
            made = getattr(llama_cpp, f"llama_sampler_init_{name}")(*arguments)
        llama_cpp.llama_sampler_chain_add(samplers, made)
    for id_ in history:
        llama_cpp.llama_sampler_accept(samplers, id_)
    llama_cpp.llama_sampler_apply(samplers, ctypes.byref(array))
    left = [array.data[place] for place in range(array.size)]
    llama_cpp.llama_sampler_free(samplers)
    return {
        "ids": [one.id for one in left],
        "logits": [one.logit for one in left],
        "p": [one.p for one in left],
    }


def main() -> None:
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    opened: Vocabulary | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "vocab" in request:
            if opened is not None:
                opened.close()
            opened = Vocabulary(request["vocab"])
            answer = opened.describe()
        elif "texts" in request:
            assert opened is not None
            flags = request["add_special"], request["parse_special"]
            answer = {"ids": [opened.ids(text, *flags) for text in request["texts"]]}
        else:
            answer = sampled(request["logits"], request["chain"], request["history"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

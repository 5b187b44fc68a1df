"""llama.cpp's logits, asked by the Python that has llama-cpp-python.

    python ask_logits.py MODEL.gguf TOKENS.npy LOGITS.npy

Keys and values are float32 and attention is the plain one, so that what differs from our engines is rounding
of products alone.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

_QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)


def logits(path: Path, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """[tokens, vocab]: what llama.cpp says after each of `tokens`, fed at once into an empty context."""
    llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise ValueError(f"llama.cpp does not load {path}")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = len(tokens)
    options.n_batch = options.n_ubatch = len(tokens)
    options.n_threads = options.n_threads_batch = 2
    options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
    options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    lctx = llama_cpp.llama_init_from_model(model, options)
    if not lctx:
        raise ValueError(f"llama.cpp makes no context for {path}")
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, 1
    try:
        if llama_cpp.llama_decode(lctx, batch) != 0:
            raise ValueError(f"llama.cpp does not decode {path}")
        flat = llama_cpp.llama_get_logits(lctx)
        return np.ctypeslib.as_array(flat, (len(tokens) * vocab,)).reshape(len(tokens), vocab).copy()
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(lctx)
        llama_cpp.llama_model_free(model)


if __name__ == "__main__":
    np.save(sys.argv[3], logits(Path(sys.argv[1]), np.load(sys.argv[2])))

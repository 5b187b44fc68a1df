"""The numpy engine with activations rounded as llama.cpp's CPU build rounds them before it multiplies.

Against quantised weights ggml multiplies codes with codes: activations become 8-bit integers with a scale for
each 256 (K-quants, IQ4_XS) or 32 of them (the other types), and bfloat16 against BF16. What a right engine
differs by from llama.cpp is this rounding; done here too, next to nothing is left of the difference. Sources:
ggml's `quantize_row_q8_K` and `quantize_row_q8_0`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omninfer.engines import StageSpec, TensorSource, get_engine
from omninfer.engines.fields import F32
from omninfer.engines.numpy_weights import Matrix
from omninfer.engines.packing import PLAIN


def rounded(kind: str, x: F32) -> F32:
    """Activations [tokens, inputs] as a product with weights of ggml type `kind` sees them."""
    if kind == "BF16":  # to the nearest, of equals the even one
        bits = x.view(np.uint32)
        halves: F32 = ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
        return halves
    if kind in PLAIN:
        return x
    whole = kind.endswith("_K") or kind == "IQ4_XS"
    groups = x.reshape(len(x), -1, 256 if whole else 32)
    where = np.abs(groups).argmax(axis=-1)[..., None]
    peak = np.take_along_axis(groups, where, axis=-1)
    # The largest becomes -127 in groups of 256, and 127 in those of 32, whose scale is kept as a half.
    scale = np.where(peak == 0, 1, peak / -127 if whole else np.abs(peak) / 127)
    codes = np.clip(np.rint(groups / scale), -127, 127)
    kept = scale if whole else scale.astype(np.float16)
    result: F32 = (codes * kept).astype(np.float32).reshape(x.shape)
    return result


@dataclass(frozen=True, slots=True)
class RoundingMatrix:
    """A matrix whose products round their activations first."""

    kind: str
    matrix: Matrix

    def product(self, x: F32) -> F32:
        return self.matrix.product(rounded(self.kind, np.ascontiguousarray(x)))

    def rows(self, index: NDArray[Any]) -> F32:
        return self.matrix.rows(index)

    def part(self, rows: slice) -> RoundingMatrix:
        return RoundingMatrix(self.kind, self.matrix.part(rows))


def rounding_logits(spec: StageSpec, source: TensorSource, tokens: NDArray[np.int32]) -> F32:
    """[tokens, vocab] of a whole model, with activations rounded as llama.cpp does."""
    stage: Any = get_engine("numpy").load(spec, source, context=len(tokens))
    for name, matrix in stage.matrices.items():
        stage.matrices[name] = RoundingMatrix(source.info(name)[0].name, matrix)
    logits: F32 = stage.forward(tokens, slot=0, position=0, logits="all")
    return logits

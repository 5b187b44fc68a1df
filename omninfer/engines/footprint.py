"""What weights take once an engine holds them, by type: stated here, known before anything is loaded.

Plans and lenders reckon with it, and a test compares it with the arrays that are really allocated. Each
function stands beside what it is about: `packing.FORMS` says how a type comes apart, `mlx_weights` and
`numpy_weights` how the pieces are held. No engine is imported, so that a machine can plan for engines that it
has not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, prod
from typing import Final

from omninfer.engines.ort_weights import REST_BLOCK, WITH_MINIMUMS
from omninfer.engines.packing import FORMS
from omnistore.chunker.ggml import by_name, nbytes

SLACK: Final = 1.1
"""Bytes of memory per byte of weights: what an allocator and a slab being repacked take beside them."""
ORT_RATIO: Final = 2.0
"""Of packed bytes, where no more is known of a model: what ort makes of F16, the most of what is common."""
_MLX_GROUP: Final = 32
_PLAIN_BYTES: Final = {"F32": 4, "F16": 2, "BF16": 2}


def _mlx(kind: str, shape: tuple[int, ...]) -> int:
    """Codes in words, and for each group of 32 a scale and a bias in halfs; twice both where the type's
    groups are of 16 (`mlx_weights`). Scales that are too wide for halfs take twice as much, which no real
    tensor's are.
    """
    rows, columns = _matrix(shape)
    if kind in _PLAIN_BYTES:
        return _PLAIN_BYTES[kind] * rows * columns
    bits, group = FORMS[kind]
    scales = 2 * 2 * (_MLX_GROUP // group)
    return rows * columns * bits // 8 + rows * (columns // _MLX_GROUP) * scales


def _numpy(kind: str, shape: tuple[int, ...]) -> int:
    """As packed as they come. What a small stage decodes is less than what is always kept free."""
    return nbytes(by_name(kind), shape)


def _ort(kind: str, shape: tuple[int, ...]) -> int:
    """Codes of 4 or 8 bits, and for each block a scale and a sum in float32 (`ort_weights`); of a type with
    minimums, a rest for each block in 8 bits. In ONNX Runtime's own form, as seen on x86.
    """
    rows, columns = _matrix(shape)
    if kind in _PLAIN_BYTES:
        return 4 * rows * columns
    bits, group = FORMS[kind]
    blocks = columns // group
    rests = rows * ceil(blocks / REST_BLOCK) * (REST_BLOCK + 8) if kind in WITH_MINIMUMS else 0
    return rows * columns * (4 if bits <= 4 else 8) // 8 + 8 * rows * blocks + rests


def _ort_loading(kind: str, shape: tuple[int, ...]) -> int:
    """What a graph has mapped beside while it loads: the scales once more."""
    rows, columns = _matrix(shape)
    return 0 if kind in _PLAIN_BYTES else 4 * rows * (columns // FORMS[kind][1])


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return prod(shape[1:]), shape[0]


_HELD: Final[Mapping[str, Callable[[str, tuple[int, ...]], int]]] = {
    "mlx": _mlx,
    "numpy": _numpy,
    "ort": _ort,
}


def held_bytes(engine: str, kind: str, shape: tuple[int, ...], *, head: bool = False) -> int | None:
    """Bytes that a tensor of ggml type `kind` and `shape` (ne[0] first) takes in an engine; of the model's
    head, where `head`. None for an engine that is not known here, or a type that it refuses.
    """
    held = _HELD.get(engine)
    known = kind in _PLAIN_BYTES or kind in FORMS or engine == "numpy"
    if held is None or not known:
        return None
    # The head is one graph, and may be most of a stage; of the layers, two in four load at a time.
    return held(kind, shape) + (_ort_loading(kind, shape) if engine == "ort" and head else 0)

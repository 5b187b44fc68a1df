"""How keys and values are kept, and what they take: known from a model's shape alone.

`full` keeps them as an engine computes them: in float32, on a GPU in halfs. `q8` keeps codes of 8 bits and,
for each group of 32 elements of a head (the whole head where 32 does not divide it), a scale in half
precision: 3.76 times less than float32.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from omninfer.arch.spec import ModelSpec

KVKind: TypeAlias = Literal["full", "q8"]
KV_KINDS: Final[tuple[KVKind, ...]] = ("full", "q8")
KV_GROUP: Final = 32
"""Elements of a head that share a scale."""


def kv_group(head_dim: int) -> int:
    """Elements that share a scale in heads of `head_dim`."""
    return KV_GROUP if head_dim % KV_GROUP == 0 else head_dim


def kv_bytes(model: ModelSpec, kind: KVKind) -> int:
    """Bytes that one token's keys and values take in one layer: at most, whichever engine keeps them.

    ort keeps whole heads of a multiple of 16 elements.
    """
    if kind == "q8":
        return 2 * model.kv_heads * (model.head_dim + 2 * model.head_dim // kv_group(model.head_dim))
    return 2 * 4 * model.kv_heads * -(-model.head_dim // 16) * 16

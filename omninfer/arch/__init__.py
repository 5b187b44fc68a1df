"""What a model is, read from GGUF metadata and tensor names alone. Pure.

`families` is the table of architectures: which features each has. `ModelSpec` (in `spec`) is one model's
shape and features; `rope` holds its rotary embeddings, `experts` its mixture of experts. The metadata come
from a stranger's file: every number is bounded before anything is allocated from it, and every tensor of
every layer must be one the block knows how to use: a tensor we do not understand changes what the
model computes, so it is refused by name instead of being ignored.

Deliberately not here: tokenizers, reading files, and anything that computes.
"""

from omninfer.arch.caches import KV_KINDS, KVKind, kv_bytes, kv_group
from omninfer.arch.experts import Experts, Routing
from omninfer.arch.families import FAMILIES, Family
from omninfer.arch.features import (
    EMBEDDING,
    HEAD,
    HEAD_NORM,
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    Feature,
    layer_suffixes,
)
from omninfer.arch.keys import MAX_CONTEXT, MAX_LAYERS, MAX_VOCAB
from omninfer.arch.rope import Rope, RopeKind, Yarn
from omninfer.arch.spec import ModelSpec

__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "HEAD",
    "HEAD_NORM",
    "KV_KINDS",
    "MAX_CONTEXT",
    "MAX_LAYERS",
    "MAX_VOCAB",
    "ROPE_FREQS",
    "ROPE_LONG",
    "ROPE_SHORT",
    "Experts",
    "Family",
    "Feature",
    "KVKind",
    "ModelSpec",
    "Rope",
    "RopeKind",
    "Routing",
    "Yarn",
    "kv_bytes",
    "kv_group",
    "layer_suffixes",
]

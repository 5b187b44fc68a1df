"""The mixture of experts of a model: how many there are, how many a token sees, how they are weighted."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from omninfer.arch.keys import MAX_EXPERTS, MAX_FFN_WIDTH, Keys
from omnistore.errors import MalformedGGUF


class Routing(Enum):
    """How a router's logits become the weights of the experts it picked, those of the largest logits."""

    NORMALISED = "normalised"
    """Softmax over all experts, then divided by the sum of the chosen (Mixtral, qwen3moe)."""
    SOFTMAX = "softmax"
    """Softmax over all experts (qwen2moe)."""
    CHOSEN = "chosen"
    """Softmax over the chosen alone (gpt-oss)."""


@dataclass(frozen=True, slots=True)
class Experts:
    """See the module."""

    count: int
    used: int
    """Experts that a token goes through."""
    width: int
    """Inner width of one expert."""
    shared_width: int
    """Inner width of the shared expert; 0 if there is none."""
    routing: Routing


# Keys of other models' routers and layers, with the values that change nothing.
_NEUTRAL: Final[tuple[tuple[str, tuple[object, ...]], ...]] = (
    ("expert_weights_scale", (0.0, 1.0)),
    ("expert_group_count", (0, 1)),
    ("expert_group_used_count", (0, 1)),
    ("leading_dense_block_count", (0,)),
    ("interleave_moe_layer_step", (0, 1)),
    ("moe_every_n_layers", (0, 1)),
)
_GATING: Final = {Routing.NORMALISED: 1, Routing.SOFTMAX: 1, Routing.CHOSEN: 3}
"""llama.cpp's numbers in `expert_gating_func`; 0 leaves it to the architecture."""


def read_experts(keys: Keys, routing: Routing, *, ffn_width: int, shared: bool) -> Experts:
    """The experts of a model that has some; `ffn_width` is its `feed_forward_length`, 0 if it has none."""
    for key, neutral in _NEUTRAL:
        keys.refuse_unless(key, neutral)
    keys.refuse_unless("expert_gating_func", (0, _GATING[routing]))
    if routing is not Routing.CHOSEN:
        keys.refuse_unless("expert_weights_norm", (routing is Routing.NORMALISED,))
    count = keys.integer("expert_count", 1, MAX_EXPERTS)
    used = keys.integer("expert_used_count", 1, count)
    # As llama.cpp has it: without a width of their own, qwen's experts share the feed-forward's.
    divided = ffn_width if keys.architecture == "llama" else ffn_width // used
    width = keys.integer("expert_feed_forward_length", 0, MAX_FFN_WIDTH, default=0) or divided
    if keys.architecture == "llama" and width != ffn_width:
        raise MalformedGGUF(f"experts of width {width} where feed_forward_length is {ffn_width}")
    if not width:
        raise MalformedGGUF(f"the metadata have no {keys.name('expert_feed_forward_length')}")
    shared_width = 0
    if shared:
        key = "expert_shared_feed_forward_length"
        shared_width = keys.integer(key, 0, MAX_FFN_WIDTH, default=0) or ffn_width
        if not shared_width:
            raise MalformedGGUF(f"the metadata have no {keys.name(key)}")
    return Experts(count, used, width, shared_width, routing)

"""StreamingLLM, attention sinks and a rolling window. Xiao et al. 2023, arXiv:2309.17453."""

import jax.numpy as jnp

from kvjax.cache import FREE
from kvjax.policy import Policy, evict, method
from kvjax.scorers import protect, recency


@method
def streaming_llm(budget: int, *, sinks: int = 4) -> Policy:
    """Keeps the first `sinks` tokens and the newest `budget - sinks`, numbered by their place in the cache.

    Keys are cached un-rotated; at every read the m tokens in hand have the positions 0..m-1, and so the position of
    the newest never exceeds the budget by more than the tokens of one call.

    Bytes: L B H (budget + 1) (2 D b + 4) + 4 B.

    Args:
      budget: Slots, sinks included. A decode step sees budget + 1 tokens, its own included.
      sinks: First tokens kept.

    Source: the paper, and its code for the order of append, attend, evict. A prompt, and every later chunk, is read
    dense and trimmed afterwards; token by token, as the code for perplexity has it, is `prefill(chunk=1)`. That code's
    default of true positions is not offered: beyond the model's context they are what the method is there to avoid.
    """
    if not 0 <= sinks < budget:
        raise ValueError(
            f"streaming_llm: sinks={sinks} is outside 0..{budget - 1}. The sinks are part of budget={budget}; lower "
            f"sinks or raise budget."
        )

    def ranks(cache):
        # All heads keep the same tokens: the sinks, and a run up to the newest. Only the run has moved up.
        pos = cache.pos[:, :1]
        gone = pos.max(axis=-1, keepdims=True) + 1 - (pos != FREE).sum(axis=-1, keepdims=True)
        return jnp.where(pos < sinks, pos, pos - gone).clip(0)

    return evict(protect(recency(), sinks=sinks), budget=budget, ranks=ranks)

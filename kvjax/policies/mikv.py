"""MiKV, every token stays, at two precisions. Yang et al. 2024, arXiv:2402.18096."""

from fractions import Fraction

import jax.numpy as jnp

from kvjax.codecs import balance, integer, pipe
from kvjax.counts import flag, real, whole
from kvjax.policy import Policy, Seen, evict, method, store
from kvjax.scorers import attention_mass, recency, window_votes
from kvjax.tiers import demote

POOL = 5  # neighbours over which votes are averaged, SnapKV's default


@method
def mikv(
    ratio: float = 0.2,
    *,
    low_bits: int = 2,
    high_bits: int = 16,
    group: int | None = None,
    balanced: bool = True,
    heavy: float = 0.5,
    mass: str = "sum",
    window: int | None = None,
) -> Policy:
    """Keeps the most attended and the newest tokens as they are, and all others at a few bits.

    A token that loses its place among those is rounded, and never comes back; nothing is evicted.

    Bytes: L B H ((n ratio + 1) (2 D b + 8) + (n - n ratio + 1) (D low_bits / 4 + 8 D / group + 4) + 4 D) + L B + 4 B,
    slots rounded, at 16 high bits. Without a group 8 D / group is 16.
    Bytes at fewer: L B H ((n ratio + 1) (D high_bits / 4 + 8 D / group + 8) + (n - n ratio + 1) (D low_bits / 4 + 8 D /
    group + 4) + 4 D) + 2 L B + 4 B, if balanced.

    Args:
      ratio: Share of the tokens seen so far that is kept at high precision.
      low_bits: 2, 3, 4 or 8, of all others.
      high_bits: 16 for the model's own dtype, or 2, 3, 4 or 8, in which tokens are then stored as they arrive.
      group: Channels that share a step; None takes half of head_dim, as the paper does.
      balanced: Scales the channels of low keys by the prompt's largest queries and keys; always those of both tiers
        where the upper one is rounded too.
      heavy: Share of the high tier that is there for its attention; the rest is the newest.
      mass: "sum" of the attention received so far, which favours early tokens, or its "mean" over the queries that saw
        the token (ZipCache, arXiv:2405.14256).
      window: Tokens are important by the votes of the last `window` queries of a call, as in SnapKV, an alternative of
        the paper's later version; so many of the newest are then high, whatever `heavy` says. None asks all queries.

    Source: other works that quote the paper's equations; neither its text nor code was to be had. The split of the high
    tier, the timing and the rounding of steps are ours. A token that is rounded in both tiers is rounded twice. What a
    later token attends to takes part in the choice, but nothing is lost for another question.
    """
    ratio = real("mikv", "ratio", ratio, least=0, most=1, mend="It is a share of the tokens.")
    heavy = real("mikv", "heavy", heavy, least=0, most=1, mend="It is a share of the high tier.")
    balanced = flag("mikv", "balanced", balanced)
    if high_bits not in (2, 3, 4, 8, 16) or low_bits > high_bits:
        raise ValueError(
            f"mikv: high_bits={high_bits} must be 2, 3, 4, 8 or 16, and no fewer than low_bits={low_bits}."
        )
    if mass not in ("sum", "mean"):
        raise ValueError(f"mikv: mass={mass!r} must be 'sum' or 'mean'.")
    if window is not None:
        window = whole("mikv", "window", window, least=1, mend="None asks all queries.")
        if mass == "mean":
            raise ValueError(f"mikv: mass='mean' is over all queries, and window={window} asks some; give one of them.")
    received = attention_mass() if window is None else window_votes(window, POOL)
    share, newest = (Fraction(x).limit_denominator(1000) for x in (ratio, 1 - heavy))
    scale = [balance()] if balanced else []
    low = evict(recency(), budget=None, grow=lambda n, room: n + room - high_tier(n + room) + 1)
    coded = high_bits < 16
    low = store(
        low, keys=_joined([] if coded else scale, integer(low_bits, group=group)), values=integer(low_bits, group=group)
    )

    def high_tier(seen):
        return share.numerator * seen // share.denominator

    def limit(seen: Seen):
        return jnp.where(seen.now < 0, jnp.iinfo(jnp.int32).max, high_tier(seen.now + 1))

    def score(cache, seen):
        seen_so_far = seen.now + 1
        recent = newest.numerator * high_tier(seen_so_far) // newest.denominator
        if window is not None:
            recent = jnp.maximum(recent, jnp.minimum(window, high_tier(seen_so_far)))
        worth = received.score(cache, seen)
        if mass == "mean":
            worth = worth / jnp.maximum(seen_so_far[:, None, None] - cache.pos, 1)
        return jnp.where(cache.pos >= (seen_so_far - recent)[:, None, None], jnp.inf, worth)

    policy = demote(received._replace(score=score), low, limit=limit, grow=lambda n, room: high_tier(n + room) + 1)
    if coded:
        high = integer(high_bits, group=group)
        policy = store(policy, keys=_joined(scale, high), values=high)
    return policy


def _joined(scale, codec):
    return pipe(*scale, codec) if scale else codec

"""CaM: the value of an evicted token is spread over the tokens that follow it; its key is dropped.

Source: Zhang et al. 2024, "CaM: Cache Merging for Memory-efficient LLMs Inference", ICML 2024, Eq. 14.
Who leaves is decided by a base method: the first and the newest tokens at their true positions ("recency"), or
H2O ("h2o"). Tokens hold ROTATED keys here, unless positions roll; values change, keys never do.
"""

import math
from collections.abc import Callable

import numpy as np

from tests.oracles import common
from tests.oracles.streaming_llm import rank_places

Scores = dict[int, float]  # original position -> attention received so far


def keep_recency(mass: Scores, *, budget: int, sinks: int) -> list[int]:
    """The first `sinks` positions of the stream and the newest others."""
    first = [p for p in sorted(mass) if p < sinks]
    others = [p for p in sorted(mass) if p >= sinks]
    return first + others[-(budget - sinks) :]


def keep_h2o(mass: Scores, *, budget: int, window: int) -> list[int]:
    """The newest `window` positions and those of the others that received most."""
    ordered = sorted(mass)
    older, recent = ordered[:-window], ordered[-window:]
    return sorted(common.best({p: mass[p] for p in older}, budget - window) + recent)


def chance(own: float, others: list[float]) -> float:
    """Probability of merging a token that received `own` into targets that received `others`."""
    if own == 0 or not others:
        return 0.0
    mean = sum(others) / len(others)
    return 1.0 if mean == 0 else min(own / mean, 1.0)


def spread(
    hand: common.Hand, mass: Scores, kept: list[int], *, targets: int, draw: Callable[[int], float]
) -> common.Hand:
    """The kept tokens, after each evicted one, oldest first, was merged into the next `targets` in hand.

    A target may itself be evicted later in the loop; it then passes on what it absorbed.
    """
    values = {p: token.value for p, token in hand.items()}
    for i in sorted(set(hand) - set(kept)):
        following = [p for p in sorted(hand) if p > i][:targets]
        if draw(i) < chance(mass[i], [mass[j] for j in following]):
            for j in following:
                values[j] = values[j] + values[i] / len(following)
    return {p: common.Token(hand[p].key, values[p]) for p in kept}


def attend(query: np.ndarray, position: int, hand: common.Hand) -> tuple[np.ndarray, common.Probs]:
    """Output and probabilities of one rotated query over the rotated keys it may see."""
    logits = {p: float(query @ token.key) / math.sqrt(len(query)) for p, token in hand.items() if p <= position}
    probs = common.softmax(logits)
    return sum(prob * hand[p].value for p, prob in probs.items()), probs


def run(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    calls: list[int],
    *,
    base: float = 10000.0,
    select: str,
    budget: int,
    window: int = 0,
    sinks: int = 0,
    targets: int = 32,
    draw: Callable[[int, int], float],
    prefill_mode: str = "cascade",
    positions: str = "true",
) -> list[common.Call]:
    """q is f64[n, Hq, D]; k and v are f64[n, H, D]; none is rotated.

    window: of "h2o" only; sinks: of "recency" only.
    draw: kv head, position -> the u in [0, 1] that decides about this position when it is evicted.
    prefill_mode: "cascade" merges in every call; "drop" merges in calls of one token and otherwise drops; "token" takes
      the tokens of every call one at a time, each seeing what the one before left.
    positions: "rolling" numbers tokens by rank in the cache, and holds keys that are not rotated.
    scores of a call are the attention received, whether or not the base method chooses by it.
    """
    if select == "recency":
        fits = 0 <= sinks < budget and window == 0
    elif select == "h2o":
        fits = 1 <= window <= budget and sinks == 0
    else:
        raise ValueError(f"unknown select {select!r}")
    if not fits or targets < 1:
        raise ValueError(f"{select}: budget {budget}, window {window}, sinks {sinks}, targets {targets} do not fit")
    if prefill_mode not in ("cascade", "drop", "token") or positions not in ("true", "rolling"):
        raise ValueError(f"unknown prefill_mode {prefill_mode!r} or positions {positions!r}")
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    if sum(calls) != n or min(calls) < 1:
        raise ValueError(f"calls must be positive and sum to {n}, got {calls}")
    if prefill_mode == "token":
        settings = dict(select=select, budget=budget, window=window, sinks=sinks, targets=targets, draw=draw)
        return common.regrouped(run(q, k, v, [1] * n, base=base, positions=positions, **settings), calls)

    hands: list[common.Hand] = [{} for _ in range(kv_heads)]
    masses: list[Scores] = [{} for _ in range(kv_heads)]
    results = []
    start = 0
    for c in calls:
        stop = start + c
        out = np.zeros((c, q_heads, dim))
        scores = []
        for h in range(kv_heads):
            hand, mass = hands[h], masses[h]
            for p in range(start, stop):
                key = common.rope(k[p, h], p, base) if positions == "true" else k[p, h]
                hand[p] = common.Token(key, v[p, h])
                mass[p] = 0.0
            places = rank_places(hand)
            for p in range(start, stop):
                rows = []
                for x in range(h * group, (h + 1) * group):
                    if positions == "true":
                        out[p - start, x], probs = attend(common.rope(q[p, x], p, base), p, hand)
                    else:
                        out[p - start, x], probs = common.attend(q[p, x], p, hand, places, base)
                    rows.append(probs)
                for j, prob in common.average(rows).items():
                    mass[j] += prob
            scores.append(dict(mass))

            if len(mass) <= budget:
                kept = sorted(mass)
            elif select == "recency":
                kept = keep_recency(mass, budget=budget, sinks=sinks)
            else:
                kept = keep_h2o(mass, budget=budget, window=window)
            if prefill_mode == "cascade" or c == 1:
                hands[h] = spread(hand, mass, kept, targets=targets, draw=lambda p, h=h: draw(h, p))
            else:
                hands[h] = {p: hand[p] for p in kept}
            masses[h] = {p: mass[p] for p in kept}
        results.append(common.Call(out, [list(hand) for hand in hands], scores, [dict(hand) for hand in hands]))
        start = stop
    return results

"""Elastic Cache: the prompt merged into its most attended tokens, then one token dropped at a fixed slot.

Source: Liu et al. 2024, arXiv:2407.18121. The first call is the prompt; each token of later calls is a decode step.
All heads share one choice, and keys are cached as rotated. `selection="official"` repeats the slips of the authors'
code: it compares indices with a count, merges the token before the one meant, and keeps one slot less.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tests.oracles import common

Scores = dict[int, float]  # prompt position -> attention received
Buckets = dict[int, list[int]]  # kept position -> the prompt positions whose mean it holds


# ---- the prompt ----


def exact(r: float) -> Fraction:
    return Fraction(r).limit_denominator(1000)


def removed(length: int, r: float) -> int:
    """How many of the prompt's tokens go: floor(r * length)."""
    return exact(r) * length // 1


def importance(heads: list[list[common.Probs]], score: str = "sum") -> Scores:
    """What each token received from all queries, the mean of the query heads; `heads` is [head][query]."""
    received = {p: 0.0 for p in range(len(heads[0]))}
    for rows in heads:
        for row in rows:
            for p, prob in row.items():
                received[p] += prob / len(heads)
    if score == "mean":
        return {p: total / (len(received) - p) for p, total in received.items()}
    return received


def nearest(position: int, anchors: list[int]) -> int:
    """The nearest anchor; of two at one distance, the left."""
    return min(anchors, key=lambda anchor: (abs(anchor - position), anchor))


def assign(anchors: list[int], others: Sequence[int]) -> Buckets:
    buckets = {anchor: [anchor] for anchor in sorted(anchors)}
    for p in others:
        buckets[nearest(p, anchors)].append(p)
    return buckets


def top_buckets(scores: Scores, middle: range, room: int) -> Buckets:
    anchors = common.best({p: scores[p] for p in middle}, room)
    return assign(anchors, [p for p in middle if p not in anchors])


def official_buckets(scores: Scores, middle: range, gone: int) -> Buckets:
    order = sorted(range(len(middle)), key=lambda i: (scores[middle[i]], i))
    picked = [rank for rank, i in enumerate(order) if i > gone]
    thrown = [i for i in range(len(middle)) if i not in picked]
    return assign([middle[i] for i in picked], thrown) if picked else {}


def plan(
    scores: Scores,
    r: float,
    *,
    start_size: int = 1,
    protect_size: int = 1,
    selection: str = "topk",
    stage1: str = "merge",
) -> Buckets:
    """The slots that the prompt leaves, in order, and the positions averaged into each."""
    length = len(scores)
    gone = removed(length, r)
    left = length - gone
    if gone < 1:
        return {p: [p] for p in range(length)}

    starts = range(min(start_size, left))
    ends = range(length - min(protect_size, left - len(starts)), length)
    middle = range(start_size, length - protect_size)
    room = left - start_size - protect_size
    if room < 1:
        buckets = {}
    elif selection == "official":
        buckets = official_buckets(scores, middle, gone)
    else:
        buckets = top_buckets(scores, middle, room)
    if stage1 == "evict":
        buckets = {anchor: [anchor] for anchor in buckets}
    return {p: [p] for p in starts} | buckets | {p: [p] for p in ends}


def merge(hand: common.Hand, buckets: Buckets) -> common.Hand:
    """Plain means of keys and of values."""
    merged = {}
    for p, members in buckets.items():
        key = sum(hand[j].key for j in members) / len(members)
        value = sum(hand[j].value for j in members) / len(members)
        merged[p] = common.Token(key, value)
    return merged


# ---- decoding ----


def fixed_point(left: int, start_size: int = 1, distance: int = 25) -> int:
    """The slot at which tokens are dropped, for a prompt of which `left` tokens stay."""
    return max(min(start_size, left), min(left - distance, left - 1))


def overfull(held: int, seen: int, r: float) -> bool:
    """Whether `held` tokens are at least one too many of `seen`, of which 1 - r may stay."""
    return held - seen * (1 - exact(r)) >= 1


def victim(order: list[int], seen: int, fixed: int, r: float) -> int | None:
    """The token to drop of those held, oldest first and the newest included; None if all stay."""
    if overfull(len(order), seen, r) and fixed < len(order) - 1:
        return order[fixed]
    return None


# ---- one stream ----


def attend(query: np.ndarray, hand: common.Hand) -> tuple[np.ndarray, common.Probs]:
    """Output f64[D] of one rotated query over tokens with rotated keys, and its probabilities."""
    scale = len(query) ** -0.5
    probs = common.softmax({p: scale * float(query @ token.key) for p, token in hand.items()})
    return sum(prob * hand[p].value for p, prob in probs.items()), probs


def run(
    q,
    k,
    v,
    calls,
    *,
    base=10000.0,
    r: float = 0.5,
    start_size: int = 1,
    protect_size: int = 1,
    distance: int = 25,
    score: str = "sum",
    selection: str = "topk",
    stage1: str = "merge",
    position_mode: str = "original",
    visual: Sequence[bool] | None = None,
) -> list[common.Call]:
    """`visual` marks the tokens of an image; the method treats them like any other, so it changes nothing.

    The scores of the first call are the importance of each prompt token, the same in every kv head; later calls
    have none.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    if k.shape != (n, kv_heads, dim) or v.shape != k.shape or q_heads % kv_heads or dim % 2:
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}")
    if sum(calls) != n or any(c < 1 for c in calls):
        raise ValueError(f"calls must be positive and sum to {n}, got {calls}")
    if not 0 <= r < 1 or min(start_size, protect_size, distance) < 0:
        raise ValueError(f"out of range: {r=}, {start_size=}, {protect_size=}, {distance=}")
    if score not in ("sum", "mean") or selection not in ("topk", "official") or stage1 not in ("merge", "evict"):
        raise ValueError(f"no such variant: {score=}, {selection=}, {stage1=}")
    if position_mode not in ("original", "cache_len"):
        raise ValueError(f"no such variant: {position_mode=}")
    if visual is not None and len(visual) != n:
        raise ValueError(f"visual marks {len(visual)} tokens of {n}")
    group = q_heads // kv_heads

    hands: list[common.Hand] = [{} for _ in range(kv_heads)]
    out = np.zeros((n, q_heads, dim))

    def step(t: int, place: int) -> list[common.Probs]:
        """Appends and attends; returns the probabilities of each query head."""
        for h in range(kv_heads):
            hands[h][t] = common.Token(common.rope(k[t, h], place, base), v[t, h])
        given = []
        for x in range(q_heads):
            out[t, x], probs = attend(common.rope(q[t, x], place, base), hands[x // group])
            given.append(probs)
        return given

    def call(start: int, stop: int, scores: Scores) -> common.Call:
        kept = [sorted(hand) for hand in hands]
        held = [dict(sorted(hand.items())) for hand in hands]
        return common.Call(out[start:stop], kept, [dict(scores) for _ in hands], held)

    prompt = calls[0]
    rows = [step(t, t) for t in range(prompt)]
    scores = importance([[row[x] for row in rows] for x in range(q_heads)], score)
    buckets = plan(scores, r, start_size=start_size, protect_size=protect_size, selection=selection, stage1=stage1)
    hands[:] = [merge(hand, buckets) for hand in hands]
    fixed = fixed_point(prompt - removed(prompt, r), start_size, distance)
    results = [call(0, prompt, scores)]

    start = prompt
    for c in calls[1:]:
        for t in range(start, start + c):
            step(t, t if position_mode == "original" else len(hands[0]))
            gone = victim(sorted(hands[0]), t + 1, fixed, r)
            for hand in hands:
                hand.pop(gone, None)
        results.append(call(start, start + c, {}))
        start += c
    return results

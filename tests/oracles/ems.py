"""EMS (reconstruction): drop what is irrelevant, then merge the less important tokens into the important ones.

Source: arXiv:2412.08521, as far as its abstracts and reviews tell. A token's score combines the attention of all
queries (global) with that of the last few (local). The best tokens outside the window are centres; the next best
are each merged into the most redundant centre, or dropped if none is redundant enough (the zero class).
Keys are held as the method caches them: rotated, unless `merge_space="unrotated"`.
"""

import math
from dataclasses import dataclass

import numpy as np

from tests.oracles import common

Scores = dict[int, float]  # original position -> score


@dataclass
class Call(common.Call):
    """s_glo, s_loc: per kv head, the stored sums of each kept position after the call."""

    s_glo: list[Scores] | None = None
    s_loc: list[Scores] | None = None


# ---- scores and classes ----


def align(s_glo: Scores, s_loc: Scores) -> Scores:
    """The local score, scaled to the mean of the global one."""
    total = sum(s_loc.values())
    factor = sum(s_glo.values()) / total if total > 0 else 0.0
    return {p: factor * s for p, s in s_loc.items()}


def combined(s_glo: Scores, s_loc: Scores, combine: str = "max") -> Scores:
    local = align(s_glo, s_loc)
    if combine == "glo":
        return dict(s_glo)
    if combine == "loc":
        return local
    if combine == "mean":
        return {p: (s_glo[p] + local[p]) / 2 for p in s_glo}
    return {p: max(s_glo[p], local[p]) for p in s_glo}


def classify(
    scores: Scores, *, centres: int, max_merge: int, p_keep: float = 0.95
) -> tuple[list[int], list[int], list[int]]:
    """The candidates of one head as (important, to be merged, irrelevant), each best first."""
    order = common.best(scores, len(scores))
    sums = np.cumsum([scores[p] for p in order])
    relevant = 1 + sum(s < p_keep * sums[-1] for s in sums)
    merged = min(max(relevant - centres, 0), max_merge)
    return order[:centres], order[centres : centres + merged], order[centres + merged :]


# ---- merging ----


def norm(x: np.ndarray) -> float:
    return max(math.sqrt(x @ x), 1e-6)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / (norm(a) * norm(b))


def redundancy_of(a: common.Token, b: common.Token, kind: str = "clipped") -> float:
    of_keys, of_values = cosine(a.key, b.key), cosine(a.value, b.value)
    if kind == "raw":
        return of_keys * of_values
    if kind == "key":
        return max(of_keys, 0.0)
    return max(of_keys, 0.0) * max(of_values, 0.0)


def centre_for(
    source: common.Token, important: list[int], hand: common.Hand, *, tau: float = 0.6, kind: str = "clipped"
) -> int | None:
    """Position of the centre that takes `source`; None is the zero class."""
    alike = {c: redundancy_of(source, hand[c], kind) for c in important}
    (nearest,) = common.best(alike, 1)
    return nearest if alike[nearest] >= tau else None


def merge(parts: list[tuple[float, common.Token]]) -> common.Token:
    """Weighted mean of a centre, the first part, and its sources; of the keys, direction and length apart."""
    total = sum(w for w, _ in parts)
    if len(parts) == 1 or total == 0:
        return parts[0][1]
    value = sum(w * token.value for w, token in parts) / total
    direction = sum(w * token.key / norm(token.key) for w, token in parts) / total
    length = sum(w * norm(token.key) for w, token in parts) / total
    return common.Token(length * direction / norm(direction), value)


def compress(
    hand: common.Hand,
    s_glo: Scores,
    scores: Scores,
    *,
    budget: int,
    window: int,
    max_merge: int,
    p_keep: float = 0.95,
    tau: float = 0.6,
    redundancy: str = "clipped",
    transfer_score: bool = True,
) -> tuple[common.Hand, Scores]:
    """What one head holds after evicting and merging, and its global scores."""
    recent = sorted(hand)[-window:]
    candidates = {p: scores[p] for p in hand if p not in recent}
    important, sources, _ = classify(candidates, centres=budget - window, max_merge=max_merge, p_keep=p_keep)
    parts = {c: [(scores[c], hand[c])] for c in important}
    after = {p: s_glo[p] for p in important + recent}
    for i in sorted(sources):
        c = centre_for(hand[i], important, hand, tau=tau, kind=redundancy)
        if c is not None:
            parts[c].append((scores[i], hand[i]))
            after[c] += s_glo[i] if transfer_score else 0.0
    kept = {c: merge(parts[c]) for c in important} | {p: hand[p] for p in recent}
    return dict(sorted(kept.items())), dict(sorted(after.items()))


# ---- the stream ----


def attend(query: np.ndarray, hand: common.Hand) -> tuple[np.ndarray, common.Probs]:
    """Output and probabilities of one rotated query over the tokens it may see, their keys rotated."""
    probs = common.softmax({p: float(query @ token.key) / math.sqrt(len(query)) for p, token in hand.items()})
    return sum(prob * hand[p].value for p, prob in probs.items()), probs


def run(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    calls: list[int],
    *,
    base: float = 10000.0,
    budget: int = 256,
    window: int = 32,
    combine: str = "max",
    p_keep: float = 0.95,
    max_merge: int | None = None,
    tau: float = 0.6,
    redundancy: str = "clipped",
    merge_space: str = "rotated",
    transfer_score: bool = True,
    decode: str = "block",
) -> list[Call]:
    """q is f64[n, Hq, D]; k and v are f64[n, H, D]; none is rotated.

    The first call is the prompt, later calls of one token are decode steps, longer ones are chunks.
    max_merge: M, 4 * (budget - window) if not given.
    decode: "block" compresses when budget + window entries are held, "stepwise" at every token.
    scores of a call are the combined ones of all entries, before eviction.
    """
    if not 1 <= window < budget:
        raise ValueError(f"needs 1 <= window < budget, got window {window}, budget {budget}")
    for name, value, known in (
        ("combine", combine, ("max", "mean", "glo", "loc")),
        ("redundancy", redundancy, ("clipped", "raw", "key")),
        ("merge_space", merge_space, ("rotated", "unrotated")),
        ("decode", decode, ("block", "stepwise")),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}")
    if max_merge is None:
        max_merge = 4 * (budget - window)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    if sum(calls) != n or min(calls) < 1:
        raise ValueError(f"calls must be positive and sum to {n}, got {calls}")

    hands: list[common.Hand] = [{} for _ in range(kv_heads)]
    glo: list[Scores] = [{} for _ in range(kv_heads)]
    loc: list[Scores] = [{} for _ in range(kv_heads)]
    results = []
    start = 0
    for c in calls:
        stop = start + c
        is_step = start > 0 and c == 1
        out = np.zeros((c, q_heads, dim))
        scores = []
        for h in range(kv_heads):
            hand, s_glo, s_loc = hands[h], glo[h], loc[h]
            for p in range(start, stop):
                key = common.rope(k[p, h], p, base) if merge_space == "rotated" else k[p, h]
                hand[p] = common.Token(key, v[p, h])
                s_glo[p] = s_loc[p] = 0.0
            if not is_step:
                s_loc = dict.fromkeys(hand, 0.0)
            elif decode == "stepwise":
                s_loc = {p: (1 - 1 / window) * s for p, s in s_loc.items()}

            turned = hand
            if merge_space == "unrotated":
                turned = {p: common.Token(common.rope(token.key, p, base), token.value) for p, token in hand.items()}
            for p in range(start, stop):
                visible = {j: token for j, token in turned.items() if j <= p}
                rows = []
                for x in range(h * group, (h + 1) * group):
                    out[p - start, x], probs = attend(common.rope(q[p, x], p, base), visible)
                    rows.append(probs)
                for j, prob in common.average(rows).items():
                    s_glo[j] += prob
                    s_loc[j] += prob if p >= stop - window else 0.0
            if is_step and decode == "block" and len(hand) <= budget:
                s_loc = dict.fromkeys(hand, 0.0)

            s = combined(s_glo, s_loc, combine)
            scores.append(s)
            full = budget + window if is_step and decode == "block" else budget + 1
            compressed = len(hand) >= full
            if compressed:
                hand, s_glo = compress(
                    hand,
                    s_glo,
                    s,
                    budget=budget,
                    window=window,
                    max_merge=max_merge,
                    p_keep=p_keep,
                    tau=tau,
                    redundancy=redundancy,
                    transfer_score=transfer_score,
                )
            reset = decode == "block" and (compressed or not is_step)
            hands[h], glo[h] = hand, s_glo
            loc[h] = {p: 0.0 if reset else s_loc[p] for p in hand}
        results.append(
            Call(
                out,
                [list(hand) for hand in hands],
                scores,
                [dict(hand) for hand in hands],
                [dict(x) for x in glo],
                [dict(x) for x in loc],
            )
        )
        start = stop
    return results

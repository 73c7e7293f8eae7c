"""Locret: scores from a small trained network, fixed when a token arrives, choose what a prompt read in chunks leaves.

Source: Huang et al. 2024, arXiv:2410.01805, and what its authors' code settles: labels scaled by 1/sqrt(D), smoothing
summed over layers, no stabilizers in the last chunk. Reconstructions, which neither has: turns after the first,
eviction while decoding, the query's places held by force, true positions in place of ranks, older of equal scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.oracles import common
from tests.oracles.streaming_llm import rank_places

# ---- the retaining head ----


def silu(x: float) -> float:
    return x / (1 + float(np.exp(-x)))


def perceptron(x: np.ndarray, w1: np.ndarray, w2: np.ndarray) -> np.ndarray:
    """silu(x W1) W2, no biases and nothing after it."""
    hidden = np.array([silu(float(x @ column)) for column in w1.T])
    return np.array([float(hidden @ column) for column in w2.T])


def head(q: np.ndarray, k: np.ndarray, v: np.ndarray, w1: np.ndarray, w2: np.ndarray) -> np.ndarray:
    """The score f64[H] of one token in each kv head, from all heads of its own q f64[Hq, D], k and v f64[H, D].

    Neither q nor k is rotated. w1 is f64[(Hq + 2 H) D, R], its rows in the order q, k, v; w2 is f64[R, H].
    """
    x = np.array([float(number) for part in (q, k, v) for row in part for number in row])
    return perceptron(x, np.asarray(w1, np.float64), np.asarray(w2, np.float64))


# ---- training ----


def labels(
    q: np.ndarray,
    k: np.ndarray,
    q_positions: Sequence[int],
    *,
    base: float = 10000.0,
    k_positions: Sequence[int] | None = None,
    scaled: bool = True,
) -> np.ndarray:
    """What a head should say of each prompt token: the largest logit any query of the answer has for it, f64[H, m].

    q is f64[a, Hq, D], the answer's; k is f64[m, H, D], the prompt's, from position 0 unless `k_positions` is given;
    neither is rotated. Query heads of one group count alike. `scaled=False` leaves out 1/sqrt(D), as the paper's
    formula does.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    answers, q_heads, dim = q.shape
    prompt, kv_heads, _ = k.shape
    group = q_heads // kv_heads
    places = range(prompt) if k_positions is None else k_positions
    wanted = np.full((kv_heads, prompt), -np.inf)
    for h in range(kv_heads):
        for j in range(prompt):
            key = common.rope(k[j, h], places[j], base)
            for a in range(answers):
                for x in range(h * group, (h + 1) * group):
                    logit = float(common.rope(q[a, x], q_positions[a], base) @ key)
                    wanted[h, j] = max(wanted[h, j], logit / dim**0.5 if scaled else logit)
    return wanted


def smooth_l1(z: float) -> float:
    return 0.5 * z * z if abs(z) < 1 else abs(z) - 0.5


def regression(s: np.ndarray, wanted: np.ndarray) -> float:
    """The error of one layer: mean over heads and tokens; both are f64[H, T]."""
    errors = [smooth_l1(float(z)) for row in s - wanted for z in row]
    return sum(errors) / len(errors)


def roughness(s: np.ndarray) -> float:
    """Mean squared step from a token to the next in one layer, over heads; none for a single token."""
    steps = [float(b - a) ** 2 for row in s for a, b in zip(row[:-1], row[1:], strict=True)]
    return sum(steps) / len(steps) if steps else 0.0


def loss(s: np.ndarray, wanted: np.ndarray, *, alpha: float = 0.0025, smooth_reduction: str = "sum") -> float:
    """The loss of one example; both are f64[L, H, T].

    The error is averaged over layers and the roughness summed, as in the authors' code; `smooth_reduction="mean"`
    averages it too, as in the paper.
    """
    if smooth_reduction not in ("sum", "mean"):
        raise ValueError(f"no such variant: {smooth_reduction=}")
    s, wanted = np.asarray(s, np.float64), np.asarray(wanted, np.float64)
    layers = len(s)
    error = sum(regression(a, b) for a, b in zip(s, wanted, strict=True)) / layers
    rough = sum(roughness(a) for a in s)
    return error + alpha * (rough if smooth_reduction == "sum" else rough / layers)


def recall(s: np.ndarray, wanted: np.ndarray) -> float:
    """How much of the labels' top tenth is in the scores' top tenth, mean over layers and heads; both f64[L, H, T].

    A tenth is rounded down, but is at least one token; of equals, the older.
    """
    found = []
    for layer, other in zip(s, wanted, strict=True):
        for a, b in zip(layer, other, strict=True):
            count = max(1, len(a) // 10)
            tops = [set(common.best(dict(enumerate(row)), count)) for row in (a, b)]
            found.append(len(tops[0] & tops[1]) / count)
    return sum(found) / len(found)


def learning_rate(step: int, warm_up: int = 2000, steps: int = 3000, peak: float = 5e-4) -> float:
    """From 0 up to the peak at `warm_up`, from there down to 0 at `steps`, both straight."""
    if step < warm_up:
        return peak * step / warm_up
    return peak * (steps - step) / (steps - warm_up) if step < steps else 0.0


# ---- one stream ----


@dataclass
class Reading(common.Call):
    """A call and the passes it was read in: chunks, then the tail.

    A call's scores are those of all tokens that were in hand during it; a pass's, of those in hand before its eviction.
    A pass without queries is an eviction that made room for the next.
    """

    passes: list[common.Call] = field(default_factory=list)


def survivors(scores: dict[int, float], budget: int, *, stabilizers: int = 0, protect: int = 0) -> list[int]:
    """The positions left: the newest `stabilizers` in hand, those below `protect`, and the best of the others."""
    if len(scores) <= budget:
        return sorted(scores)
    order = sorted(scores)
    forced = [p for rank, p in enumerate(order) if p < protect or rank >= len(order) - stabilizers]
    others = {p: score for p, score in scores.items() if p not in forced}
    return sorted(forced + common.best(others, budget - len(forced)))


def run(
    q,
    k,
    v,
    calls,
    *,
    scores: np.ndarray,
    budget: int,
    stabilizers: int,
    tail: int,
    chunk: int,
    base: float = 10000.0,
    position_mode: str = "rank",
    bounded_decode: int | None = None,
    protect: int = 0,
    capacity: int | None = None,
    max_new: int = 0,
) -> list[Reading]:
    """`scores` is f64[n, H], what the head says of each token.

    The first call is the prompt; later calls of one token are decode steps, and longer ones are turns, read as the
    prompt is, with all that is in hand as candidates. Reported scores are the head's, also for what stays by force.

    `position_mode="rank"` numbers tokens by rank in hand, queries included; "original" by place in the stream.
    `bounded_decode` evicts after every so many decode steps since the last turn (the chunk size, as meant); None never.
    `protect` is how many of the first tokens no eviction takes: a leading token, if any, and the query after it.
    `capacity` evicts before a tail that would not fit it together with `max_new` generated tokens; None never.
    """
    q, k, v, scores = (np.asarray(x, np.float64) for x in (q, k, v, scores))
    n, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    if k.shape != (n, kv_heads, dim) or v.shape != k.shape or q_heads % kv_heads or dim % 2:
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}")
    if scores.shape != (n, kv_heads):
        raise ValueError(f"scores must be {(n, kv_heads)}, got {scores.shape}")
    if sum(calls) != n or any(c < 1 for c in calls):
        raise ValueError(f"calls must be positive and sum to {n}, got {calls}")
    if min(stabilizers, protect, tail, max_new) < 0 or min(chunk, budget) < 1:
        raise ValueError(f"out of range: {stabilizers=}, {protect=}, {tail=}, {max_new=}, {chunk=}, {budget=}")
    if bounded_decode is not None and bounded_decode < 1:
        raise ValueError(f"bounded_decode must be None or at least 1, got {bounded_decode}")
    if stabilizers + protect >= budget:
        raise ValueError(f"needs stabilizers + protect < budget, got {stabilizers} + {protect}, {budget}")
    if capacity is not None and capacity < budget + tail + max_new:
        raise ValueError(f"capacity {capacity} is below budget + tail + max_new = {budget} + {tail} + {max_new}")
    if position_mode not in ("rank", "original"):
        raise ValueError(f"no such variant: {position_mode=}")
    group = q_heads // kv_heads
    place = rank_places if position_mode == "rank" else common.true_places
    hands: list[common.Hand] = [{} for _ in range(kv_heads)]

    def read(start: int, stop: int, evict: int | None) -> common.Call:
        """Appends and attends; then evicts with `evict` stabilizers, unless that is None."""
        out = np.zeros((stop - start, q_heads, dim))
        stood, kept = [], []
        for h, hand in enumerate(hands):
            for p in range(start, stop):
                hand[p] = common.Token(k[p, h], v[p, h])
            places = place(hand)
            for p in range(start, stop):
                for x in range(h * group, (h + 1) * group):
                    out[p - start, x], _ = common.attend(q[p, x], p, hand, places, base)
            stood.append({p: float(scores[p, h]) for p in hand})
            stay = sorted(hand) if evict is None else survivors(stood[h], budget, stabilizers=evict, protect=protect)
            hands[h] = {p: hand[p] for p in stay}
            kept.append(stay)
        return common.Call(out, kept, stood)

    def turn(start: int, stop: int) -> list[common.Call]:
        passes = []
        end = max(start, stop - tail)
        for i in range(start, end, chunk):
            until = min(i + chunk, end)
            passes.append(read(i, until, 0 if until == end else stabilizers))
        if capacity is not None and len(hands[0]) + stop - end + max_new > capacity:
            passes.append(read(end, end, stabilizers))
        if end < stop:
            passes.append(read(end, stop, None))
        return passes

    results = []
    start = generated = 0
    for number, c in enumerate(calls):
        if number and c == 1:
            generated += 1
            full = bounded_decode is not None and generated % bounded_decode == 0
            passes = [read(start, start + 1, stabilizers if full else None)]
        else:
            generated = 0
            passes = turn(start, start + c)
        out = np.concatenate([part.out for part in passes])
        met = [{p: s for part in passes for p, s in part.scores[h].items()} for h in range(kv_heads)]
        results.append(Reading(out, passes[-1].kept, met, passes=passes))
        start += c
    return results

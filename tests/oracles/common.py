"""What the oracles share: rotation, softmax, attention over live tokens, and the loop over calls.

An oracle follows one stream, in float64. Each kv head holds a dict from original position to Token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Probs = dict[int, float]  # original position -> probability


@dataclass(frozen=True)
class Token:
    """What one kv head stores of one token; the key is not rotated."""

    key: np.ndarray  # f64[D]
    value: np.ndarray  # f64[D]


Hand = dict[int, Token]  # original position -> token, for one kv head


@dataclass
class Call:
    """What one call returned and left behind.

    out: f64[c, Hq, D].
    kept: per kv head, the sorted original positions held after the call.
    scores: per kv head, the score of every token that stood for the choice, losers too;
      empty dicts where the method has no score.
    held: per kv head, what is stored for each position in `kept`: key as it is cached (rotated, if the method
      caches rotated keys) and value; None where the method stores tokens as they came.
    """

    out: np.ndarray
    kept: list[list[int]]
    scores: list[dict[int, float]]
    held: "list[Hand] | None" = None


def rope(x: np.ndarray, position: float, base: float = 10000.0) -> np.ndarray:
    """Rotates one vector; coordinate i is paired with coordinate i + D/2."""
    dim = len(x)
    half = dim // 2
    rotated = np.zeros(dim)
    for i in range(half):
        angle = position * base ** (-2 * i / dim)
        c, s = np.cos(angle), np.sin(angle)
        rotated[i] = x[i] * c - x[i + half] * s
        rotated[i + half] = x[i + half] * c + x[i] * s
    return rotated


def softmax(logits: dict[int, float]) -> Probs:
    top = max(logits.values())
    weights = {p: float(np.exp(x - top)) for p, x in logits.items()}
    total = sum(weights.values())
    return {p: w / total for p, w in weights.items()}


def scaled_logits(
    query: np.ndarray, position: int, hand: Hand, places: dict[int, int], base: float
) -> dict[int, float]:
    """Logits of one query at original `position`, for the tokens it may see.

    `places` gives each original position the one it is rotated to.
    """
    turned = rope(query, places[position], base)
    scale = len(query) ** -0.5
    return {
        p: scale * float(turned @ rope(token.key, places[p], base))
        for p, token in sorted(hand.items())
        if p <= position
    }


def attend(
    query: np.ndarray, position: int, hand: Hand, places: dict[int, int], base: float
) -> tuple[np.ndarray, Probs]:
    """Output f64[D] of one query, and its probabilities."""
    probs = softmax(scaled_logits(query, position, hand, places, base))
    out = np.zeros(len(query))
    for p, prob in probs.items():
        out = out + prob * hand[p].value
    return out, probs


def average(rows: list[Probs]) -> Probs:
    """Mean of several queries' probabilities over the same tokens."""
    return {p: sum(row[p] for row in rows) / len(rows) for p in rows[0]}


def best(scores: dict[int, float], count: int) -> list[int]:
    """The `count` positions with the largest scores; of equals, the lower position."""
    return sorted(scores, key=lambda p: (-scores[p], p))[:count]


def true_places(hand: Hand) -> dict[int, int]:
    return {p: p for p in hand}


@dataclass
class Seen:
    """What a method may look at when it chooses: the state after attention, before eviction."""

    now: int  # position of the newest token
    hands: list[Hand]  # per kv head
    probs: list[list[list[Probs]]]  # [kv head][query of the call][query head of the group]


Choice = tuple[list[list[int]], list[dict[int, float]]]  # kept and scores, per kv head


def replay(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    calls: list[int],
    *,
    base: float,
    choose: Callable[[Seen], Choice],
    place: Callable[[Hand], dict[int, int]] = true_places,
) -> list[Call]:
    """Runs the calls in turn: append, attend causally, choose, drop the rest.

    q is f64[n, Hq, D]; k and v are f64[n, H, D]; none is rotated.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    if k.shape != (n, kv_heads, dim) or v.shape != k.shape or q_heads % kv_heads or dim % 2:
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}")
    if sum(calls) != n or any(c < 1 for c in calls):
        raise ValueError(f"calls must be positive and sum to {n}, got {calls}")
    group = q_heads // kv_heads

    hands: list[Hand] = [{} for _ in range(kv_heads)]
    results = []
    start = 0
    for c in calls:
        stop = start + c
        out = np.zeros((c, q_heads, dim))
        probs = []
        for h in range(kv_heads):
            for p in range(start, stop):
                hands[h][p] = Token(k[p, h], v[p, h])
            places = place(hands[h])
            rows = []
            for p in range(start, stop):
                row = []
                for x in range(h * group, (h + 1) * group):
                    out[p - start, x], given = attend(q[p, x], p, hands[h], places, base)
                    row.append(given)
                rows.append(row)
            probs.append(rows)

        kept, scores = choose(Seen(stop - 1, hands, probs))
        kept = [sorted(positions) for positions in kept]
        for h in range(kv_heads):
            hands[h] = {p: hands[h][p] for p in kept[h]}
        results.append(Call(out, kept, scores))
        start = stop
    return results


def regrouped(steps: list[Call], calls: list[int]) -> list[Call]:
    """Steps of one token each as `calls` of several, which leave behind what their last step left."""
    results = []
    for c in calls:
        mine, steps = steps[:c], steps[c:]
        last = mine[-1]
        results.append(Call(np.concatenate([step.out for step in mine]), last.kept, last.scores, last.held))
    return results

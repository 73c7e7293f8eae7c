"""D2O: evict as H2O does, sparing the first tokens, then fold an evicted token into the kept one it is most like.

Source: Wan et al. 2024, arXiv:2406.13035, with the scores, the timing and the gate of its official code.
`run` follows one layer of given sizes that compresses at the end of every call; `density` and `allocate` are
how the sizes of all layers come from the prompt. Tokens hold ROTATED keys here: similarity is measured, and
merging is done, between keys as they are cached.
"""

import math
from dataclasses import dataclass

import numpy as np

from tests.oracles import common

Scores = dict[int, float]  # original position -> attention received so far

TINY = 1e-12  # added to norms


@dataclass
class Call(common.Call):
    """tau: the threshold after the call; None while nothing was evicted."""

    tau: float | None = None


# ---- layer level ----


def density_of_columns(columns: np.ndarray) -> float:
    """f of a layer, from the attention each key received, f64[Hq, T]."""
    heads, keys = columns.shape
    spread = [sum((x - row.mean()) ** 2 for x in row) / (keys - 1) if keys > 1 else 0.0 for row in columns]
    low, high = min(spread), max(spread)
    return sum((x - low) / (high - low + 1e-6) for x in spread) / heads


def density(probs: np.ndarray) -> float:
    """f of a layer, from the probabilities of one prompt, f64[Hq, T, T] with queries before keys."""
    return density_of_columns(np.asarray(probs, np.float64).sum(axis=1))


def layer_weights(f: list[float]) -> list[float]:
    """Softmax over the layers of -f."""
    weights = [math.exp(-x) for x in f]
    return [w / sum(weights) for w in weights]


def layer_shares(f: list[float], rho: float) -> list[float]:
    """alpha: what part of the prompt each layer keeps."""
    return [min(max(w * len(f) * rho, 0.01), 1.0) for w in layer_weights(f)]


def allocate(
    f: list[float], rho_h: float, rho_r: float, entries: int, *, sinks: int = 4, exempt: tuple[int, ...] | None = None
) -> list[tuple[int, int] | None]:
    """(heavy, window) of each layer; None for a layer that is never compressed.

    exempt: layers never compressed; the first two and the last if not given.
    """
    rho = rho_h + rho_r
    if exempt is None:
        exempt = (0, 1, len(f) - 1)
    sizes: list[tuple[int, int] | None] = []
    for layer, alpha in enumerate(layer_shares(f, rho)):
        heavy = math.floor(entries * (alpha * rho_h / rho) + 1e-9)
        window = math.floor(entries * (alpha * rho_r / rho) + 1e-9)
        sizes.append(None if layer in exempt else (max(heavy, sinks + 1), max(window, 1)))
    return sizes


# ---- token level ----


def select(scores: Scores, *, heavy: int, window: int, sinks: int) -> list[int]:
    """Positions kept: the newest `window` and the best `heavy` of the others, among them the sinks."""
    ordered = sorted(scores)
    if len(ordered) <= heavy + window:
        return ordered
    older, recent = ordered[:-window], ordered[-window:]
    ranked = {p: math.inf if p < sinks else scores[p] for p in older}
    return sorted(common.best(ranked, heavy) + recent)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b) / ((math.sqrt(a @ a) + TINY) * (math.sqrt(b @ b) + TINY))


def nearest(evicted: int, hand: common.Hand, kept: list[int]) -> tuple[int, float]:
    """The kept position whose key is most like the evicted one's, and their cosine."""
    alike = {c: cosine(hand[evicted].key, hand[c].key) for c in kept}
    (target,) = common.best(alike, 1)
    return target, alike[target]


def move(tau: float | None, alike: np.ndarray, beta: float) -> float:
    """The threshold after an eviction whose best cosines are `alike`, f64[H, E]."""
    return float(alike.mean()) if tau is None else (1 - beta) * tau + beta * float(alike.mean())


def passes(alike: np.ndarray, tau: float, gate: str, first: bool) -> np.ndarray:
    """Which evicted tokens are merged, bool[H, E]; column e is the e-th evicted position of each head."""
    if gate == "per_head":
        return alike >= tau
    if first and alike.shape[1] == 1:  # tau is this very mean
        return np.full(alike.shape, True)
    return np.tile(alike.mean(axis=0) >= tau, (len(alike), 1))


def fold(target: common.Token, parts: list[tuple[common.Token, float]], weights: str) -> common.Token:
    """`target` with `parts`, each a token and its cosine to the target, merged into it."""
    if weights == "exp":
        own, given = math.e, [math.exp(u) for _, u in parts]
        total = own + sum(given)
    else:
        own, given = 1.0, [u for _, u in parts]
        total = 1 + len(parts)
    key, value = own * target.key, own * target.value
    for w, (token, _) in zip(given, parts, strict=True):
        key, value = key + w * token.key, value + w * token.value
    return common.Token(key / total, value / total)


def compress(
    hands: list[common.Hand],
    scores: list[Scores],
    tau: float | None,
    *,
    heavy: int,
    window: int,
    sinks: int,
    beta: float = 0.7,
    weights: str = "exp",
    gate: str = "rank_mean",
    into_sinks: bool = True,
) -> tuple[list[common.Hand], float | None]:
    """What each kv head holds after eviction and merging, and the new threshold."""
    kept = [select(s, heavy=heavy, window=window, sinks=sinks) for s in scores]
    evicted = [sorted(set(hand) - set(left)) for hand, left in zip(hands, kept, strict=True)]
    if not evicted[0]:
        return hands, tau

    open_to = kept if into_sinks else [[c for c in left if c >= sinks] for left in kept]
    found = [[nearest(p, hands[h], open_to[h]) for p in evicted[h]] for h in range(len(hands))]
    alike = np.array([[u for _, u in row] for row in found])
    new_tau = move(tau, alike, beta)
    merged = passes(alike, new_tau, gate, first=tau is None)

    after = []
    for h, hand in enumerate(hands):
        parts: dict[int, list[tuple[common.Token, float]]] = {c: [] for c in kept[h]}
        for e, p in enumerate(evicted[h]):
            if merged[h, e]:
                target, u = found[h][e]
                parts[target].append((hand[p], u))
        after.append({c: fold(hand[c], parts[c], weights) if parts[c] else hand[c] for c in kept[h]})
    return after, new_tau


# ---- the stream ----


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
    heavy: int,
    window: int,
    sinks: int = 4,
    beta: float = 0.7,
    weights: str = "exp",
    gate: str = "rank_mean",
    into_sinks: bool = True,
) -> list[Call]:
    """q is f64[n, Hq, D]; k and v are f64[n, H, D]; none is rotated. `heavy` includes the sinks.

    Without `into_sinks` the first tokens stay as they came: nothing is compared with them, nor merged into them.
    """
    if not (0 <= sinks <= heavy and window >= 1):
        raise ValueError(f"needs 0 <= sinks <= heavy and window >= 1, got {sinks}, {heavy}, {window}")
    if weights not in ("exp", "code_mean") or gate not in ("rank_mean", "per_head"):
        raise ValueError(f"unknown weights {weights!r} or gate {gate!r}")
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    if sum(calls) != n or min(calls) < 1:
        raise ValueError(f"calls must be positive and sum to {n}, got {calls}")

    hands: list[common.Hand] = [{} for _ in range(kv_heads)]
    scores: list[Scores] = [{} for _ in range(kv_heads)]
    tau = None
    results = []
    start = 0
    for c in calls:
        stop = start + c
        out = np.zeros((c, q_heads, dim))
        for h in range(kv_heads):
            for p in range(start, stop):
                hands[h][p] = common.Token(common.rope(k[p, h], p, base), v[p, h])
                scores[h][p] = 0.0
            for p in range(start, stop):
                rows = []
                for x in range(h * group, (h + 1) * group):
                    out[p - start, x], probs = attend(common.rope(q[p, x], p, base), p, hands[h])
                    rows.append(probs)
                for j, prob in common.average(rows).items():
                    scores[h][j] += prob

        hands, tau = compress(
            hands,
            scores,
            tau,
            heavy=heavy,
            window=window,
            sinks=sinks,
            beta=beta,
            weights=weights,
            gate=gate,
            into_sinks=into_sinks,
        )
        hands = [dict(sorted(hand.items())) for hand in hands]
        results.append(Call(out, [list(hand) for hand in hands], scores, [dict(hand) for hand in hands], tau))
        scores = [{p: s[p] for p in hand} for s, hand in zip(scores, hands, strict=True)]
        start = stop
    return results

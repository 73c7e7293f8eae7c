"""MiKV: every token stays, the important ones at high precision and the rest at few bits.

Source: Yang et al. 2024, arXiv:2402.18096. Importance is H2O's: attention received so far, summed over the
query heads of a kv head, and the newest tokens; or SnapKV's votes. The first call is the prompt.
"""

from fractions import Fraction

import numpy as np

from tests.oracles import common
from tests.oracles.quantiser import balancer, rounded
from tests.oracles.snapkv import ballot

POOL = 5  # neighbours over which votes are averaged


def tier_sizes(t: int, ratio: float, heavy_share: float = 0.5) -> tuple[int, int]:
    """n_hi and n_rec after t tokens: the size of the high tier, and how many of it are there for being new."""
    n_hi = int(Fraction(ratio).limit_denominator(1000) * t)
    return n_hi, int((1 - Fraction(heavy_share).limit_denominator(1000)) * n_hi)


def first_high(mass: dict[int, float], n_hi: int, n_rec: int) -> list[int]:
    """The high tier of a prompt: its newest tokens, and of the others those of largest mass."""
    older = {p: m for p, m in mass.items() if p < len(mass) - n_rec}
    recent = [p for p in mass if p not in older]
    return sorted(recent + common.best(older, n_hi - n_rec))


def demote(high: list[int], mass: dict[int, float], t: int, n_hi: int, n_rec: int) -> list[int]:
    """The high tier left once it is n_hi tokens: the least mass goes first, of equals the higher position."""
    high = sorted(high)
    while len(high) > n_hi:
        high.remove(min((p for p in high if p < t - n_rec), key=lambda p: (mass[p], -p)))
    return high


def coded(token: common.Token, bits: int, group: int, bal: np.ndarray) -> common.Token:
    """The token as attention reads it from `bits` bits; (q / bal) . khat is written q . (khat / bal)."""
    if bits == 16:
        return token
    return common.Token(rounded(token.key * bal, bits, group) / bal, rounded(token.value, bits, group))


class Head:
    """One kv head; queries and keys come rotated."""

    def __init__(self, ratio, low_bits, high_bits, group, balance, heavy_share, twice, mean, window):
        self.ratio, self.heavy_share, self.mean, self.window = ratio, heavy_share, mean, window
        self.low_bits, self.high_bits, self.group = low_bits, high_bits, group
        self.balance, self.twice = balance, twice
        self.bal: np.ndarray | None = None
        self.exact: common.Hand = {}
        self.held: common.Hand = {}
        self.high: list[int] = []
        self.mass: dict[int, float] = {}
        self.votes: dict[int, float] = {}

    def call(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Takes q f64[c, G, D], k and v f64[c, D]; returns f64[c, G, D]."""
        prompt = self.bal is None
        new = range(len(self.exact), len(self.exact) + len(k))
        for i, p in enumerate(new):
            self.exact[p] = common.Token(k[i], v[i])
            self.held[p] = self.exact[p] if prompt else self.encode(p, self.high_bits)
            self.mass[p] = 0.0

        out, rows = self.attend(q, new)

        t = len(self.exact)
        n_hi, n_rec = tier_sizes(t, self.ratio, self.heavy_share)
        worth = {p: m / (t - p if self.mean else 1) for p, m in self.mass.items()}  # t - p queries have seen token p
        if self.window is not None:
            n_rec = max(n_rec, min(self.window, n_hi))
            worth = self.voted(rows, [*self.high, *new])
        if prompt:
            self.bal = balancer(q, k) if self.balance else np.ones(k.shape[1])
            self.high = first_high(worth, n_hi, n_rec)
            for p in new:
                self.held[p] = self.encode(p, self.high_bits if p in self.high else self.low_bits)
        else:
            entered = [*self.high, *new]
            self.high = demote(entered, worth, t, n_hi, n_rec)
            for p in entered:
                if p not in self.high:
                    self.held[p] = self.encode(p, self.low_bits, again=self.twice)
        return out

    def voted(self, rows: list[list[common.Probs]], high: list[int]) -> dict[int, float]:
        """The votes of the tokens that are high or new, those of this call added; no others stand for the choice."""
        seen = [[{p: row[p] for p in row if p in high} for row in query] for query in rows]
        given = ballot(seen, high, max(high), self.window, POOL)
        self.votes = {p: self.votes.get(p, 0.0) + given[p] for p in high}
        return self.votes

    def attend(self, q: np.ndarray, new: range) -> tuple[np.ndarray, list[list[common.Probs]]]:
        """Outputs, and the probabilities of each query head of each query."""
        out, rows = np.zeros(q.shape), []
        unturned = dict.fromkeys(self.held, 0)  # keys are stored rotated
        for i, p in enumerate(new):
            rows.append([])
            for x in range(q.shape[1]):
                out[i, x], probs = common.attend(q[i, x], p, self.held, unturned, 1.0)
                rows[-1].append(probs)
                for seen, prob in probs.items():
                    self.mass[seen] += prob
        return out, rows

    def encode(self, p: int, bits: int, again: bool = False) -> common.Token:
        return coded(self.held[p] if again else self.exact[p], bits, self.group, self.bal)


def run(
    q,
    k,
    v,
    calls,
    *,
    base=10000.0,
    ratio: float = 0.2,
    low_bits: int = 2,
    high_bits: int = 16,
    group: int | None = None,
    balance: bool = True,
    heavy_share: float = 0.5,
    twice: bool = False,
    mean: bool = False,
    window: int | None = None,
) -> list[common.Call]:
    """`kept` is the high tier; `scores` is the mass of every token; `held` is every token.

    A demoted token is rounded from the original, or with `twice` from its high-tier codes (16 bits: no difference).
    With `mean`, tokens are important by their mass over the number of queries that have seen them; with `window`, by
    the votes of that many last queries of each call, and so many of the newest are high as far as the tier goes.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, kv_heads, dim = k.shape
    if sum(calls) != n or any(c < 1 for c in calls):
        raise ValueError(f"calls must be positive and sum to {n}, got {calls}")
    if not (0 <= ratio <= 1 and 0 <= heavy_share <= 1):
        raise ValueError(f"ratio and heavy_share are fractions, got {ratio} and {heavy_share}")
    q, k = (np.array([[common.rope(x, p, base) for x in row] for p, row in enumerate(rows)]) for rows in (q, k))
    q = q.reshape(n, kv_heads, -1, dim)
    heads = [
        Head(ratio, low_bits, high_bits, group or dim // 2, balance, heavy_share, twice, mean, window)
        for _ in range(kv_heads)
    ]
    results = []
    start = 0
    for c in calls:
        now = slice(start, start + c)
        out = np.concatenate([head.call(q[now, h], k[now, h], v[now, h]) for h, head in enumerate(heads)], axis=1)
        kept, scores = [head.high for head in heads], [dict(head.mass) for head in heads]
        results.append(common.Call(out, kept, scores, [dict(head.held) for head in heads]))
        start += c
    return results

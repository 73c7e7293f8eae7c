"""SnapKV: the newest tokens and, of the older ones, those the newest queries voted for.

Source: Li et al. 2024, arXiv:2404.14469. Differs: votes are kept and added to by later calls,
the queries of a group are averaged, and the pool is a mean.
"""

from tests.oracles import common


def smooth(mass: list[float], pool: int) -> list[float]:
    """Centred mean over `pool` neighbours; beyond the ends there are zeros."""
    reach = pool // 2
    smoothed = []
    for i in range(len(mass)):
        total = 0.0
        for j in range(i - reach, i + reach + 1):
            if 0 <= j < len(mass):
                total += mass[j]
        smoothed.append(total / pool)
    return smoothed


def ballot(rows: list[list[common.Probs]], in_hand, now: int, window: int, pool: int) -> dict[int, float]:
    """Votes that one call gives to the tokens in hand of one kv head.

    `rows` holds the probabilities of the call's queries, oldest first, each a list over the group.
    """
    positions = sorted(in_hand)
    mass = dict.fromkeys(positions, 0.0)
    for row in rows[-window:]:
        for p, prob in common.average(row).items():
            mass[p] += prob
    if len(rows) == 1:
        return mass

    older = [p for p in positions if p <= now - window]
    smoothed = smooth([mass[p] if p in older else 0.0 for p in positions], pool)
    return {p: s if p in older else 0.0 for p, s in zip(positions, smoothed, strict=True)}


def select(votes: dict[int, float], now: int, budget: int, window: int) -> list[int]:
    recent = [p for p in votes if p > now - window]
    older = {p: n for p, n in votes.items() if p <= now - window}
    return recent + common.best(older, budget - len(recent))


def run(q, k, v, calls, *, base=10000.0, budget: int, window: int = 64, pool: int = 5) -> list[common.Call]:
    if not 1 <= window <= budget:
        raise ValueError(f"needs 1 <= window <= budget, got window {window}, budget {budget}")
    if pool < 1 or pool % 2 == 0:
        raise ValueError(f"pool must be odd, got {pool}")
    votes: dict[int, dict[int, float]] = {}  # kv head -> position -> votes

    def choose(seen):
        kept, scores = [], []
        for h, hand in enumerate(seen.hands):
            given = ballot(seen.probs[h], hand, seen.now, window, pool)
            before = votes.get(h, {})
            after = {p: before.get(p, 0.0) + given[p] for p in hand}
            left = select(after, seen.now, budget, window)
            votes[h] = {p: after[p] for p in left}
            kept.append(left)
            scores.append(after)
        return kept, scores

    return common.replay(q, k, v, calls, base=base, choose=choose)

"""Random eviction, a baseline: each token has a score drawn beforehand, and the largest stay."""

from tests.oracles import common


def run(q, k, v, calls, *, base=10000.0, budget: int, scores) -> list[common.Call]:
    """`scores` is [H, n]: one number for each kv head and original position."""
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")

    def choose(seen):
        drawn = [{p: float(scores[h][p]) for p in hand} for h, hand in enumerate(seen.hands)]
        return [common.best(score, budget) for score in drawn], drawn

    return common.replay(q, k, v, calls, base=base, choose=choose)

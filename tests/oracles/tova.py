"""TOVA: the tokens the newest query looks at most, one choice for all heads of the layer.

Source: Oren et al. 2024, arXiv:2401.06104. Nothing is protected, the newest token included.
"""

from tests.oracles import common


def run(q, k, v, calls, *, base=10000.0, budget: int) -> list[common.Call]:
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")

    def choose(seen):
        # all kv heads hold the same tokens, since every earlier choice was common to them
        last = [probs for rows in seen.probs for probs in rows[-1]]
        score = common.average(last)
        left = common.best(score, budget)
        return [left for _ in seen.hands], [dict(score) for _ in seen.hands]

    return common.replay(q, k, v, calls, base=base, choose=choose)

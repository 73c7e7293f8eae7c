"""KeyDiff: the tokens whose keys point away from the mean direction of the keys.

Source: Park et al. 2025, arXiv:2504.15364. Keys are taken as rotated at their true positions.
"""

import numpy as np

from tests.oracles import common


def unit(x: np.ndarray) -> np.ndarray:
    """x at length one; a zero vector stays zero."""
    length = float(np.sqrt(x @ x))
    return x / length if length > 0 else x


def difference(keys: dict[int, np.ndarray]) -> dict[int, float]:
    """Minus the cosine between each key and the mean of the unit keys."""
    anchor = np.zeros(len(next(iter(keys.values()))))
    for key in keys.values():
        anchor = anchor + unit(key) / len(keys)
    return {p: -float(unit(key) @ unit(anchor)) for p, key in keys.items()}


def run(q, k, v, calls, *, base=10000.0, budget: int) -> list[common.Call]:
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")

    def choose(seen):
        scores = []
        for hand in seen.hands:
            scores.append(difference({p: common.rope(token.key, p, base) for p, token in hand.items()}))
        return [common.best(score, budget) for score in scores], scores

    return common.replay(q, k, v, calls, base=base, choose=choose)

"""Expected attention: keys are scored by the attention that a Gaussian of a call's queries would pay them.

Source: Devoto et al. 2025, arXiv:2510.00636, with the mean and the variance of rotated queries, channel by channel.
"""

import numpy as np

from tests.oracles import common


def expected_weights(queries: list[np.ndarray], keys: dict[int, np.ndarray]) -> common.Probs:
    """Softmax of E[exp(q . k / sqrt D)] for q of independent Gaussian channels: the mean, and half the variance."""
    mean = sum(queries) / len(queries)
    variance = sum((q - mean) ** 2 for q in queries) / len(queries)
    dim = len(mean)
    logits = {}
    for p, key in keys.items():
        logits[p] = float(mean @ key) / dim**0.5 + 0.5 * float(variance @ key**2) / dim
    return common.softmax(logits)


def run(q, k, v, calls, *, base=10000.0, budget: int, window: int, sinks: int = 4) -> list[common.Call]:
    """`scores` has +inf for what is protected."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, q_heads, dim = q.shape
    group = q_heads // k.shape[1]
    turned = [[common.rope(x, p, base) for x in rows] for p, rows in enumerate(q)]
    hands: list[common.Hand] = [{} for _ in range(k.shape[1])]
    fixed: list[dict[int, float]] = [{} for _ in hands]  # scores, until a call of several tokens
    results, start = [], 0
    for count in calls:
        stop = start + count
        out = np.zeros((count, q_heads, dim))
        kept, scores = [], []
        for h, hand in enumerate(hands):
            for p in range(start, stop):
                hand[p] = common.Token(common.rope(k[p, h], p, base), v[p, h])
            mine = range(h * group, (h + 1) * group)
            unturned = dict.fromkeys(hand, 0)
            for p in range(start, stop):
                for x in mine:
                    out[p - start, x], _ = common.attend(turned[p][x], p, hand, unturned, 1.0)
            keys = {p: token.key for p, token in hand.items()}
            asked = range(start, stop)
            weights = common.average([expected_weights([turned[p][x] for p in asked], keys) for x in mine])
            new = {p: weights[p] * float(np.sqrt(token.value @ token.value)) for p, token in hand.items()}
            fixed[h] = new if count > 1 else {**fixed[h], start: new[start]}
            score = {p: fixed[h][p] for p in hand}
            score |= {p: np.inf for p in hand if p < sinks or p >= stop - window}
            kept.append(sorted(common.best(score, budget)))
            scores.append(score)
            hands[h] = {p: hand[p] for p in kept[-1]}
        results.append(common.Call(out, kept, scores))
        start = stop
    return results

"""H2O: the newest tokens and, of the older ones, those that received most attention so far.

Source: Zhang et al. 2023, arXiv:2306.14048, in the form that drops tokens after exact attention
over a whole call, or in the paper's that drops them token by token. Probabilities are averaged over the
query heads of a kv head.
"""

from tests.oracles import common
from tests.oracles.streaming_llm import rank_places


class Ledger:
    """Attention received so far by each token of one kv head."""

    def __init__(self, budget: int, window: int, mass: dict[int, float] | None = None):
        self.budget = budget
        self.window = window
        self.mass = dict(mass or {})

    def observe(self, probs: common.Probs) -> None:
        """Adds what one query gave; a token not met before starts at zero."""
        for p, prob in probs.items():
            self.mass[p] = self.mass.get(p, 0.0) + prob

    def evict(self, now: int) -> list[int]:
        """Forgets what does not fit the budget and returns the positions left."""
        if len(self.mass) > self.budget:
            recent = [p for p in self.mass if p > now - self.window]
            older = {p: m for p, m in self.mass.items() if p not in recent}
            kept = recent + common.best(older, self.budget - len(recent))
            self.mass = {p: self.mass[p] for p in kept}
        return sorted(self.mass)


def run(
    q,
    k,
    v,
    calls,
    *,
    base=10000.0,
    budget: int,
    window: int,
    prefill: str = "dense",
    positions: str = "true",
) -> list[common.Call]:
    """`prefill="greedy"` takes the tokens of every call one at a time, each seeing the survivors of the one before;
    a call's scores are those of its last token. `positions="rolling"` numbers tokens by rank in the cache.
    """
    if not 1 <= window <= budget:
        raise ValueError(f"needs 1 <= window <= budget, got window {window}, budget {budget}")
    if prefill not in ("dense", "greedy") or positions not in ("true", "rolling"):
        raise ValueError(f"no such variant: {prefill=}, {positions=}")
    ledgers: list[Ledger] = []

    def choose(seen):
        if not ledgers:
            ledgers.extend(Ledger(budget, window) for _ in seen.hands)
        kept, scores = [], []
        for h, ledger in enumerate(ledgers):
            for row in seen.probs[h]:
                ledger.observe(common.average(row))
            scores.append(dict(ledger.mass))
            kept.append(ledger.evict(seen.now))
        return kept, scores

    place = rank_places if positions == "rolling" else common.true_places
    if prefill == "dense":
        return common.replay(q, k, v, calls, base=base, choose=choose, place=place)

    if any(c < 1 for c in calls):
        raise ValueError(f"calls must be positive, got {calls}")
    steps = common.replay(q, k, v, [1] * sum(calls), base=base, choose=choose, place=place)
    return common.regrouped(steps, calls)

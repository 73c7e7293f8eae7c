"""H2O: the newest tokens and, of the older ones, those that received most attention so far.

Source: Zhang et al. 2023, arXiv:2306.14048, in the form that drops tokens after exact attention
over a whole call. Probabilities are averaged over the query heads of a kv head.
"""

from tests.oracles import common


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


def run(q, k, v, calls, *, base=10000.0, budget: int, window: int) -> list[common.Call]:
    if not 1 <= window <= budget:
        raise ValueError(f"needs 1 <= window <= budget, got window {window}, budget {budget}")
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

    return common.replay(q, k, v, calls, base=base, choose=choose)

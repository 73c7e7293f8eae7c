"""StreamingLLM: the first tokens and the newest ones, numbered by rank in the cache.

Source: Xiao et al. 2023, arXiv:2309.17453. Chunks attend densely and are trimmed afterwards.
"""

from tests.oracles import common


def rank_places(hand) -> dict[int, int]:
    """Each token's rank among those in hand, oldest first."""
    return {p: rank for rank, p in enumerate(sorted(hand))}


def trim(positions, budget: int, sinks: int) -> list[int]:
    recent = sorted(positions)[-(budget - sinks) :]
    return [p for p in sorted(positions) if p < sinks or p in recent]


def run(q, k, v, calls, *, base=10000.0, budget: int, sinks: int) -> list[common.Call]:
    if not 0 <= sinks < budget:
        raise ValueError(f"needs 0 <= sinks < budget, got sinks {sinks}, budget {budget}")

    def choose(seen):
        return [trim(hand, budget, sinks) for hand in seen.hands], [{} for _ in seen.hands]

    return common.replay(q, k, v, calls, base=base, choose=choose, place=rank_places)

"""Full attention: nothing is dropped."""

from tests.oracles import common


def run(q, k, v, calls, *, base=10000.0) -> list[common.Call]:
    def choose(seen):
        return [list(hand) for hand in seen.hands], [{} for _ in seen.hands]

    return common.replay(q, k, v, calls, base=base, choose=choose)

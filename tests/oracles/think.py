"""ThinK: the key channels that the prompt's last queries use least are dropped from all but the newest keys.

Source: Xu et al. 2024, arXiv:2407.21018, and its code; one set of channels per kv head. The first call is the
prompt. A dropped channel is held as zero: the products with it are the ones left out.
"""

import numpy as np

from tests.oracles import common, h2o


def kept_count(dim: int, ratio: float, round_to: int = 1, paired: bool = False) -> int:
    """d_k = D - int(D ratio), rounded up to a multiple of round_to, and even if channels go in pairs."""
    count = dim - int(dim * ratio)
    count = min(-(-count // round_to) * round_to, dim)
    return count + (dim - count) % 2 if paired else count


def channel_scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Mean q^2 over the window's queries and the group, times mean k^2, per channel: f64[D].

    q is f64[W, G, D], the window; k is f64[m, D], all keys of the prompt; both rotated.
    """
    scores = np.zeros(k.shape[1])
    for j in range(k.shape[1]):
        per_head = [float(np.mean(q[:, x, j] ** 2)) for x in range(q.shape[1])]
        scores[j] = sum(per_head) / len(per_head) * float(np.mean(k[:, j] ** 2))
    return scores


def keep_channels(scores: np.ndarray, count: int, paired: bool = False) -> list[int]:
    """The `count` channels of largest score, ascending; of equals, the lower. Pairs are j and j + D/2."""
    if not paired:
        return sorted(common.best(dict(enumerate(scores)), count))
    half = len(scores) // 2
    pairs = sorted(common.best({j: scores[j] + scores[j + half] for j in range(half)}, count // 2))
    return pairs + [j + half for j in pairs]


def thinned(token: common.Token, keep: list[int]) -> common.Token:
    key = np.zeros(len(token.key))
    key[keep] = token.key[keep]
    return common.Token(key, token.value)


class Head:
    """One kv head; queries and keys come rotated."""

    def __init__(
        self,
        count: int,
        window: int,
        recent: int,
        paired: bool,
        demote_tail: int | None,
        answer: int = 0,
        older: h2o.Ledger | None = None,
    ):
        self.count, self.window, self.recent, self.answer = count, window, recent, answer
        self.paired, self.demote_tail, self.older = paired, demote_tail, older
        self.seen = 0
        self.keep: list[int] | None = None
        self.held: common.Hand = {}
        self.tail: list[int] = []

    def call(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Takes q f64[c, G, D], k and v f64[c, D]; returns f64[c, G, D]."""
        prompt = self.keep is None
        out = np.zeros(q.shape)
        for i in range(len(k)):
            p = self.seen
            self.seen += 1
            self.held[p] = common.Token(k[i], v[i])
            self.tail.append(p)
            unturned = dict.fromkeys(self.held, 0)  # keys are stored rotated
            given = []
            for x in range(q.shape[1]):
                out[i, x], probs = common.attend(q[i, x], p, self.held, unturned, 1.0)
                given.append(probs)
            if self.older:
                self.older.observe(common.average(given))
            most = self.recent + self.answer
            if not prompt and self.demote_tail and len(self.tail) == most + self.demote_tail:
                self.thin(self.left(self.demote_tail))
        if prompt:
            left = self.left(max(len(k) - self.recent, 0))
            keys = np.array([token.key for token in self.held.values()])
            self.keep = keep_channels(channel_scores(q[-self.window :], keys), self.count, self.paired)
            self.thin(left)
        return out

    def left(self, count: int) -> list[int]:
        """Takes the oldest `count` keys from the tail; returns those that are not evicted."""
        left, self.tail = self.tail[:count], self.tail[count:]
        if self.older:
            mass = {p: m for p, m in self.older.mass.items() if p not in self.tail}
            kept = h2o.Ledger(self.older.budget, self.older.window, mass).evict(self.seen - 1)
            for p in set(mass) - set(kept):
                del self.held[p], self.older.mass[p]
        return [p for p in left if p in self.held]

    def thin(self, positions: list[int]) -> None:
        """Takes the dropped channels from these keys."""
        for p in positions:
            self.held[p] = thinned(self.held[p], self.keep)


def run(
    q,
    k,
    v,
    calls,
    *,
    base=10000.0,
    ratio: float = 0.4,
    window: int = 32,
    recent: int = 32,
    round_to: int = 1,
    paired: bool = False,
    demote_tail: int | None = None,
    keep_count: int | None = None,
    answer: int = 0,
    older: tuple[int, int] | None = None,
) -> list[common.Call]:
    """`kept` is the positions of full-width keys; `held` is every token, with zeros for dropped channels, without
    those evicted: `older` is the budget and window of an H2O over the tokens outside the tail.

    `keep_count` sets the number of channels kept, in place of ratio and round_to. `demote_tail` thins so many of the
    oldest keys of the tail whenever it holds that many above recent + answer; None lets it grow.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, kv_heads, dim = k.shape
    if sum(calls) != n or any(c < 1 for c in calls):
        raise ValueError(f"calls must be positive and sum to {n}, got {calls}")
    if window < 1 or recent < 0 or not 0 <= ratio < 1:
        raise ValueError(f"needs window >= 1, recent >= 0, 0 <= ratio < 1, got {window}, {recent}, {ratio}")
    count = keep_count or kept_count(dim, ratio, round_to, paired)
    if not 1 <= count <= dim or (paired and count % 2):
        raise ValueError(f"cannot keep {count} of {dim} channels")
    q, k = (np.array([[common.rope(x, p, base) for x in row] for p, row in enumerate(rows)]) for rows in (q, k))
    q = q.reshape(n, kv_heads, -1, dim)
    heads = [
        Head(count, window, recent, paired, demote_tail, answer, older and h2o.Ledger(*older)) for _ in range(kv_heads)
    ]
    results = []
    start = 0
    for c in calls:
        now = slice(start, start + c)
        out = np.concatenate([head.call(q[now, h], k[now, h], v[now, h]) for h, head in enumerate(heads)], axis=1)
        kept = [list(head.tail) for head in heads]
        results.append(common.Call(out, kept, [{} for _ in heads], [dict(head.held) for head in heads]))
        start += c
    return results

"""KIVI: old keys at few bits per channel, old values at few bits per token, the newest tokens as they are.

Source: Liu et al. 2024, arXiv:2402.02750, and its code. Every call appends, attends, then quantises. With fewer
channels, from ThinK's code: chosen once, by the prompt's last queries and the keys that it quantises.
"""

import numpy as np

from tests.oracles import common, think
from tests.oracles.quantiser import rounded


def lengths(t: int, residual: int) -> tuple[int, int]:
    """How many keys and how many values, the oldest of t tokens, are quantised."""
    return residual * (t // residual), max(t - residual, 0)


def rounded_keys(keys: np.ndarray, bits: int, group: int) -> np.ndarray:
    """f64[tokens, D] through groups of consecutive tokens of one channel."""
    return np.stack([rounded(keys[:, j], bits, group) for j in range(keys.shape[1])], axis=1)


def rounded_values(values: np.ndarray, bits: int, group: int) -> np.ndarray:
    """f64[tokens, D] through groups of consecutive channels of one token."""
    return np.stack([rounded(value, bits, group) for value in values])


class Head:
    """One kv head; queries and keys come rotated."""

    def __init__(self, bits: int, group: int, residual: int, count: int | None, window: int):
        self.bits, self.group, self.residual = bits, group, residual
        self.count, self.window = count, window
        self.keep: list[int] | None = None  # channels of a quantised key
        self.held: common.Hand = {}
        self.quantised = (0, 0)  # keys, values

    def call(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Takes q f64[c, G, D], k and v f64[c, D]; returns f64[c, G, D]."""
        new = range(len(self.held), len(self.held) + len(k))
        for i, p in enumerate(new):
            self.held[p] = common.Token(k[i], v[i])
        out = np.zeros(q.shape)
        unturned = dict.fromkeys(self.held, 0)  # keys are stored rotated
        for i, p in enumerate(new):
            for x in range(q.shape[1]):
                out[i, x], _ = common.attend(q[i, x], p, self.held, unturned, 1.0)
        if self.keep is None:
            self.keep = self.channels(q, k)
        self.flush()
        return out

    def channels(self, q: np.ndarray, k: np.ndarray) -> list[int]:
        """Those that stay, given a prompt; one that quantises no key asks all of its keys."""
        if self.count is None:
            return list(range(k.shape[1]))
        quantised, _ = lengths(len(k), self.residual)
        return think.keep_channels(think.channel_scores(q[-self.window :], k[: quantised or len(k)]), self.count)

    def flush(self) -> None:
        old_keys, old_values = self.quantised
        self.quantised = lengths(len(self.held), self.residual)
        for start in range(old_keys, self.quantised[0], self.residual):
            block = range(start, start + self.residual)
            keys = rounded_keys(np.stack([self.held[p].key for p in block]), self.bits, self.group)
            for p, key in zip(block, keys, strict=True):
                self.held[p] = think.thinned(common.Token(key, self.held[p].value), self.keep)
        for p in range(old_values, self.quantised[1]):
            (value,) = rounded_values(self.held[p].value[None], self.bits, self.group)
            self.held[p] = common.Token(self.held[p].key, value)

    def full_keys(self) -> list[int]:
        return list(range(self.quantised[0], len(self.held)))


def run(
    q,
    k,
    v,
    calls,
    *,
    base=10000.0,
    bits: int = 2,
    group: int = 32,
    residual: int = 128,
    keep_count: int | None = None,
    window: int = 32,
) -> list[common.Call]:
    """`kept` is the positions of full keys; `held` is every token, with zeros for dropped channels."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, kv_heads, dim = k.shape
    if sum(calls) != n or any(c < 1 for c in calls):
        raise ValueError(f"calls must be positive and sum to {n}, got {calls}")
    if residual % group or dim % group:
        raise ValueError(f"groups of {group} must fill the residual of {residual} and the head of {dim}")
    q, k = (np.array([[common.rope(x, p, base) for x in row] for p, row in enumerate(rows)]) for rows in (q, k))
    q = q.reshape(n, kv_heads, -1, dim)
    heads = [Head(bits, group, residual, keep_count, window) for _ in range(kv_heads)]
    results = []
    start = 0
    for c in calls:
        now = slice(start, start + c)
        out = np.concatenate([head.call(q[now, h], k[now, h], v[now, h]) for h, head in enumerate(heads)], axis=1)
        kept = [head.full_keys() for head in heads]
        results.append(common.Call(out, kept, [{} for _ in heads], [dict(head.held) for head in heads]))
        start += c
    return results

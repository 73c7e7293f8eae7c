"""KVMerger: runs of neighbouring tokens with similar keys become one token each, a Gaussian mean around the pivot.

Source: arXiv:2407.08454, as described by its reviews. The pivot of a run is its most attended token; the newest
and the most attended tokens stay as they are. Merging follows the prompt; in later calls tokens are only appended,
unless `remerge_every` is given. Slots hold ROTATED keys here.
"""

import math
from dataclasses import dataclass

import numpy as np

from tests.oracles import common


@dataclass(frozen=True)
class Slot:
    """A token, or a merged run of tokens at the position of its pivot."""

    position: int
    key: np.ndarray  # f64[D], rotated
    value: np.ndarray  # f64[D]
    count: int = 1  # tokens merged into it, itself included
    mass: float = 0.0  # attention received, summed over queries and query heads


@dataclass
class Call(common.Call):
    """counts: per kv head, how many tokens the slot at each kept position stands for."""

    counts: list[dict[int, int]] | None = None


# ---- merging; slots are in order of position, and sets hold their indices ----


def protected(slots: list[Slot], *, window: int, heavy: int) -> set[int]:
    """The newest `window` slots and, of the others, the `heavy` most attended."""
    older = max(len(slots) - window, 0)
    return {*range(older, len(slots)), *common.best({i: slots[i].mass for i in range(older)}, heavy)}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return min(float(a @ b) / max(math.sqrt(a @ a) * math.sqrt(b @ b), 1e-12), 1.0)


def merging_sets(
    slots: list[Slot], safe: set[int], *, rule: str = "budget", merges: int = 0, eps: float = 0.75
) -> list[list[int]]:
    """Runs of slots joined by active links; `safe` ones stay alone. Link j joins slots j and j + 1."""
    links = {
        j: cosine(slots[j].key, slots[j + 1].key) for j in range(len(slots) - 1) if j not in safe and j + 1 not in safe
    }
    active = common.best(links, merges) if rule == "budget" else [j for j, c in links.items() if c > eps]
    sets: list[list[int]] = []
    for i in range(len(slots)):
        if i - 1 in active:
            sets[-1].append(i)
        else:
            sets.append([i])
    return sets


def pivot_of(members: list[Slot]) -> Slot:
    """The most attended; of equals, the first."""
    return max(members, key=lambda slot: (slot.mass, -slot.position))


def bandwidth(members: list[Slot], sigma: str | float) -> float:
    """sigma_S of the kernel."""
    if not isinstance(sigma, str):
        return sigma
    pivot, tokens = pivot_of(members), sum(slot.count for slot in members)
    total = sum(slot.count * np.linalg.norm(slot.key - pivot.key) for slot in members)
    return float(total) / (tokens if sigma == "mean_dist" else tokens - 1) / math.sqrt(2)


def kernel_weights(members: list[Slot], sigma: str | float) -> list[float]:
    """w_i; they sum to 1."""
    if len(members) == 1:
        return [1.0]
    pivot, width = pivot_of(members), bandwidth(members, sigma)
    g = []
    for slot in members:
        distance = float(np.linalg.norm(slot.key - pivot.key))
        g.append(slot.count * (1.0 if distance == 0 else math.exp(-((distance / width) ** 2) / 2)))
    return [x / sum(g) for x in g]


def merge(members: list[Slot], *, sigma: str | float = "mean_dist", value_scale: str = "mean") -> Slot:
    if len(members) == 1:
        return members[0]
    count = sum(slot.count for slot in members)
    key, value = np.zeros_like(members[0].key), np.zeros_like(members[0].value)
    for w, slot in zip(kernel_weights(members, sigma), members, strict=True):
        key = key + w * slot.key
        value = value + w * (slot.value if value_scale == "mean" else count * slot.value / slot.count)
    return Slot(pivot_of(members).position, key, value, count, sum(slot.mass for slot in members))


def compress(
    slots: list[Slot],
    *,
    budget: int,
    window: int,
    heavy: int,
    rule: str = "budget",
    eps: float = 0.75,
    sigma: str | float = "mean_dist",
    value_scale: str = "mean",
) -> list[Slot]:
    """The slots after merging, at most `budget` of them."""
    safe = protected(slots, window=window, heavy=heavy)
    sets = merging_sets(slots, safe, rule=rule, merges=max(len(slots) - budget, 0), eps=eps)
    worth, merged = {}, {}
    for members in sets:
        slot = merge([slots[i] for i in members], sigma=sigma, value_scale=value_scale)
        merged[slot.position] = slot
        worth[slot.position] = math.inf if members[0] in safe else slot.mass
    return [merged[p] for p in sorted(common.best(worth, budget))]


# ---- the stream ----


def attend(query: np.ndarray, slots: list[Slot], *, count_bias: bool = True) -> tuple[np.ndarray, common.Probs]:
    """Output and probabilities of one rotated query over the slots it may see."""
    logits = {
        slot.position: float(query @ slot.key) / math.sqrt(len(query)) + (math.log(slot.count) if count_bias else 0.0)
        for slot in slots
    }
    probs = common.softmax(logits)
    return sum(probs[slot.position] * slot.value for slot in slots), probs


def run(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    calls: list[int],
    *,
    base: float = 10000.0,
    budget: int,
    window: int,
    heavy: int,
    rule: str = "budget",
    eps: float = 0.75,
    sigma: str | float = "mean_dist",
    value_scale: str = "mean",
    count_bias: bool = True,
    remerge_every: int | None = None,
) -> list[Call]:
    """q is f64[n, Hq, D]; k and v are f64[n, H, D]; none is rotated. The first call is the prompt.

    budget: with rule="threshold", the most slots that may be left.
    remerge_every: calls of one token merge when they fill slot budget + remerge_every, longer ones always.
    scores of a call are the mass before merging; empty after the prompt if nothing merges again.
    """
    if window < 1 or heavy < 0 or window + heavy > budget:
        raise ValueError(f"needs window >= 1 and window + heavy <= budget, got {window}, {heavy}, {budget}")
    if rule not in ("budget", "threshold") or value_scale not in ("mean", "set_size"):
        raise ValueError(f"unknown rule {rule!r} or value_scale {value_scale!r}")
    if sigma not in ("mean_dist", "mean_dist_excl") and (isinstance(sigma, str) or sigma <= 0):
        raise ValueError(f"unknown sigma {sigma!r}")
    if remerge_every is not None and remerge_every < 1:
        raise ValueError(f"remerge_every must be positive, got {remerge_every}")
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    if sum(calls) != n or min(calls) < 1:
        raise ValueError(f"calls must be positive and sum to {n}, got {calls}")

    heads: list[list[Slot]] = [[] for _ in range(kv_heads)]
    results = []
    start = 0
    for c in calls:
        stop = start + c
        out = np.zeros((c, q_heads, dim))
        scores: list[dict[int, float]] = []
        for h in range(kv_heads):
            slots = heads[h] + [Slot(p, common.rope(k[p, h], p, base), v[p, h]) for p in range(start, stop)]
            mass = {slot.position: slot.mass for slot in slots}
            for p in range(start, stop):
                visible = [slot for slot in slots if slot.position <= p]
                for x in range(h * group, (h + 1) * group):
                    out[p - start, x], probs = attend(common.rope(q[p, x], p, base), visible, count_bias=count_bias)
                    for j, prob in probs.items():
                        mass[j] += prob
            slots = [Slot(s.position, s.key, s.value, s.count, mass[s.position]) for s in slots]
            scores.append(mass if start == 0 or remerge_every else {})

            if start == 0 or (remerge_every and (c > 1 or len(slots) >= budget + remerge_every)):
                slots = compress(
                    slots,
                    budget=budget,
                    window=window,
                    heavy=heavy,
                    rule=rule,
                    eps=eps,
                    sigma=sigma,
                    value_scale=value_scale,
                )
            heads[h] = slots
        results.append(
            Call(
                out,
                [[slot.position for slot in slots] for slots in heads],
                scores,
                [{slot.position: common.Token(slot.key, slot.value) for slot in slots} for slots in heads],
                [{slot.position: slot.count for slot in slots} for slots in heads],
            )
        )
        start = stop
    return results

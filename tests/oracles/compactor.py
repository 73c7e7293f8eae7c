"""Compactor: of a prompt, the tokens whose keys stick out and those that their neighbourhood attends to.

Source: Chari & Van Durme 2025, arXiv:2507.08143. The first call is compressed after exact attention; later calls
append and drop nothing. Scores are normalised over the heads and tokens of one row.
"""

import numpy as np

from tests.oracles import common
from tests.oracles.snapkv import smooth


def leverage(keys_unrotated: np.ndarray, phi: np.ndarray, ridge: float = 1e-2) -> np.ndarray:
    """Ridge leverage f64[m] of the keys f64[m, D] of one head, sketched by phi f64[D, r].

    The ridge is raised tenfold while the Gram matrix is not positive definite in floating point.
    """
    x = (keys_unrotated - keys_unrotated.mean(axis=0)) @ phi
    outer = np.zeros((phi.shape[1], phi.shape[1]))
    for row in x:
        outer = outer + np.outer(row, row)
    gram = outer + ridge * np.eye(len(outer))
    while not positive_definite(gram) and ridge < np.trace(outer):
        ridge *= 10
        gram = outer + ridge * np.eye(len(outer))
    return np.array([max(0.0, float(row @ np.linalg.solve(gram, row))) for row in x])


def positive_definite(matrix: np.ndarray) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True


def chunked_mass(
    q_rotated: np.ndarray,
    k_rotated: np.ndarray,
    values: np.ndarray,
    chunk: int = 256,
    scale: float | None = 1.0,
    pool: int = 3,
) -> np.ndarray:
    """Pooled attention f64[m] that each token gets inside its chunk, no mask, weighted by its value's length.

    q_rotated is f64[m, G, D], the queries of one group; k_rotated and values are f64[m, D]. A chunk that is not full
    holds its own tokens only. `scale` multiplies the logits; None stands for 1/sqrt(D).
    """
    m, group, dim = q_rotated.shape
    if scale is None:
        scale = dim**-0.5
    mass = np.zeros(m)
    for start in range(0, m, chunk):
        tokens = range(start, min(start + chunk, m))
        for i in tokens:
            for x in range(group):
                probs = common.softmax({j: scale * float(q_rotated[i, x] @ k_rotated[j]) for j in tokens})
                for j in tokens:
                    mass[j] += probs[j] / group
    weighted = [mass[j] * float(np.sqrt(values[j] @ values[j])) for j in range(m)]
    return np.array(smooth(weighted, pool))


def normalise(x: np.ndarray) -> np.ndarray:
    """x with mean zero and standard deviation one, over all its entries."""
    return (x - x.mean()) / max(float(x.std()), 1e-6)


def removed_share(length: int, budget: int) -> float:
    return max(0.0, 1 - budget / length)


def score(
    q_rotated: np.ndarray,
    k_rotated: np.ndarray,
    keys_unrotated: np.ndarray,
    values: np.ndarray,
    phi: np.ndarray,
    *,
    blending: float,
    first: int = 8,
    last: int = 4,
    chunk: int = 256,
    scale: float | None = 1.0,
    pool: int = 3,
    ridge: float = 1e-2,
) -> np.ndarray:
    """Scores f64[H, n] of one row; the first and last tokens get infinity, and the others do not see them.

    q_rotated is f64[n, Hq, D]; keys and values are f64[n, H, D]; phi is f64[H, D, r].
    """
    n, kv_heads, _ = values.shape
    group = q_rotated.shape[1] // kv_heads
    scores = np.full((kv_heads, n), np.inf)
    middle = slice(first, n - last)
    if first + last >= n:
        return scores

    standing_out, attended = [], []
    for h in range(kv_heads):
        mine = q_rotated[middle, h * group : (h + 1) * group]
        standing_out.append(leverage(keys_unrotated[middle, h], phi[h], ridge))
        attended.append(chunked_mass(mine, k_rotated[middle, h], values[middle, h], chunk, scale, pool))
    scores[:, middle] = blending * normalise(np.stack(standing_out)) + normalise(np.stack(attended))
    return scores


def choose(scores: np.ndarray, budget: int) -> list[list[int]]:
    """The positions that each head keeps, of scores f64[H, n]; of equals, the lower."""
    return [sorted(common.best(dict(enumerate(row)), budget)) for row in scores]


LATE = 1e6


def run(
    q,
    k,
    v,
    calls,
    *,
    base=10000.0,
    budget: int,
    phi: np.ndarray,
    first: int = 8,
    last: int = 4,
    chunk: int = 256,
    blending: float | None = None,
    scale: float | None = 1.0,
    pool: int = 3,
    ridge: float = 1e-2,
) -> list[common.Call]:
    """`phi` is f64[H, D, r]; `blending` None stands for the share of the call's tokens that goes.

    Every call of several tokens scores its own. Its last tokens, and tokens that come alone, rank above all scores, the
    newer above the older; the first of the stream always stay.
    """
    if budget < 1 or chunk < 1 or min(first, last) < 0:
        raise ValueError(f"out of range: {budget=}, {chunk=}, {first=}, {last=}")
    if pool < 1 or pool % 2 == 0:
        raise ValueError(f"pool must be odd, got {pool}")
    q, k, v, phi = (np.asarray(x, np.float64) for x in (q, k, v, phi))
    ranks: list[dict[int, float]] = []  # per kv head

    def turned(x, start, stop):
        return np.stack([[common.rope(head, p, base) for head in x[p]] for p in range(start, stop)])

    def choice(seen):
        stop, count = seen.now + 1, len(seen.probs[0])
        start = stop - count
        if not ranks:
            ranks.extend({} for _ in seen.hands)
        if count > 1:
            own = score(
                turned(q, start, stop),
                turned(k, start, stop),
                k[start:stop],
                v[start:stop],
                phi,
                blending=removed_share(count, budget) if blending is None else blending,
                first=max(first - start, 0),
                last=last,
                chunk=chunk,
                scale=scale,
                pool=pool,
                ridge=ridge,
            )
        kept = []
        for h, hand in enumerate(seen.hands):
            for p in range(start, stop):
                late = count == 1 or np.isinf(own[h][p - start])
                ranks[h][p] = LATE + p if late else float(own[h][p - start])
            now = {p: np.inf if p < first else ranks[h][p] for p in hand}
            kept.append(common.best(now, budget) if len(hand) > budget else list(hand))
        return kept, [dict(rank) for rank in ranks]

    return common.replay(q, k, v, calls, base=base, choose=choice)

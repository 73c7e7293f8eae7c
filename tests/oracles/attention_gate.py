"""Attention-Gate: before a layer attends, a small gate reads its input and says, per kv head, which prompt tokens stay.

Source: "In-context KV-Cache Eviction for LLMs via Attention-Gate", arXiv:2410.12876, of which only abstracts, reviews
and digests were read; no code is known. From these: the gate is a reduced multi-head attention over the whole context
with a sigmoid and a threshold, one per layer, decided before attention and in prefill only; the loss holds the mean
flag at a target; the estimator is straight-through. Reconstruction: every shape, one flag per kv head, the masks, the
gate's rotation, self-attention and protection, the cap, the absolute value in the loss, the weight inside the softmax,
its gradient and its clamp, chunked prompts, the initial values.

Tokens come first in every array here: p and flags are [n, H]. p is nan for a token that is not gated.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tests.oracles import common


@dataclass(frozen=True)
class Gate:
    """Weights of one layer's gate of h heads of width w; keep probability is the sigmoid of its output."""

    wq: np.ndarray  # f64[d, h w], head by head; also wk and wv
    wk: np.ndarray
    wv: np.ndarray
    wo: np.ndarray  # f64[h w, H]
    bo: np.ndarray  # f64[H]


def initial_gate(rng, width: int, heads: int, head_width: int, kv_heads: int) -> Gate:
    """Normal projections of deviation 0.02, a zero output and a bias of 2: everything is kept."""
    wq, wk, wv = 0.02 * rng.normal(size=(3, width, heads * head_width))
    return Gate(wq, wk, wv, np.zeros((heads * head_width, kv_heads)), np.full(kv_heads, 2.0))


def parameters(width: int, heads: int, head_width: int, kv_heads: int) -> int:
    return 3 * width * heads * head_width + heads * head_width * kv_heads + kv_heads


# ---- the gate ----


def sigmoid(z: float) -> float:
    e = float(np.exp(-abs(z)))
    return 1 / (1 + e) if z >= 0 else e / (1 + e)


def reach(mask: str, n: int, prompt: int | None = None, chunks: list[int] | None = None) -> list[int]:
    """Per token, how many tokens from the first its gate reads; 0 for a token that is not gated.

    "prefix_bidirectional" reads the prompt, whose tokens alone are gated; "causal" reads up to itself; "bidirectional"
    reads all; "chunk_bidirectional" reads to the end of its own chunk, `chunks` being their lengths.
    """
    prompt = n if prompt is None else prompt
    if mask == "prefix_bidirectional":
        return [prompt if i < prompt else 0 for i in range(n)]
    if mask == "causal":
        return [i + 1 for i in range(n)]
    if mask == "bidirectional":
        return [n] * n
    if mask == "chunk_bidirectional":
        ends = np.cumsum(chunks)
        if ends[-1] != n:
            raise ValueError(f"chunks must sum to {n}, got {chunks}")
        return [int(ends[c]) for c, length in enumerate(chunks) for _ in range(length)]
    raise ValueError(f"no gate mask {mask!r}")


def mixed(
    x: np.ndarray,
    gate: Gate,
    *,
    heads: int,
    mask: str = "prefix_bidirectional",
    prompt: int | None = None,
    chunks: list[int] | None = None,
    base: float | None = 10000.0,
    valid: Iterable[bool] | None = None,
) -> np.ndarray:
    """The gate's attention output f64[n, h w] for the layer's normed input x f64[n, d]; nan where not gated.

    `base` turns the gate's queries and keys, None leaves them; `valid` is False at padding.
    """
    n = len(x)
    valid = [True] * n if valid is None else list(valid)
    q, k, v = x @ gate.wq, x @ gate.wk, x @ gate.wv
    width = q.shape[1] // heads
    out = np.full((n, heads * width), np.nan)

    def turned(row, i):
        return row if base is None else common.rope(row, i, base)

    for i, count in enumerate(reach(mask, n, prompt, chunks)):
        keys = [j for j in range(count) if valid[j]]
        if not valid[i] or not keys:
            continue
        for a in range(heads):
            mine = slice(a * width, (a + 1) * width)
            query = turned(q[i, mine], i)
            probs = common.softmax({j: width**-0.5 * float(query @ turned(k[j, mine], j)) for j in keys})
            out[i, mine] = sum(prob * v[j, mine] for j, prob in probs.items())
    return out


def keep_probability(x: np.ndarray, gate: Gate, **settings) -> np.ndarray:
    """p f64[n, H] of the attention-like gate; settings as in `mixed`."""
    z = mixed(x, gate, **settings) @ gate.wo + gate.bo
    return np.array([[sigmoid(value) for value in row] for row in z])


def linear_keep_probability(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """p f64[n, H] of the control without attention: x f64[n, d], w f64[d, H], b f64[H]."""
    return np.array([[sigmoid(value) for value in row] for row in x @ w + b])


# ---- flags ----


def raw_flags(
    p: np.ndarray, *, threshold: float = 0.5, prompt: int | None = None, valid: Iterable[bool] | None = None
) -> np.ndarray:
    """bool[n, H]: p above the threshold, equality evicts; outside the prompt all stay; padding never does."""
    n, kv_heads = p.shape
    prompt = n if prompt is None else prompt
    valid = [True] * n if valid is None else list(valid)
    flags = np.zeros((n, kv_heads), bool)
    for j in range(n):
        for h in range(kv_heads):
            flags[j, h] = valid[j] and (j >= prompt or bool(p[j, h] > threshold))
    return flags


def protected_positions(
    prompt: int, first: int = 0, last: int = 1, valid: Iterable[bool] | None = None
) -> frozenset[int]:
    """The first and the last tokens of the prompt; padding does not count."""
    valid = [True] * prompt if valid is None else list(valid)
    tokens = [j for j in range(prompt) if valid[j]]
    return frozenset(tokens[:first] + tokens[max(len(tokens) - last, 0) :])


def survivors(p: dict[int, float], protected: Iterable[int], threshold: float, cap: int | None) -> list[int]:
    """Of one head's prompt tokens, those that stay: protected or above the threshold, at most `cap`.

    The cap takes the protected first, then the largest p; of equals, the lower position.
    """
    scores = {j: np.inf if j in protected else x for j, x in p.items()}
    stay = {j: x for j, x in scores.items() if x > threshold}
    return sorted(common.best(stay, len(stay) if cap is None else cap))


def flags(
    p: np.ndarray,
    *,
    threshold: float = 0.5,
    prompt: int | None = None,
    valid: Iterable[bool] | None = None,
    protect_first: int = 0,
    protect_last: int = 1,
    cap: int | None = None,
) -> np.ndarray:
    """bool[n, H]: the flags that attention and cache use: raw, then padding, protection and the cap."""
    n, kv_heads = p.shape
    prompt = n if prompt is None else prompt
    valid = [True] * n if valid is None else list(valid)
    protected = protected_positions(prompt, protect_first, protect_last, valid)
    result = raw_flags(p, threshold=threshold, prompt=prompt, valid=valid)
    for h in range(kv_heads):
        stay = survivors({j: float(p[j, h]) for j in range(prompt) if valid[j]}, protected, threshold, cap)
        for j in range(prompt):
            result[j, h] = j in stay
    return result


# ---- attention in training ----


def weight(i: int, j: int, f: np.ndarray, fixed: Iterable[int]) -> float:
    """What multiplies exp(logit) of key j for query i."""
    if j > i:
        return 0.0
    return 1.0 if j == i or j in fixed else float(f[j])


def weighted_logits(q, k, f, fixed, i, a) -> tuple[dict[int, float], dict[int, float], float]:
    """Weights and logits of the keys up to i for query i of query head a, and the log-sum-exp of the weighted."""
    logits = {j: q.shape[2] ** -0.5 * float(q[i, a] @ k[j]) for j in range(i + 1)}
    weights = {j: weight(i, j, f, fixed) for j in logits}
    top = max(x for j, x in logits.items() if weights[j] != 0)
    total = sum(weights[j] * float(np.exp(x - top)) for j, x in logits.items() if weights[j] != 0)
    return weights, logits, top + float(np.log(total))


def gated_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, f: np.ndarray, fixed: Iterable[int] = ()
) -> np.ndarray:
    """Output f64[n, G, D] of one kv head, the gate f f64[n] inside the softmax.

    q is f64[n, G, D], k and v are f64[n, D], rotated already. A token weighs 1 for itself; those in `fixed` (protected,
    or outside the prompt) weigh 1 for all. Flags of 0 and 1 give masked attention; f = p gives the soft alternative,
    log p added to the logits.
    """
    out = np.zeros(q.shape)
    for i in range(len(q)):
        for a in range(q.shape[1]):
            weights, logits, lse = weighted_logits(q, k, f, fixed, i, a)
            for j, w in weights.items():
                if w != 0:
                    out[i, a] += w * float(np.exp(logits[j] - lse)) * v[j]
    return out


def gate_gradient(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    f: np.ndarray,
    out_grad: np.ndarray,
    fixed: Iterable[int] = (),
    clamp: float | None = 10.0,
) -> np.ndarray:
    """dL/df f64[n], for dL/dout f64[n, G, D]: what bringing a key back, or losing it, is worth.

    An evicted key's weight against the visible ones is cut at `clamp`; None gives the exact derivative.
    """
    grad = np.zeros(len(q))
    out = gated_attention(q, k, v, f, fixed)
    for i in range(len(q)):
        for a in range(q.shape[1]):
            weights, logits, lse = weighted_logits(q, k, f, fixed, i, a)
            delta = float(out_grad[i, a] @ out[i, a])
            for j in range(i):
                if j in fixed:
                    continue
                log_ratio = logits[j] - lse
                if clamp is not None and weights[j] == 0:
                    log_ratio = min(log_ratio, float(np.log(clamp)))
                grad[j] += float(np.exp(log_ratio)) * (float(out_grad[i, a] @ v[j]) - delta)
    return grad


def input_gradients(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, f: np.ndarray, out_grad: np.ndarray, fixed: Iterable[int] = ()
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dL/dq, dL/dk and dL/dv; keys that are not visible get and give nothing."""
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    scale = q.shape[2] ** -0.5
    out = gated_attention(q, k, v, f, fixed)
    for i in range(len(q)):
        for a in range(q.shape[1]):
            weights, logits, lse = weighted_logits(q, k, f, fixed, i, a)
            delta = float(out_grad[i, a] @ out[i, a])
            for j, w in weights.items():
                if w == 0:
                    continue
                prob = w * float(np.exp(logits[j] - lse))
                slope = prob * (float(out_grad[i, a] @ v[j]) - delta)
                dq[i, a] += scale * slope * k[j]
                dk[j] += scale * slope * q[i, a]
                dv[j] += prob * out_grad[i, a]
    return dq, dk, dv


def straight_through(p: np.ndarray, flag_grad: np.ndarray) -> np.ndarray:
    """dL/dz of dL/df: the flag passes its gradient to p as it is, and p to z by the sigmoid's slope."""
    return flag_grad * p * (1 - p)


# ---- losses and statistics ----


def keep_fractions(values: np.ndarray, counted: np.ndarray) -> list[float]:
    """Per layer, the mean of values [L, B, n, H] (raw flags or p) over heads and the tokens of counted bool[B, n].

    Rows are pooled: a long prompt counts for more than a short one.
    """
    fractions = []
    for layer in values:
        chosen = [
            float(x) for b, row in enumerate(layer) for t, heads in enumerate(row) if counted[b][t] for x in heads
        ]
        fractions.append(sum(chosen) / len(chosen))
    return fractions


def miss(fraction: float, target: float, bracket: str) -> tuple[float, float]:
    """How far a fraction is from the target, and the slope; the slope at the target is 0."""
    gap = fraction - target
    if bracket == "abs":
        return abs(gap), float(np.sign(gap))
    if bracket == "square":
        return gap**2, 2 * gap
    if bracket == "hinge":
        return max(0.0, gap), float(gap > 0)
    raise ValueError(f"no bracket {bracket!r}")


def eviction_loss(
    values: np.ndarray,
    counted: np.ndarray,
    *,
    target: float,
    strength: float = 1.0,
    bracket: str = "abs",
    scope: str = "layer",
) -> tuple[float, np.ndarray]:
    """The loss and its gradient with respect to values [L, B, n, H].

    The values are the raw flags, before protection and cap, or p. With scope "layer" each layer misses the target for
    itself, with "global" the mean over layers does.
    """
    fractions = keep_fractions(values, counted)
    layers = len(fractions)
    if scope == "layer":
        missed = [miss(fraction, target, bracket) for fraction in fractions]
    elif scope == "global":
        missed = [miss(sum(fractions) / layers, target, bracket)] * layers
    else:
        raise ValueError(f"no scope {scope!r}")
    loss = strength * sum(m for m, _ in missed) / layers
    number = sum(bool(c) for row in counted for c in row) * values.shape[3]
    grad = np.zeros(values.shape)
    for layer in range(layers):
        for b in range(values.shape[1]):
            for t in range(values.shape[2]):
                if counted[b][t]:
                    grad[layer, b, t] = strength * missed[layer][1] / layers / number
    return loss, grad


def continuation_loss(logits: np.ndarray, tokens: list[int], split: int) -> float:
    """Mean cross-entropy of tokens split..n-1, each predicted by the position before; logits f64[n, V].

    The gate reads tokens before `split` only, so their loss, which would leak, is left out.
    """
    losses = []
    for t in range(split, len(tokens)):
        row = logits[t - 1]
        top = float(row.max())
        losses.append(top + float(np.log(np.exp(row - top).sum())) - float(row[tokens[t]]))
    return sum(losses) / len(losses)


def ramped(strength: float, step: int, steps: int, share: float = 0.1) -> float:
    """The loss's strength, from 0 in a line to its full value over the first `share` of the steps."""
    return strength * min(1.0, step / (share * steps))


def prompt_counts(kept: list[list[int]], prompt: int) -> list[int]:
    """Per kv head, how many prompt tokens are held."""
    return [sum(j < prompt for j in positions) for positions in kept]


# ---- streams ----


def run(
    q,
    k,
    v,
    calls,
    *,
    p: np.ndarray,
    base=10000.0,
    threshold: float = 0.5,
    cap: int | None = None,
    prompt: int | None = None,
    protect_first: int = 0,
    protect_last: int = 1,
    protected: Iterable[int] | None = None,
    decide: str = "prompt",
) -> list[common.Call]:
    """Prompt, then tokens that are all kept; eviction acts before attention, and a token always sees itself.

    q, k, v are as in `common.replay`; p is f64[n, H] (rows past the prompt are not read), or flags of 0 and 1. The
    first `prompt` tokens, None the first call, may come in several calls. `protected` positions, if given, stand for
    protect_first and protect_last.

    decide: "prompt" knows the whole prompt's gate before its first call attends, so calls only chunk attention. "call"
      learns p with each call: the call's tokens join those held, threshold and cap act on both, then the call attends.

    `scores` has p, or +inf for the protected and for tokens past the prompt, of what was held and what came.
    """
    q, k, v, p = (np.asarray(x, np.float64) for x in (q, k, v, p))
    n, q_heads, dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    prompt = calls[0] if prompt is None else prompt
    if sum(calls) != n or any(c < 1 for c in calls):
        raise ValueError(f"calls must be positive and sum to {n}, got {calls}")
    if prompt not in np.cumsum(calls):
        raise ValueError(f"prompt={prompt} must be the length of the first calls, got {calls}")
    if len(p) < prompt or p.shape[1:] != (kv_heads,):
        raise ValueError(f"p must have {prompt} rows and {kv_heads} heads, got {p.shape}")
    if cap is not None and cap < 1:
        raise ValueError(f"cap must be positive, got {cap}")
    if decide not in ("prompt", "call"):
        raise ValueError(f"no way to decide {decide!r}")
    protected = protected_positions(prompt, protect_first, protect_last) if protected is None else frozenset(protected)

    hands: list[common.Hand] = [{} for _ in range(kv_heads)]
    results, start = [], 0
    for count in calls:
        stop = start + count
        out = np.zeros((count, q_heads, dim))
        kept, scores = [], []
        for h, hand in enumerate(hands):
            new = range(start, stop)
            standing = [*hand, *new]
            known = {j: float(p[j, h]) for j in (range(prompt) if decide == "prompt" else standing) if j < prompt}
            stay = {*survivors(known, protected, threshold, cap), *(j for j in standing if j >= prompt)}
            tokens = hand | {j: common.Token(k[j, h], v[j, h]) for j in new}
            for i in new:
                sees = {j: token for j, token in tokens.items() if j == i or (j < i and j in stay)}
                for a in range(h * group, (h + 1) * group):
                    out[i - start, a], _ = common.attend(q[i, a], i, sees, common.true_places(sees), base)
            hands[h] = {j: token for j, token in tokens.items() if j in stay}
            kept.append(sorted(hands[h]))
            scores.append({j: np.inf if j >= prompt or j in protected else float(p[j, h]) for j in standing})
        results.append(common.Call(out, kept, scores))
        start = stop
    return results

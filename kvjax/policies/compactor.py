"""Compactor, leverage of keys and attention of neighbours. Chari and Van Durme 2025, arXiv:2507.08143."""

import jax
import jax.numpy as jnp

from kvjax.cache import FREE
from kvjax.counts import real
from kvjax.draws import check_seed
from kvjax.policy import Policy, Scorer, evict, method

RIDGE = 1e-2
LATE = 1e6  # the score of what stays for being late, above any that is computed: those are standard deviations


@method
def compactor(
    budget: int,
    *,
    first: int = 8,
    last: int = 4,
    sketch: int = 48,
    chunk: int = 256,
    pool: int = 3,
    blend: float | None = None,
    scale: float | None = 1.0,
    seed: int = 0,
) -> Policy:
    """Keeps the tokens whose keys stand out from all others, or which their neighbours attend to, before or after.

    The score of a prompt's token is `blend` times the leverage of its un-rotated key, plus the attention it would get
    from the tokens of its chunk without a causal mask, times the length of its value; both are normalised over heads
    and tokens.

    Bytes: L B H (budget + 1) (2 D b + 8) + 4 B + 4 L.

    Args:
      budget: Slots, `first` and `last` included.
      first: First tokens of the sequence that are always kept.
      last: Last tokens of a call, which are kept like decoded ones.
      sketch: Channels that keys are projected to, at random, before their leverage is computed.
      chunk: Tokens that attend to one another.
      pool: Neighbours over which that attention is averaged, an odd number.
      blend: Weight of the leverage; None takes the share of the tokens that goes.
      scale: Of the logits, in that attention; None takes D ** -0.5. The published code has 1.0.
      seed: Of the projection.

    Source: paper, and the port in kvpress. Differs: normalised for each row; the last chunk is masked exactly; a call
    of several tokens scores its own. The paper ends with the prompt: here decoded tokens stay, and push out the least
    of the prompt's, then the oldest of their own. The choice depends on the prompt alone. Of the facts that SmolLM2
    finds with all of its cache, 95 % were found at a quarter of the slots with other contexts; those of `kvjax compare`
    do not reach that (the README's table has a third, n = 8 a kind), though the tokens kept are those of kvpress with
    the same projection.
    """
    if first < 0 or last < 0 or first + last >= budget:
        raise ValueError(f"compactor: first={first} and last={last} must not fill budget={budget}; lower them.")
    if sketch < 1 or chunk < 1 or pool < 1 or pool % 2 == 0:
        raise ValueError(
            f"compactor: sketch={sketch} and chunk={chunk} must be at least 1, and pool={pool} a positive odd number."
        )
    if blend is not None:
        blend = real("compactor", "blend", blend, least=0, mend="None takes the share of the tokens that goes.")
    if scale is not None:
        scale = real("compactor", "scale", scale, least=0, mend="None takes D ** -0.5; the published code has 1.0.")
    check_seed("compactor", seed)

    def observe(cache, seen):
        rank = cache.stats["rank"]
        count = seen.positions.shape[1]
        if count == 1:
            arrived = (cache.pos == seen.positions[:, None]) & (cache.pos != FREE)
            return {"rank": jnp.where(arrived, LATE + cache.pos, rank)}
        phi = projection(seed, cache.carry, seen.k.shape[1], seen.k.shape[3], sketch)
        return {"rank": rank.at[..., -count:].set(prompt_scores(cache, seen, phi))}

    def prompt_scores(cache, seen, phi):
        count = seen.positions.shape[1]
        valid = seen.positions >= 0
        length = valid.sum(axis=1)[:, None]
        begin = jnp.clip(first - seen.positions[:, :1], 0, length)  # tokens of this call among the first
        place = jnp.arange(count)
        middle = (valid & (place >= begin) & (place < length - last))[:, None]  # [B, 1, T]
        rotated, values = cache.k[:, :, -count:].astype(jnp.float32), cache.v[:, :, -count:].astype(jnp.float32)
        leverage = _normalised(_leverage(seen.k.astype(jnp.float32), middle, phi), middle)
        mass = _chunked(seen.q.astype(jnp.float32), rotated, begin, middle, chunk, scale)
        mass = _pooled(jnp.where(middle, mass * jnp.linalg.norm(values, axis=-1), 0.0), pool)
        mass = _normalised(mass, middle)
        removed = jnp.clip(1 - budget / jnp.maximum(length, 1), 0.0, 1.0)[..., None] if blend is None else blend
        return jnp.where(middle, removed * leverage + mass, LATE + seen.positions[:, None])

    def score(cache, seen):
        return jnp.where(cache.pos < first, jnp.inf, cache.stats["rank"])

    scorer = Scorer(frozenset(), {"rank": ()}, observe, score, lambda shape: jnp.asarray(shape.layer, jnp.uint32))
    return evict(scorer, budget=budget)


def projection(seed: int, layer: jax.Array, heads: int, head_dim: int, sketch: int) -> jax.Array:
    """The random projection of a layer's keys, f32[H, D, sketch], of variance 1 / sketch."""
    key = jax.random.fold_in(jax.random.key(seed), layer)
    return jax.random.normal(key, (heads, head_dim, sketch)) / jnp.sqrt(sketch)


def _leverage(k, middle, phi):
    """Ridge leverage scores f32[B, H, T] of keys [B, H, T, D] among those of `middle` bool[B, 1, T]."""
    here = middle[..., None]
    mean = jnp.where(here, k, 0.0).sum(axis=2, keepdims=True) / jnp.maximum(here.sum(axis=2, keepdims=True), 1)
    x = jnp.where(here, jnp.einsum("bhtd,hdr->bhtr", k - mean, phi), 0.0)
    inverse = _inverse(_root(jnp.einsum("bhtr,bhts->bhrs", x, x)))
    return jnp.square(jnp.einsum("bhtr,bhsr->bhts", x, inverse)).sum(axis=-1)


def _root(gram):
    """The Cholesky factor of each matrix f32[B, H, r, r] and a ridge.

    Where large keys span fewer than r channels, f32 rounds more than the ridge adds and the factor fails; the ridge of
    that head is then raised tenfold, until the factor succeeds or the ridge outweighs the keys.
    """
    eye, trace = jnp.eye(gram.shape[-1]), jnp.trace(gram, axis1=2, axis2=3)[..., None, None]

    def failed(state):
        ridge, root = state
        return ~jnp.isfinite(root).all(axis=(2, 3), keepdims=True) & (ridge < trace)

    def raised(state):
        ridge = jnp.where(failed(state), 10 * state[0], state[0])
        return ridge, jnp.linalg.cholesky(gram + ridge * eye)

    first = jnp.full_like(trace, RIDGE), jnp.linalg.cholesky(gram + RIDGE * eye)
    return jax.lax.while_loop(lambda state: failed(state).any(), raised, first)[1]


def _inverse(root):
    """The inverse of each lower triangle f32[B, H, r, r].

    By hand, as jax takes LAPACK's solver on a CPU, whose threads fight those of XLA: a prompt took 1.4 times as long.
    """

    def substitute(i, inverse):
        row = root[:, :, i]
        rest = (jnp.arange(row.shape[-1]) == i) - jnp.einsum("bhr,bhrs->bhs", row, inverse)
        return inverse.at[:, :, i].set(rest / row[..., i, None])

    return jax.lax.fori_loop(0, root.shape[-1], substitute, jnp.zeros_like(root))


def _chunked(q, k, begin, middle, chunk, scale):
    """Attention f32[B, H, T] that each token of `middle` gets from its chunk, mean over the group; others get any."""
    group, count, head_dim = q.shape[2:]
    chunks = -(-count // chunk)
    q = jnp.where(middle[:, :, None, :, None], q * (head_dim**-0.5 if scale is None else scale), 0.0)

    def rolled(x, by, axis):
        return jax.vmap(lambda row, by: jnp.roll(row, by, axis))(x, by[:, 0])

    def cut(x):  # [B, ..., T, n] to [chunks, B, ..., chunk, n]: chunks begin at a row's first middle token
        x = jnp.pad(rolled(x, -begin, -2), [(0, 0)] * (x.ndim - 2) + [(0, chunks * chunk - count), (0, 0)])
        return jnp.moveaxis(x.reshape(*x.shape[:-2], chunks, chunk, x.shape[-1]), -3, 0)

    def attended(one):  # one chunk at a time, so that its logits stay in the processor's caches
        q, k, here = one
        here = here[:, :, None, :, 0]  # [B, 1, 1, chunk]
        logits = jnp.where(here[..., None, :], jnp.einsum("bhgid,bhjd->bhgij", q, k), -jnp.inf)
        p = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
        return jnp.einsum("bhgi,bhgij->bhj", here / p.sum(axis=-1) / group, p)

    mass = jnp.moveaxis(jax.lax.map(attended, (cut(q), cut(k), cut(middle[..., None]))), 0, 2)  # [B, H, chunks, chunk]
    return rolled(mass.reshape(*k.shape[:2], -1)[..., :count], begin, -1)


def _pooled(x, width):
    padded = jnp.pad(x, [(0, 0), (0, 0), (width // 2, width // 2)])
    return sum(padded[..., i : i + x.shape[-1]] for i in range(width)) / width


def _normalised(x, middle):
    """Zero mean and unit variance over the heads and the `middle` tokens of each row."""
    number = jnp.maximum(middle.sum(axis=(1, 2), keepdims=True) * x.shape[1], 1)
    mean = jnp.where(middle, x, 0.0).sum(axis=(1, 2), keepdims=True) / number
    variance = jnp.where(middle, jnp.square(x - mean), 0.0).sum(axis=(1, 2), keepdims=True) / number
    return (x - mean) / jnp.maximum(jnp.sqrt(variance), 1e-6)

"""EMS, evict then merge by global and local attention. arXiv:2412.08521. A reconstruction: see `ems`."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.cache import FREE, LayerCache, empty, free_losers, resize
from kvjax.counts import flag, real, whole
from kvjax.folds import BLOCK, add, at, first_best, in_blocks, put
from kvjax.policy import Mass, Policy, Seen, method
from kvjax.selects import ranked


@method
def ems(
    budget: int,
    *,
    window: int = 32,
    combine: str = "max",
    keep: float = 0.95,
    merge: int | None = None,
    similar: float = 0.6,
    redundancy: str = "clipped",
    transfer: bool = True,
) -> Policy:
    """Keeps important tokens and the newest; merges the less important into them, and drops the irrelevant.

    Importance is the attention that a token received from all queries, or from the newest ones, whichever is larger
    once both have the same mean. Of the tokens outside the window the best budget - window are centres. The next best,
    as many as it takes to hold a share `keep` of all importance, join the centre that is most like them in key and
    value, unless none is like enough; all others go. The cache then takes `window` more tokens before the next time.

    Bytes: L B H (budget + window) (2 D b + 12) + 4 B.

    Args:
      budget: Slots that a compression leaves, window included.
      window: Newest tokens that stay as they are; also the queries of the local score, and the tokens between two
        compressions.
      combine: "max" or "mean" of both scores, or "global" or "local" alone.
      keep: Share of all importance that is not irrelevant.
      merge: Tokens that may join centres at most; None allows four for each centre.
      similar: A token joins a centre if cos(keys) cos(values) reaches this.
      redundancy: "clipped" counts a negative cosine as 0; "raw" is the plain product, the paper's, under which a token
        is also like one that is opposite to it in both.
      transfer: Whether a centre takes over the global score of what joins it.

    Source: the abstracts, reviews and two comparisons; neither text nor code was to be had. How the classes are cut,
    the formula of merging, its times and all numbers are reconstructions of ours. Keys are compared and merged as they
    are cached, rotated; the paper looked at un-rotated keys too, which attention here cannot read at true positions.
    Heads with budgets of their own are not offered: their padded buffers would save nothing.
    """
    if not 0 < window < budget:
        raise ValueError(
            f"ems: window={window} is outside 1..{budget - 1}. The window is part of budget={budget}; lower window or "
            f"raise budget."
        )
    if combine not in ("max", "mean", "global", "local"):
        raise ValueError(f"ems: combine={combine!r} must be 'max', 'mean', 'global' or 'local'.")
    if redundancy not in ("clipped", "raw"):
        raise ValueError(f"ems: redundancy={redundancy!r} must be 'clipped' or 'raw'.")
    keep = real("ems", "keep", keep, above=0, most=1, mend="1 drops nothing for being irrelevant.")
    similar = real("ems", "similar", similar, least=0, most=1, mend="1 merges only what is alike.")
    transfer = flag("ems", "transfer", transfer)
    centres = budget - window
    most = 4 * centres
    if merge is not None:
        most = whole("ems", "merge", merge, least=0, mend="None allows four for each centre.")

    def init(shape):
        return empty(shape, {"global": (), "local": ()})

    def update(cache, seen, capacity):
        held = (cache.pos != FREE).sum(axis=-1)[:, 0]  # [B]
        several = (seen.positions >= 0).sum(axis=1) > 1
        local = jnp.where(
            several[:, None, None],
            seen.mass[Mass(window)],
            jnp.where((held > budget)[:, None, None], cache.stats["local"] + seen.mass[Mass()], 0.0),
        )
        stats = {"global": cache.stats["global"] + seen.mass[Mass()], "local": local}
        cache = dataclasses.replace(cache, stats=stats)
        due = jnp.where(several, held > budget, held >= budget + window)
        if seen.positions.shape[1] > 1:
            cache = compress(cache, seen, due)
        else:
            cache = jax.lax.cond(due.any(), lambda cache: compress(cache, seen, due), lambda cache: cache, cache)
        local = jnp.where((due | several)[:, None, None], 0.0, cache.stats["local"])
        return resize(dataclasses.replace(cache, stats={**cache.stats, "local": local}), capacity)

    def compress(cache: LayerCache, seen: Seen, due: jax.Array) -> LayerCache:
        due = due[:, None, None]
        occupied = cache.pos != FREE
        candidate = occupied & (cache.pos <= (seen.now - window)[:, None, None])
        score = _combined(cache.stats, occupied, combine)
        score = jnp.where(candidate, jnp.where(score < jnp.inf, score, 0.0), -jnp.inf)  # nan where attention overflowed
        wide = min(centres + most, cache.slots)
        best = ranked(score, cache.pos)
        ordered = jnp.where(at(candidate, best), at(score, best), 0.0)
        relevant = 1 + (jnp.cumsum(ordered, axis=-1) < keep * ordered.sum(axis=-1, keepdims=True)).sum(
            axis=-1, keepdims=True
        )
        centre, source = best[..., : min(centres, cache.slots)], best[..., centres:wide]
        is_centre = at(candidate, centre)
        kept = occupied & ~candidate | put(jnp.zeros(occupied.shape, bool), centre, is_centre) | occupied & ~due
        if source.shape[-1]:
            rank = centres + jnp.arange(source.shape[-1])
            joins = at(candidate, source) & (rank < relevant) & due
            cache = _merge(cache, seen, centre, is_centre, source, joins, score, similar, transfer, redundancy)
        return free_losers(cache, kept)

    return Policy("ems", budget + window - 1, frozenset({Mass(), Mass(window)}), init, update)


def _combined(stats, occupied, combine):
    """One score of the global and the local mass f32[B, H, N], which is scaled to the same mean."""
    everywhere, local = stats["global"], stats["local"]
    sums = [jnp.where(occupied, x, 0.0).sum(axis=-1, keepdims=True) for x in (everywhere, local)]
    local = local * jnp.where(sums[1] > 0, sums[0] / jnp.where(sums[1] > 0, sums[1], 1.0), 0.0)
    if combine == "max":
        return jnp.maximum(everywhere, local)
    return {"mean": (everywhere + local) / 2, "global": everywhere, "local": local}[combine]


def _merge(cache, seen, centre, is_centre, source, joins, score, similar, transfer, redundancy):
    """Sources i32[B, H, E] join their centre, of i32[B, H, M], where `joins` and where one is similar enough."""
    k, v, pos, stats = jax.tree.map(lambda leaf: at(leaf, centre), cache.slot_aligned())
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    k_in, v_in = at(cache.k, source).astype(jnp.float32), at(cache.v, source).astype(jnp.float32)
    unit, length = _split(k)
    unit_v, _ = _split(v)
    unit_in, length_in = _split(k_in)
    unit_v_in, _ = _split(v_in)

    def find(both):
        mine, mine_v = both[..., : unit.shape[-1]], both[..., unit.shape[-1] :]
        of_keys, of_values = (
            jnp.einsum("bhed,bhmd->bhem", *pair).clip(0 if redundancy == "clipped" else None)
            for pair in ((mine, unit), (mine_v, unit_v))
        )
        alike = jnp.where(is_centre[:, :, None], of_keys * of_values, -jnp.inf)
        return first_best(alike, pos[:, :, None])

    chosen, top = in_blocks(find, jnp.concatenate([unit_in, unit_v_in], axis=-1), BLOCK)
    joins &= top >= similar
    target = jnp.where(joins, chosen, centre.shape[-1])
    weight = jnp.where(joins, at(score, source), 0.0)
    own = jnp.where(is_centre, at(score, centre), 0.0)

    def gathered(x):
        return add(jnp.zeros((*centre.shape, *x.shape[3:]), jnp.float32), target, x)

    total = own + gathered(weight)
    joined = gathered(joins.astype(jnp.float32)) * total > 0
    total = jnp.where(total > 0, total, 1.0)[..., None]
    direction, _ = _split((own[..., None] * unit + gathered(weight[..., None] * unit_in)) / total)
    size = (own[..., None] * length + gathered(weight[..., None] * length_in)) / total
    new_v = (own[..., None] * v + gathered(weight[..., None] * v_in)) / total

    slot = seen.done(jnp.where(joined, centre, cache.slots))
    if transfer:
        more = gathered(jnp.where(joins, at(cache.stats["global"], source), 0.0))
        everywhere = put(cache.stats["global"], slot, stats["global"] + more)
        cache = dataclasses.replace(cache, stats={**cache.stats, "global": everywhere})
    return dataclasses.replace(cache, k=put(cache.k, slot, size * direction), v=put(cache.v, slot, new_v))


def _split(x):
    """Direction and length [.., 1] of f32 vectors."""
    length = jnp.maximum(jnp.sqrt((x * x).sum(axis=-1, keepdims=True)), 1e-6)
    return x / length, length

"""The one attention: queries of this call over slots in any order, with the statistics that a policy asks for.

Rows of the probability matrix are computed whole, for a block of queries at a time, so that one pass gives the
output, the log-sum-exp and the column sums; the T x N matrix never exists. Queries of a long call are cut into spans,
each of which sees a static prefix of the slots, and so causality skips nearly half of the work.
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvjax import kernels
from kvjax.cache import FREE, LayerCache, LayerShape, after, extend, resize
from kvjax.counts import whole
from kvjax.models.rope import Rope, rotate
from kvjax.policy import Mass, Masses, Policy, Seen, Turn, check_policy
from pallas_kernels.slot_attention import Packed

SPANS = 16  # static prefixes that a long call is cut into
BLOCK_LOGITS = 2**17  # queries times slots of one block, for each query head; 64 queries over 2048 slots


class Attended(NamedTuple):
    """What `attend_slots` returns: `out` [B, H, G, T, D], `lse` f32[B, H, G, T], and `mass`, what was asked for."""

    out: jax.Array
    lse: jax.Array
    mass: dict[Mass, jax.Array]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: LayerCache | None,
    policy: Policy,
    *,
    positions: jax.Array,
    rope: Rope | None = None,
    angles: tuple[jax.Array, jax.Array] | None = None,
    scale: float | None = None,
    sliding_window: int | None = None,
    capacity: int | None = None,
    layer: int | jax.Array = 0,
    given: dict[str, jax.Array] | None = None,
    turn: Turn | None = None,
    prefix: LayerCache | None = None,
) -> tuple[jax.Array, LayerCache]:
    """Attention of one layer over its cache and this call's tokens, then the policy's eviction.

    For your own Flax or JAX model: keep your layers, thread the returned `LayerCache` through.

    Args:
      q: [B, T, Hq, D], not rotated if `rope` is given.
      k: [B, T, H, D], likewise; H divides Hq.
      v: [B, T, H, D].
      cache: What the last call returned, or None at the start. With T = 1 the token is written in place.
      policy: Made by `kvjax.policies`.
      positions: i32[B, T], positions of the tokens in their sequences; -1 marks padding. Within a row they go up
        by one from the number of tokens seen before.
      rope: How to rotate q and k; None leaves them as they are.
      angles: `rope.angles(positions, D)`, which all layers can share; None computes it here.
      scale: Factor of the logits; None takes D ** -0.5.
      sliding_window: Keys a query sees, itself included; None sees all.
      capacity: Slots of the returned cache; of a policy with two tiers, the tokens that it leaves room for. None takes
        what the policy needs, which for a policy that keeps every token is one slot for each token so far: leave it
        room there if single tokens are to follow.
      layer: Index of the layer, for policies that draw at random.
      given: What is known of this call's tokens beforehand, such as the scores of a trained head: {name of a statistic
        of the policy: [B, T], or [B, H, T] where heads differ}. The statistics of tokens start there, and at 0 without.
      turn: The turn that this call reads a part of, for the policies that choose by where it ends. None takes this call
        for a whole one, if it is the first or has several tokens, and else for a decode step.
      prefix: What rows share and none of them changes: a layer of P rows, made by a policy of its own. The first B / P
        rows of this call follow its first row, and so on. Each row of it is read once, for all that follow it, and its
        slots come under the same softmax as a row's own.

    Returns:
      The output [B, T, Hq, D] (0 for padding), and the layer's new cache. Where a policy that keeps every token has no
      free slot for a single one, its output is nan: under jit there is no other way to say so.

    Raises:
      ValueError: If the shapes do not fit together; if the policy gives positions anew and there is no `rope`, or wants
        to be given what is not; or, outside jit, if a policy that keeps every token has no free slot for a single one.
    """
    _check(q, k, v, cache, policy, positions, rope, capacity, sliding_window)
    _check_prefix(prefix, policy, q, k)
    q, k, v, positions = (jnp.asarray(x) for x in (q, k, v, positions))
    batch, count, q_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if cache is None:
        cache = policy.empty(LayerShape(batch, kv_heads, 0, head_dim, k.dtype, layer))
    given = {} if given is None else given
    first = cache.slots == 0
    if turn is None and (first or count > 1):
        newest = positions.max(axis=1)
        turn = Turn(jnp.where(positions == FREE, newest[:, None] + 1, positions).min(axis=1), newest + 1)
    _check_given(policy, cache.stats, given, turn is None, (batch, count), kv_heads)
    if isinstance(capacity, int) and policy.low is not None:
        capacity = policy.capacity(capacity)
    elif capacity is None and (first or count > 1):
        capacity = policy.capacity(count) if first else policy.capacity_after(cache, count)
    given = {
        name: jnp.broadcast_to(jnp.reshape(x, (batch, -1, count)), (batch, kv_heads, count)).astype(jnp.float32)
        for name, x in given.items()
    }
    settings = {"rope": rope, "scale": scale, "sliding_window": sliding_window, "prefix": prefix}
    if policy.tail and turn is not None:
        return _tail_apart(q, k, v, cache, policy, positions, angles, given, turn, capacity, settings)
    if count > 1 and (policy.stepwise == "always" or (policy.stepwise == "turns" and not first)):
        return _token_by_token(q, k, v, resize(cache, capacity), policy, positions, angles, given, settings)
    return _attend_once(q, k, v, cache, policy, positions, angles, given, turn, capacity, **settings)


def _attend_once(
    q, k, v, cache, policy, positions, angles, given, turn, capacity, *, rope, scale, sliding_window, prefix
) -> tuple[jax.Array, LayerCache]:
    """`attend` for tokens that all enter the cache before any leaves it; given is {name: f32[B, H, T]}."""
    batch, count, q_heads, head_dim = q.shape
    kv_heads = k.shape[2]
    first = cache.slots == 0
    q = q.reshape(batch, count, kv_heads, q_heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)  # [B, H, G, T, D]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, H, T, D]
    unrotated = k
    if rope is not None and policy.ranks is None:
        cos, sin = rope.angles(positions, head_dim) if angles is None else angles  # [B, T, D / 2]
        q, k = rotate(q, cos[:, None, None], sin[:, None, None]), rotate(k, cos[:, None], sin[:, None])

    low = lost = None
    if not first:
        cache, q, k, v, low = _fitted(cache, policy, q, k, v, positions)
    if count == 1 and not first:
        lost, capacity = _lost(cache, policy, positions), cache.capacity
        stored = policy.written(cache, k, v, positions[:, 0], {name: x[:, :, 0] for name, x in given.items()})
        held = policy.loaded(stored)
        keys, values = policy.read(stored, held)
    else:
        stored, held = cache, _extended(cache, policy, k, v, positions, given)
        keys, values = held.k, held.v

    k_pos, q_pos = held.pos, positions[:, None, :]  # [B, H, N], [B, 1, T]
    if policy.ranks is not None:
        q, keys, q_pos, k_pos = _renumbered(q, held, policy.ranks, positions, rope)
    scale = head_dim**-0.5 if scale is None else scale
    scaled = (q * scale).astype(q.dtype)  # a scale of numpy would widen it
    shared = None if prefix is None else _over_prefix(scaled, q_pos, prefix, sliding_window)
    attended = attend_slots(
        scaled,
        keys,
        values,
        q_pos,
        k_pos,
        needs=policy.needs,
        bias=None if policy.bias is None else policy.bias(held, turn),
        sliding_window=sliding_window,
        low=None if low is None else ((low[0] * scale).astype(q.dtype), *low[1:]),
        elsewhere=None if shared is None else shared.lse,
    )
    if shared is not None:
        share = jnp.exp(shared.lse - jnp.where(attended.lse > -jnp.inf, attended.lse, 0.0))[..., None]
        attended = attended._replace(out=(attended.out + share * shared.out).astype(attended.out.dtype))
    if lost is not None:
        attended = attended._replace(out=jnp.where(lost[:, :, None, None, None], jnp.nan, attended.out))
    below = 0 if low is None else cache.low.slots
    mass = Masses({need: x[..., below:] for need, x in attended.mass.items()})
    theirs = None if low is None else Masses({need: x[..., :below] for need, x in attended.mass.items()})
    seen = Seen(positions, q, unrotated, attended.out, attended.lse, mass, theirs, turn)
    cache = policy.first(held, seen, capacity) if first else policy.later(held, stored, seen, capacity)
    return attended.out.transpose(0, 3, 1, 2, 4).reshape(batch, count, q_heads, head_dim), cache


def _over_prefix(q: jax.Array, q_pos: jax.Array, prefix: LayerCache, sliding_window: int | None) -> Attended:
    """What q [B, H, G, T, D] at `q_pos` i32[B, 1, T] reads of `prefix`; queries that share a row of it are one product.

    The statistics of a prefix are left as they are.
    """
    batch, heads, group, count, head_dim = q.shape
    own, parts = prefix.made_by, prefix.pos.shape[0]
    q = jnp.moveaxis(q.reshape(parts, batch // parts, heads, group, count, head_dim), 1, 3)
    q = own.asked(q.reshape(parts, heads, group, -1, head_dim), prefix.fitted)  # [P, H, G, B / P * T, D]
    q_pos = q_pos.reshape(parts, 1, -1)
    k, v = (x.load() if isinstance(x, Packed) else x for x in own.read(prefix, own.loaded(prefix)))

    def attend_block(block):
        q_block, at, weight, _ = block
        keys = k.astype(q.dtype), v.astype(q.dtype)
        out, lse, columns = _attend_block(q_block, keys[:1], keys[1:], at, prefix.pos, weight, None, sliding_window)
        return columns, (out, lse)

    size = max(1, min(q.shape[3], BLOCK_LOGITS // max(1, prefix.slots)))
    _, (out, lse) = _over_blocks(attend_block, size, ((q,), q_pos, {}, None))

    def by_row(x):  # [P, H, G, B / P * T, ...]
        x = jnp.moveaxis(x.reshape(*x.shape[:3], batch // parts, count, *x.shape[4:]), 3, 1)
        return x.reshape(batch, *x.shape[2:])

    return Attended(by_row(out), by_row(lse), {})


def _token_by_token(q, k, v, cache, policy, positions, angles, given, settings):
    """`attend` for what is read as decode steps."""

    def step(cache, token):
        (q, k, v, positions, angles), given = token
        q, k, v, positions, angles = jax.tree.map(lambda x: x[:, None], (q, k, v, positions, angles))
        given = jax.tree.map(lambda x: x[..., None], given)
        out, cache = _attend_once(q, k, v, cache, policy, positions, angles, given, None, None, **settings)
        return cache, out[:, 0]

    calls = jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, positions, angles))
    cache, out = jax.lax.scan(step, cache, (calls, jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), given)))
    return out.swapaxes(0, 1), cache


def _tail_apart(q, k, v, cache, policy, positions, angles, given, turn, capacity, settings):
    """`attend` for a policy that chooses among all but the last tokens of a turn before those are read."""
    count = q.shape[1]
    end = jnp.maximum(turn.start, turn.stop - policy.tail)[:, None]
    body = jnp.where(positions < end, positions, FREE)
    out, cache = _attend_once(q, k, v, cache, policy, body, angles, given, turn, capacity, **settings)

    begin = jnp.argmax(positions >= end, axis=1)[:, None]  # 0 where this call has no token of the tail
    column = jnp.minimum(begin + jnp.arange(min(policy.tail, count)), count - 1)  # i32[B, t]
    there = begin + jnp.arange(column.shape[1]) < count

    def pick(x):  # [B, T, ...]
        return jnp.take_along_axis(x, column.reshape(*column.shape, *(1,) * (x.ndim - 2)), axis=1)

    late = jnp.where(there, pick(positions), FREE)
    late = jnp.where(late >= end, late, FREE)
    opens = (late == end).any(axis=1)
    cache = policy.make_room(cache, jnp.where(opens, turn.stop - end[:, 0], 0), turn.room)
    given = {name: pick(x.swapaxes(1, 2)).swapaxes(1, 2) for name, x in given.items()}
    q, k, v, angles = jax.tree.map(pick, (q, k, v, angles))
    added, cache = _attend_once(q, k, v, cache, policy, late, angles, given, turn, capacity, **settings)
    added = jnp.where((late != FREE)[..., None, None], added, 0)
    return out.at[jnp.arange(out.shape[0])[:, None], column].add(added), cache


def _fitted(cache, policy, q, k, v, positions):
    """The cache with what its codecs choose, q, k and v as they project them, and the tier below as attention reads it.

    That tier is its queries, keys, values and positions; None without one.
    """
    there = jnp.broadcast_to((positions != FREE)[:, None], k.shape[:3])
    if policy.has_codecs:
        cache = policy.fit(cache, k, v, there, q, positions)
        k, v = policy.projected(k, v, cache.fitted)
        q = policy.asked(q, cache.fitted)
    if policy.low is None:
        return cache, q, k, v, None
    tier = cache.low
    if policy.low.has_codecs:
        tier = policy.low.fit(tier, k, v, there, q, positions)
        cache = dataclasses.replace(cache, low=tier)
    keys, values = policy.low.read(tier, policy.low.loaded(tier))
    return cache, q, k, v, (policy.low.asked(q, tier.fitted), keys, values, tier.pos)


def _lost(cache, policy, positions):
    """bool[B, H], where a single token finds no slot, which is refused where it is known; None if that cannot be."""
    unbounded = [tier for own, tier in zip((policy, policy.low), cache.tiers, strict=False) if own.budget is None]
    if not unbounded:
        return None
    lost = sum((tier.pos != FREE).all(axis=-1) for tier in unbounded).astype(bool) & (positions >= 0)
    if not isinstance(lost, jax.core.Tracer) and lost.any():
        raise ValueError(
            f"attend: all {cache.slots} slots of a row hold tokens, and {policy.name} frees none. Give the call before "
            f"this one capacity=, with room for the tokens to come."
        )
    return lost


def _extended(cache, policy, k, v, positions, given):
    """The layer's vectors with those of this call behind them: as they came in a row's first call, later as stored."""
    if cache.slots == 0:
        return extend(cache, k, v, positions, given)
    if policy.has_codecs:
        begins = (positions == 0).any(axis=1)[:, None, None, None]
        new = policy.loaded(policy.stored(cache, k, v))
        k, v = jnp.where(begins, k, new.k), jnp.where(begins, v, new.v)
    return extend(policy.loaded(cache), k, v, positions, given)


def _renumbered(q, cache, ranks, positions, rope):
    """q and the cache's keys rotated at the positions that the policy gives anew: q, keys, q_pos and k_pos."""
    # [B, H or 1, N]; XLA would compute and hold the angles of all layers at once, if they did not wait for q
    ranks = ranks(dataclasses.replace(cache, pos=after(q, cache.pos)))
    cos, sin = rope.table(cache.slots, q.shape[-1])
    keys = rotate(cache.k, cos[ranks], sin[ranks])
    q_pos = _own(ranks, cache.pos, positions)  # [B, H or 1, T]
    cos, sin = cos[q_pos][:, :, None], sin[q_pos][:, :, None]  # [B, H or 1, 1, T, D / 2]
    k_pos = jnp.where(cache.pos == FREE, FREE, ranks)
    return rotate(q, cos, sin), keys, jnp.where(positions[:, None, :] < 0, FREE, q_pos), k_pos


def _own(ranks: jax.Array, pos: jax.Array, positions: jax.Array) -> jax.Array:
    """Ranks i32[B, H or 1, T] of this call's own tokens: those of the last T slots, or of the newest slot."""
    count = positions.shape[-1]
    if count > 1 or pos.shape[-1] == 1:
        return ranks[..., -count:]
    return jnp.where(pos[:, : ranks.shape[1]] == FREE, FREE, ranks).max(axis=-1, keepdims=True).clip(0)


def attend_slots(
    q: jax.Array,
    k: jax.Array | Packed,
    v: jax.Array | Packed,
    q_pos: jax.Array,
    k_pos: jax.Array,
    *,
    needs: frozenset[Mass] = frozenset(),
    bias: jax.Array | None = None,
    sliding_window: int | None = None,
    low: tuple[jax.Array, jax.Array, jax.Array, jax.Array] | None = None,
    elsewhere: jax.Array | None = None,
) -> Attended:
    """Softmax attention over slots, causal by position. A query without a visible slot gives 0, and lse = -inf.

    Args:
      q: [B, H, G, T, D], scaled and rotated.
      k: [B, H, N, D], or `Packed`.
      v: [B, H, N, D], or `Packed`.
      q_pos: i32[B, H or 1, T], -1 for padding. Where T > 1, the last T slots hold this call's tokens, in order.
      k_pos: i32[B, H, N], -1 for free slots.
      needs: Statistics to return.
      bias: f32[B, H, N], added to the logits of a slot, except where a query meets its own token.
      sliding_window: Keys a query sees, itself included; None sees all.
      low: Another tier of M slots under the same softmax: q, k, v and k_pos as above, where q and k may be narrower.
        Its statistics come first, in M + N slots.
      elsewhere: f32[B, H, G, T], log-sum-exp of the logits that each query has for keys which are not here. They take
        their share of the softmax; what they add to the output is the caller's to add.
    """
    q, k, v = (q,), (k,), (v,)  # of each tier
    if low is not None:
        q, k, v, k_pos = (low[0], *q), (low[1], *k), (low[2], *v), jnp.concatenate([low[3], k_pos], axis=2)
    newest = q_pos.max(axis=-1, keepdims=True)  # [B, H or 1, 1]
    weights = {need: _counted(need, q_pos, newest) for need in needs}  # f32[B, H or 1, T]
    if elsewhere is None and kernels.attention_of(q, k, v, needs) != "reference":
        return Attended(*kernels.attend(q, k, v, q_pos, k_pos, weights, bias=bias, sliding_window=sliding_window))
    k, v = (tuple(x.load().astype(q[0].dtype) if isinstance(x, Packed) else x for x in tiers) for tiers in (k, v))
    if q[0].shape[3] == 1:
        return _attend_one(
            q, k, v, q_pos, k_pos, needs=needs, bias=bias, sliding_window=sliding_window, elsewhere=elsewhere
        )
    count, slots, below = q[0].shape[3], k_pos.shape[2], k_pos.shape[2] - k[-1].shape[2]
    before = slots - count

    span = -(-count // SPANS) if count >= 64 * SPANS else count
    outs, lses = [], []
    batch, heads, group = q[0].shape[:3]
    shapes = {need: (batch, heads, group, slots) if need.by_query_head else (batch, heads, slots) for need in needs}
    mass = {need: jnp.zeros(shape, jnp.float32) for need, shape in shapes.items()}
    for start in range(0, count, span):
        stop = min(start + span, count)
        seen = before + stop  # slots that the span can see

        def attend_block(block, seen=seen):
            q_block, at, weight, beyond = block
            out, lse, columns = _attend_block(
                q_block,
                (*k[:-1], k[-1][:, :, : seen - below]),
                (*v[:-1], v[-1][:, :, : seen - below]),
                at,
                k_pos[:, :, :seen],
                weight,
                None if bias is None else bias[:, :, :seen],
                sliding_window,
                beyond,
            )
            return columns, (out, lse)

        size = max(1, min(stop - start, BLOCK_LOGITS // slots))
        columns, (out, lse) = _over_blocks(
            attend_block,
            size,
            (
                tuple(x[:, :, :, start:stop] for x in q),
                q_pos[:, :, start:stop],
                {need: weight[:, :, start:stop] for need, weight in weights.items()},
                None if elsewhere is None else elsewhere[..., start:stop],
            ),
        )
        outs.append(out)
        lses.append(lse)
        mass = {need: mass[need].at[..., :seen].add(columns[need]) for need in needs}
    return Attended(jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3), mass)


def _over_blocks(attend_block, size, queries):
    """Runs `attend_block` over blocks of `size` queries; sums the columns, joins the rest along the query axis.

    q is a tuple of [B, H, G, T, D], all else that belongs to a query has T last. Blocks that do not fill up are padded
    with queries at position -1, which see nothing.
    """
    q, at, weights, elsewhere = queries
    count = q[0].shape[3]
    blocks = -(-count // size)
    if blocks == 1:
        return attend_block(queries)
    pad = blocks * size - count

    def split(x, axis, fill=0):
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, pad)
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)

    def join(x):  # [blocks, B, H, G, size, ...]
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], blocks * size, *x.shape[5:])[:, :, :, :count]

    stacked = (
        tuple(split(x, 3) for x in q),
        split(at, 2, FREE),
        {need: split(weight, 2) for need, weight in weights.items()},
        None if elsewhere is None else split(elsewhere, 3, -jnp.inf),
    )
    columns, (out, _) = jax.eval_shape(attend_block, jax.tree.map(lambda x: x[0], stacked))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), columns)
    (*others, stacked_q), *stacked_rest = stacked
    if out.shape[-1] != stacked_q.shape[-1]:  # pruned keys: queries are narrower than values
        stacked_q = jnp.pad(stacked_q, [(0, 0)] * 5 + [(0, out.shape[-1] - stacked_q.shape[-1])])

    def body(carry, block):  # the output takes the place of the queries, for the reason given in `llama.finish`
        i, total, queries = carry
        others, *rest = block
        columns, (out, lse) = attend_block(((*others, queries[i][..., : q[-1].shape[-1]]), *rest))
        return (i + 1, jax.tree.map(jnp.add, total, columns), queries.at[i].set(out.astype(queries.dtype))), lse

    (_, columns, out), lse = jax.lax.scan(body, (0, zeros, stacked_q), (tuple(others), *stacked_rest))
    return columns, (join(out), join(lse))


def _attend_block(q, k, v, q_pos, k_pos, weights, bias, sliding_window, elsewhere=None):
    """Whole rows of a block of queries: out [B, H, G, t, D], lse f32[B, H, G, t], columns {Mass: f32[B, H, n]}."""
    batch, heads, group, count, _ = q[0].shape

    def product(x, y, axis):  # over the group and the queries at once
        x = x.reshape(batch, heads, group * count, x.shape[-1])
        xy = jax.lax.dot_general(x, y, (((3,), (axis,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
        return xy.reshape(batch, heads, group, count, -1)

    logits = _mask(
        _join([product(*tier, 3) for tier in zip(q, k, strict=True)]),
        q_pos[:, :, None, :, None],
        k_pos[:, :, None, None, :],
        None if bias is None else bias[:, :, None, None, :],
        sliding_window,
    )
    p, total, lse = _exponentials(logits, elsewhere)
    # The division by the total is left to the end: it then touches [t, D] instead of [t, n].
    out = sum(product(part.astype(x.dtype), x, 2) for part, x in zip(_split(p, v), v, strict=True))
    out = (out / total[..., None]).astype(v[-1].dtype)
    columns = {
        need: jnp.einsum("bhgt,bhgtn->bhgn", weight[:, :, None] / total, p)
        if need.by_query_head
        else jnp.einsum("bhgt,bhgtn->bhn", weight[:, :, None] / group / total, p)
        for need, weight in weights.items()
    }
    return out, lse, columns


def _attend_one(q, k, v, q_pos, k_pos, *, needs, bias, sliding_window, elsewhere):
    """One query a row: bytes are all that counts, so each query head is a matrix-vector product over the slots."""
    group = q[0].shape[2]

    def product(spec, x, y):
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)

    def logits_of(q, k):
        return jnp.stack([product("bhnd,bhd->bhn", k, q[:, :, g, 0]) for g in range(group)], axis=2)

    logits = _join([logits_of(*tier) for tier in zip(q, k, strict=True)])  # [B, H, G, N]
    logits = _mask(
        logits, q_pos[:, :, None], k_pos[:, :, None], None if bias is None else bias[:, :, None], sliding_window
    )
    p, total, lse = _exponentials(logits, None if elsewhere is None else elsewhere[..., 0])
    p = p / total[..., None]
    parts = list(zip(_split(p, v), v, strict=True))
    out = jnp.stack(
        [sum(product("bhn,bhnd->bhd", part[:, :, g].astype(x.dtype), x) for part, x in parts) for g in range(group)],
        axis=2,
    )[:, :, :, None].astype(v[-1].dtype)  # [B, H, G, 1, D]
    mass = p.mean(axis=2)  # one query is the newest `last` of any number
    return Attended(out, lse[..., None], {need: p if need.by_query_head else mass for need in needs})


def _join(parts):
    """The logits of all tiers, on the last axis."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _split(p, v):
    """Probabilities of the slots of each tier."""
    ends = list(itertools.accumulate(x.shape[2] for x in v))
    return [p[..., end - x.shape[2] : end] for end, x in zip(ends, v, strict=True)]


def _mask(logits, q_pos, k_pos, bias, sliding_window):
    if bias is not None:
        logits = logits + jnp.where(q_pos == k_pos, 0.0, bias)
    visible = (k_pos != FREE) & (k_pos <= q_pos)
    if sliding_window is not None:
        visible &= q_pos - k_pos < sliding_window
    return jnp.where(visible, logits, -jnp.inf)


def _exponentials(logits, elsewhere):
    """exp(logits - max), their sum (1 where nothing is visible), and the log-sum-exp, over the last axis.

    Sum and log-sum-exp count the logits `elsewhere`, given as their own log-sum-exp, if there are any.
    """
    top = logits.max(axis=-1)
    top = top if elsewhere is None else jnp.maximum(top, elsewhere)
    some = top > -jnp.inf
    base = jnp.where(some, top, 0.0)
    p = jnp.exp(logits - base[..., None])
    total = p.sum(axis=-1) + (0.0 if elsewhere is None else jnp.exp(elsewhere - base))
    total = jnp.where(some, total, 1.0)
    return p, total, jnp.where(some, top + jnp.log(total), -jnp.inf)


def _counted(need: Mass, q_pos, newest):
    """1.0 for the queries that `need` counts, f32[B, H or 1, T]."""
    counted = q_pos != FREE
    if need.last is not None:
        counted &= q_pos > newest - need.last
    return counted.astype(jnp.float32)


def _check(q, k, v, cache, policy, positions, rope, capacity, sliding_window):
    check_policy(policy)
    if policy.layers:
        raise ValueError(f"attend: {policy.name} has a policy for each layer; give this layer's, policy.layers[i].")
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"attend: q {q.shape} must be [B, T, q_heads, D], and k {k.shape} [B, T, kv_heads, D].")
    batch, count, q_heads, head_dim = q.shape
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != head_dim:
        raise ValueError(
            f"attend: k {k.shape} and v {v.shape} must both be [B, T, kv_heads, D] for q {q.shape}, [B, T, q_heads, D]."
        )
    if k.shape[2] == 0 or q_heads % k.shape[2]:
        raise ValueError(
            f"attend: q has {q_heads} heads and k has {k.shape[2]}; q_heads must be a multiple of kv_heads. Was k "
            f"already repeated, or split differently?"
        )
    if positions.shape != (batch, count):
        raise ValueError(
            f"attend: positions have shape {positions.shape}; q of shape {q.shape} wants {(batch, count)}."
        )
    if count == 0:
        raise ValueError(f"attend: q has shape {q.shape}, without a token. Give at least one.")
    if not (q.dtype == k.dtype == v.dtype and jnp.issubdtype(q.dtype, jnp.floating)):
        raise ValueError(f"attend: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; give one floating dtype.")
    if sliding_window is not None:
        whole("attend", "sliding_window", sliding_window, least=1, mend="None sees all.")
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"attend: positions are {positions.dtype}, and must be integers, i32[B, T]; -1 marks padding.")
    if policy.ranks is not None and rope is None:
        raise ValueError(
            f"attend: {policy.name} gives cached tokens new positions, so it must rotate the keys itself. Pass q and k "
            f"un-rotated, and rope=kvjax.Rope(base=...)."
        )
    slots = 0 if cache is None else cache.slots
    least = policy.needed(count)
    if policy.low is not None:  # of two tiers; a number stands for a sequence of so many tokens
        least = count if isinstance(capacity, int) else (least, policy.low.needed(count))
    elif policy.budget is None and policy.grow is None:
        least = max(slots, count)
    if capacity is not None and capacity < least:
        raise ValueError(f"attend: capacity={capacity} is too small for {policy.name}, which needs {least} slots here.")
    for tier in (policy, policy.low):
        for codec in () if tier is None else (tier.keys, tier.values):
            if codec is not None:
                codec.check(head_dim)
    if cache is None:
        return
    if cache.made_by is not policy:
        made_by = "no policy" if cache.made_by is None else cache.made_by.name
        raise ValueError(
            f"attend: the cache was made by {made_by}, and the policy given is {policy.name}. Give its own."
        )
    want = (batch, k.shape[2], cache.slots)
    if (
        cache.pos.shape != want
        or cache.dtype != k.dtype
        or (policy.keys is None and policy.form is None and cache.k.shape[3] != head_dim)
    ):
        raise ValueError(
            f"attend: the cache holds {cache.dtype} keys in [B, kv_heads, slots] = {list(cache.pos.shape)}, and k of "
            f"this call is {k.dtype}{list(k.shape)}. Was this cache made for another model, batch or dtype?"
        )


def _check_prefix(prefix, policy, q, k):
    if prefix is None:
        return
    own = prefix.made_by
    for name, which in ((policy.name, policy), (None if own is None else own.name, own)):
        if which is None or which.ranks is not None:
            raise ValueError(
                f"attend: {name or 'no policy'} cannot have to do with a shared prefix: it numbers tokens by their "
                f"place in the cache, and those of a prefix are rotated at their true positions. Take a policy that "
                f"keeps true positions."
            )
    if own.low is not None or own.form is not None:
        raise ValueError(
            f"attend: the prefix was made by {own.name}, which stores whole layers or two tiers, and a prefix is read "
            f"as one set of slots. Take `full` or a policy that evicts, with codecs or without."
        )
    shape, rows = prefix.pos.shape, q.shape[0]
    if shape[0] == 0 or rows % shape[0] or shape[1] != k.shape[2] or prefix.dtype != k.dtype:
        raise ValueError(
            f"attend: the prefix has {prefix.dtype} slots [P, kv_heads, N] = {list(shape)}, and k is {k.dtype}"
            f"{list(k.shape)}; wanted P that divides its {rows} rows, and the same heads and dtype."
        )


def _check_given(policy, stats, given, in_step, shape, heads):
    batch, count = shape
    if not isinstance(given, dict):
        raise ValueError(f"attend: given is a {type(given).__name__}, and must be {{name of a statistic: array}}.")
    missing = sorted(policy.given - given.keys())
    if missing and (policy.given_in_steps or not in_step):
        raise ValueError(
            f"attend: {policy.name} must be given {missing}, [B, T] or [B, kv_heads, T]: see given=. A model with "
            f"trained heads gives them by itself: kvjax.with_heads."
        )
    for name, x in given.items():
        if name not in stats:
            raise ValueError(f"attend: given[{name!r}] is no statistic of {policy.name}, which has {sorted(stats)}.")
        if jnp.shape(x) not in ((batch, count), (batch, heads, count)):
            raise ValueError(
                f"attend: given[{name!r}] has shape {jnp.shape(x)}, and must be {(batch, count)} or "
                f"{(batch, heads, count)}."
            )

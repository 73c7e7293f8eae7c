"""A fold is the weighted mean that it says, in one slot of one row and head, and nothing anywhere else."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from kvjax import folds
from kvjax.cache import LayerShape, empty, extend
from kvjax.policy import Masses, Seen

ROWS, HEADS, DIM = 3, 2, 4
ROW, HEAD = 1, 0  # where the one loser that joins is


def folded(slots, count, target):
    """A cache of `slots` in use, the `count` oldest of which leave, and the same folded: token 0 of one head joins."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, ROWS, HEADS, slots, DIM), dtype=np.float32)
    positions = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (ROWS, slots))
    cache = empty(LayerShape(ROWS, HEADS, 0, DIM, jnp.float32, 0), {})
    cache = extend(cache, jnp.asarray(k), jnp.asarray(v), positions)
    kept = jnp.broadcast_to(jnp.arange(slots) >= count, cache.pos.shape)
    losers = folds.gather_losers(cache, kept, count)
    weight = jnp.zeros(losers.slot.shape).at[ROW, HEAD, 0].set(0.25)
    zeros = jnp.zeros((ROWS, HEADS, 1, 1, DIM))
    seen = Seen(positions[:, -1:], zeros, zeros[:, :, 0], zeros, zeros[..., 0], Masses())
    target = jnp.full(losers.slot.shape, target, jnp.int32)
    return cache, folds.fold(cache, kept, losers, target, weight, weight, seen)


def but_for(leaf, slot):
    """The leaf with zeros in one slot, of the row and head that has a loser."""
    return np.asarray(leaf.at[ROW, HEAD, slot].set(0))


MANY = folds.FEW + 1
SIZES = pytest.mark.parametrize("slots, count", [(6, 1), (6, 3), (MANY + 4, MANY)], ids=["one", "few", "many"])


@SIZES
def test_a_loser_joins_its_target_and_no_slot_of_another_row_or_head(slots, count):
    last = slots - 1
    cache, got = folded(slots, count, last)
    for new, old in ((got.k, cache.k), (got.v, cache.v)):
        want = (old[ROW, HEAD, last] + 0.25 * old[ROW, HEAD, 0]) / 1.25
        assert_allclose(new[ROW, HEAD, last], want, rtol=1e-6)
        assert_array_equal(but_for(new, last), but_for(old, last))


@SIZES
@pytest.mark.parametrize("beyond", [0, 2])
def test_a_target_beyond_the_slots_of_its_row_is_no_slot_of_the_next(slots, count, beyond):
    cache, got = folded(slots, count, slots + beyond)
    assert_array_equal(got.k, cache.k)
    assert_array_equal(got.v, cache.v)
    assert (np.asarray(got.pos) >= 0).sum() == ROWS * HEADS * (slots - count)

import jax.numpy as jnp
import pytest

import kvjax
from kvjax import policies
from tests.methods import POLICIES, every_bounded_method, every_method
from tests.tiny import CONFIG, random_params, random_tokens

PARAMS = random_params()
LENGTHS = (24, 13, 3)  # rows of one batch
HEADS = CONFIG.layers * CONFIG.kv_heads


def fill(policy, lengths=LENGTHS, params=PARAMS, room=0):
    tokens = random_tokens(len(lengths), max(lengths))
    return kvjax.prefill(params, policy, tokens, lengths=lengths, room=room)[1]


def test_kinds_of_h2o_in_bytes():
    report = kvjax.report(fill(policies.h2o(10, window=4)))
    slots = HEADS * 3 * 11  # one above the budget in each row, for the token to come
    assert report.by_kind == {
        "keys": slots * CONFIG.head_dim * 4,
        "values": slots * CONFIG.head_dim * 4,
        "positions": slots * 4 + 3 * 4,  # and the length of each row
        "statistics": slots * 4,  # the mass
        "other": 0,
    }


def test_kinds_of_random_in_bytes():
    report = kvjax.report(fill(policies.random(10)))
    assert report.by_kind["statistics"] == 0
    assert report.by_kind["other"] == 4 * CONFIG.layers  # the number of the layer


def test_bfloat16_halves_keys_and_values_of_this_cache_and_of_the_full_one():
    policy = policies.h2o(10, window=4)
    wide = kvjax.report(fill(policy))
    narrow = kvjax.report(fill(policy, params=random_params(dtype=jnp.bfloat16)))
    assert narrow.by_kind == {**wide.by_kind, "keys": wide.by_kind["keys"] // 2, "values": wide.by_kind["values"] // 2}
    assert wide.full - narrow.full == HEADS * 3 * 24 * CONFIG.head_dim * 4  # twice, half as wide


@every_method
def test_full_is_what_the_full_policy_would_take(row):
    assert kvjax.report(fill(row.make(10))).full == kvjax.nbytes(fill(policies.full()))


@every_bounded_method
def test_occupancy_counts_the_tokens_held_in_each_row(row):
    report = kvjax.report(fill(row.make(10)))
    held = 10 - (row.slack if row.spare is None else row.spare)
    assert report.used == HEADS * (2 * held + 3)
    assert report.slots == HEADS * 3 * 11
    assert report.tokens == 24


def test_occupancy_of_the_full_cache_leaves_out_padding_and_room():
    report = kvjax.report(fill(policies.full(), room=5))
    assert report.used == HEADS * sum(LENGTHS)
    assert report.slots == HEADS * 3 * 29
    assert report.total > report.full  # memory is capacity, room included


@pytest.mark.parametrize("method", ["full", "h2o"])
def test_a_token_more_is_counted(method):
    policy = POLICIES[method].make(30)  # keeps all
    before = fill(policy, room=1)
    _, after = kvjax.step(PARAMS, policy, jnp.array([1, 1, -1]), before)  # the last row has stopped
    assert kvjax.report(after).used == kvjax.report(before).used + 2 * HEADS
    assert (kvjax.report(before).tokens, kvjax.report(after).tokens) == (24, 25)
    assert kvjax.report(after).total == kvjax.report(before).total


def test_an_empty_cache_is_reported():
    report = kvjax.report(kvjax.empty_cache(PARAMS, policies.full(), 2))
    assert (report.slots, report.used, report.tokens) == (0, 0, 0)
    assert report.total == report.full == 2 * 4  # the lengths
    assert "0 of 0 slots" in str(report)


def test_printing_gives_a_table():
    report = kvjax.report(fill(policies.h2o(10, window=4)))
    assert str(report).splitlines() == [
        "h2o(budget=10, window=4)",
        "keys                 4,224 B",
        "values               4,224 B",
        "positions              540 B",
        "statistics             528 B",
        "total                9,516 B   48.6% of full at 24 tokens",
        "occupancy               92 of 132 slots (69.7%)",
        "attention   reference: there are no kernels for cpu",
    ]


def test_a_kind_that_takes_nothing_has_no_line():
    assert "statistics" not in str(kvjax.report(fill(policies.tova(10))))

"""The KIVI oracle against its worked examples and the properties of its specification."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.oracles import common, full, kivi, quantiser

KV_HEADS, GROUP, DIM, N = 2, 3, 8, 30
SMALL = {"group": 4, "residual": 8}
CALLS = {"prompt then tokens": [10] + [1] * 20, "chunks": [7, 7, 6, 10], "tokens": [1] * N, "one": [N]}
each_calls = pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)


def make_stream(n=N, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(n, KV_HEADS * GROUP, DIM)) * 2.0
    k, v = rng.normal(size=(2, n, KV_HEADS, DIM))
    return q, k, v


def outputs(calls):
    return np.concatenate([call.out for call in calls])


def rotated(x):
    return np.array([[common.rope(head, p) for head in row] for p, row in enumerate(x)])


# ---- worked examples ----

K = np.array([[1, 10], [1.5, 12], [2.5, 10.5], [4, 13]])
WIDE = np.concatenate([K, [[0.2, -0.3], [0.1, 0.4], [-0.2, 0.3], [0.3, 0.1]]], axis=1)


def test_example_codes_and_words():
    channels = [quantiser.quantise(K[:, j], 2, 4) for j in range(2)]
    assert [channel.alpha + channel.beta for channel in channels] == [[1, 1], [1, 10]]
    assert np.transpose([channel.codes for channel in channels]).tolist() == [[0, 0], [0, 2], [2, 0], [3, 3]]
    assert [quantiser.pack(channel.codes, 2).tolist() for channel in channels] == [[0xE0], [0xC8]]
    assert kivi.rounded_keys(K, 2, 4).tolist() == [[1, 10], [1, 12], [3, 10], [4, 13]]


def test_example_channels_beat_tokens():
    assert_allclose(np.abs(kivi.rounded_keys(WIDE, 2, 4) - WIDE).mean(), 0.110417, atol=5e-7)
    assert_allclose(np.abs(kivi.rounded_values(WIDE, 2, 4) - WIDE).mean(), 0.341977, atol=5e-7)
    fine = np.stack([quantiser.rounded(row, 2, 4, np.float32) for row in WIDE])
    assert_allclose(np.abs(fine - WIDE).mean(), 0.341667, atol=5e-7)


def test_example_lengths():
    assert [kivi.lengths(t, 4) for t in (6, 7, 8, 9)] == [(4, 2), (4, 3), (8, 4), (8, 5)]


def test_example_run():
    # keys turned back, so that the oracle's turning gives the example's
    k = np.stack([common.rope(key, -p) for p, key in enumerate(K)])[:, None]
    *_, last = kivi.run(np.ones_like(k), k, k, [1] * 4, group=2, residual=4)
    assert last.kept == [[]]
    pairs = np.concatenate([kivi.rounded_keys(K[:2], 2, 2), kivi.rounded_keys(K[2:], 2, 2)])
    assert_allclose([last.held[0][p].key for p in range(4)], pairs, atol=1e-12)
    assert_allclose([last.held[0][p].value for p in range(4)], k[:, 0])


# ---- properties ----


@each_calls
def test_a_residual_longer_than_the_stream_is_the_full_cache(calls):
    stream = make_stream()
    got = kivi.run(*stream, calls, group=4, residual=32)
    assert_allclose(outputs(got), outputs(full.run(*stream, calls)), atol=1e-12)
    assert got[-1].kept == [list(range(N))] * KV_HEADS


def test_keys_flush_when_the_residual_is_full():
    got = kivi.run(*make_stream(), [7] + [1] * 23, **SMALL)
    assert [len(call.kept[0]) for call in got[:4]] == [7, 0, 1, 2]


def test_the_attending_step_sees_the_residual_before_it_is_flushed():
    stream = make_stream()
    got = kivi.run(*stream, [1] * N, **SMALL)
    exact = outputs(full.run(*stream, [1] * N))
    assert_allclose(outputs(got)[:8], exact[:8], atol=1e-12)
    assert not np.allclose(outputs(got)[8], exact[8])


@each_calls
def test_state_is_the_one_shot_quantisation(calls):
    q, k, v = make_stream()
    got = kivi.run(q, k, v, calls, **SMALL)
    turned = rotated(k)
    for call, t in zip(got, np.cumsum(calls), strict=True):
        n_kq, n_vq = kivi.lengths(int(t), 8)
        for h in range(KV_HEADS):
            assert call.kept[h] == list(range(n_kq, t))
            keys = turned[:t, h].copy()
            values = v[:t, h].copy()
            if n_kq:
                keys[:n_kq] = kivi.rounded_keys(keys[:n_kq], 2, 4)
            if n_vq:
                values[:n_vq] = kivi.rounded_values(values[:n_vq], 2, 4)
            assert_allclose([call.held[h][p].key for p in range(t)], keys)
            assert_allclose([call.held[h][p].value for p in range(t)], values)


@each_calls
def test_outputs_are_dense_attention_over_what_was_in_hand(calls):
    q, k, v = make_stream()
    got = kivi.run(q, k, v, calls, **SMALL)
    q, k = rotated(q), rotated(k)
    held = [{} for _ in range(KV_HEADS)]
    start = 0
    for call, c in zip(got, calls, strict=True):
        for x in range(q.shape[1]):
            h = x // GROUP
            hand = held[h] | {p: common.Token(k[p, h], v[p, h]) for p in range(start, start + c)}
            for p in range(start, start + c):
                keys, values = (np.array([getattr(hand[i], what) for i in range(p + 1)]) for what in ("key", "value"))
                weights = np.exp(keys @ q[p, x] / np.sqrt(DIM))
                assert_allclose(call.out[p - start, x], weights @ values / weights.sum(), atol=1e-12)
        held, start = call.held, start + c


def test_per_channel_key_error():
    keys = make_stream()[1][:8, 0]
    error = np.abs(kivi.rounded_keys(keys, 2, 4) - keys)
    for j in range(DIM):
        scales = np.repeat(quantiser.quantise(keys[:, j], 2, 4).alpha, 4)
        assert (error[:, j] <= scales / 2 + 3 * 2**-11 * np.abs(keys[:, j]).max() + 3 * 2**-24).all()
    assert error.max() > 0  # a group of one token would be exact


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="groups"):
        kivi.run(*make_stream(), [N], group=4, residual=6)
    with pytest.raises(ValueError, match="calls"):
        kivi.run(*make_stream(5), [3, 3], **SMALL)

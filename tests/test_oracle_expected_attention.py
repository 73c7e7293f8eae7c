"""The oracle of expected attention, on numbers worked by hand."""

import numpy as np
from numpy.testing import assert_allclose

from tests.oracles import expected_attention


def test_a_mean_and_a_variance_make_the_logits():
    # queries [2, 0] and [0, 0]: mean [1, 0], variance [1, 0]; D = 2
    queries = [np.array([2.0, 0.0]), np.array([0.0, 0.0])]
    keys = {0: np.array([0.0, 5.0]), 1: np.array([1.0, 0.0]), 2: np.array([-1.0, 0.0])}
    logits = np.array([0.0, 2**-0.5 + 0.25, -(2**-0.5) + 0.25])
    weights = expected_attention.expected_weights(queries, keys)
    assert_allclose([weights[p] for p in range(3)], np.exp(logits) / np.exp(logits).sum())


def test_the_longer_value_stays_where_keys_are_alike():
    q, k = np.ones((6, 1, 2)), np.zeros((6, 1, 2))
    v = np.zeros((6, 1, 2))
    v[:, 0, 0] = [1, 5, 2, 4, 3, 0]
    (call,) = expected_attention.run(q, k, v, [6], budget=4, window=1, sinks=1)
    assert call.kept == [[0, 1, 3, 5]]
    assert_allclose(call.scores[0][2], 2 / 6)

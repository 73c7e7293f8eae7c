"""The quantiser oracle against the worked examples of MiKV and KIVI and the properties of their specification."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.oracles import quantiser

X = np.array([-1, 0, 0.5, 2, 0.25, 0.5, 0.75, 1])
ROWS = {  # bits: codes, alpha, xhat, words
    2: ([0, 1, 2, 3, 0, 1, 2, 3], [1, 0.25], [-1, 0, 1, 2, 0.25, 0.5, 0.75, 1], [0xE4E4]),
    3: (
        [0, 2, 4, 7, 0, 2, 5, 7],
        [0.428467, 0.107117],
        [-1, -0.143066, 0.713867, 1.999268, 0.25, 0.464233, 0.785583, 0.999817],
        [0xD8C8, 0xCC],
    ),
    4: (
        [0, 5, 8, 15, 0, 5, 10, 15],
        [0.199951, 0.049988],
        [-1, -0.000244, 0.599609, 1.999268, 0.25, 0.499939, 0.749878, 0.999817],
        [0xFA50F850],
    ),
}
each_bits = pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])


def bound(x, alpha, bits):
    return alpha / 2 + 3 * 2**-11 * np.abs(x).max() + 2**-24 * (2**bits - 1)


@pytest.mark.parametrize("bits", ROWS)
def test_example_rows(bits):
    codes, alpha, xhat, words = ROWS[bits]
    got = quantiser.quantise(X, bits, group=4)
    assert got.codes == codes
    assert_allclose(got.alpha, alpha, atol=5e-7)
    assert got.beta == [-1, 0.25]
    assert_allclose(quantiser.dequantise(got), xhat, atol=5e-7)
    assert quantiser.pack(codes, bits).tolist() == words
    assert quantiser.unpack(words, bits, 8) == codes


def test_example_three_bits_straight():
    straight = sum(code << (3 * j) for j, code in enumerate(ROWS[3][0]))
    assert straight == 0xF50F10


def test_example_balancer():
    q, k = np.array([[4, 0.5, -2, 8.0]]), np.array([1, -4, 0.5, 0.25])
    others_q, others_k = np.array([[0, 1, 0, 0.0]]), np.array([0, 0, 2, 0.5])
    bal = quantiser.balancer(np.stack([q, others_q]), np.stack([k, others_k]))
    assert_allclose(bal, [2, 0.5, 1, 4])
    assert q[0] @ k == 3.0

    plain = quantiser.rounded(k, 2, 4)
    assert_allclose(plain, [1.000977, -4, 1.000977, 1.000977], atol=5e-7)
    assert_allclose(q[0] @ plain, 8.009766, atol=5e-7)

    balanced = quantiser.quantise(k * bal, 2, 4)
    assert balanced.codes == [3, 0, 2, 2]
    assert_allclose(balanced.alpha + balanced.beta, [1.333008, -2], atol=5e-7)
    khat = quantiser.dequantise(balanced)
    assert_allclose(khat, [1.999023, -2, 0.666016, 0.666016], atol=5e-7)
    assert_allclose((q[0] / bal) @ khat, 1.998047, atol=5e-7)


def test_balancer_takes_the_maximum_over_the_group_and_all_tokens():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(7, 3, 4)), rng.normal(size=(7, 4))
    bal = quantiser.balancer(q, k)
    assert_allclose(np.abs(k * bal).max(axis=0), np.abs(q / bal).max(axis=(0, 1)))
    assert_allclose(quantiser.balancer(9 * q, k), 3 * bal)


def test_balancer_is_one_without_a_ratio_and_clamped():
    q = np.array([[[0, 1, np.inf, 1e9, 1e-9, np.nan]]])
    k = np.array([[1, 0, 1, 1e-9, 1e9, 1.0]])
    assert_allclose(quantiser.balancer(q, k), [1, 1, 1, 1e4, 1e-4, 1])


@each_bits
@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 128])
def test_unpacking_undoes_packing(bits, count):
    codes = [7 * i % 2**bits for i in range(count)]
    words = quantiser.pack(codes, bits)
    assert words.dtype == np.uint32
    assert quantiser.unpack(words, bits, count) == codes


@pytest.mark.parametrize(("bits", "words"), [(1, 4), (2, 8), (3, 12), (4, 16), (8, 32)])
def test_row_widths(bits, words):
    codes = [(i + i // 2**bits) % 2**bits for i in range(128)]
    assert len(quantiser.pack(codes, bits)) == words == 128 * bits / 32


def test_words_are_little_endian():
    assert quantiser.pack([1, 2, 3], 8).tobytes() == bytes([1, 2, 3, 0])
    assert quantiser.pack([1] + [0] * 31 + [1], 1).tolist() == [1, 1]


def test_the_last_code_of_a_word_may_set_its_highest_bit():
    assert quantiser.pack([0] * 7 + [15], 4).tolist() == [0xF0000000]


@each_bits
def test_error_bound_and_end_codes(bits):
    rng = np.random.default_rng(bits)
    for _ in range(400):
        x = (rng.normal(size=16) + rng.normal() * 3) * 10.0 ** rng.integers(-6, 4)
        got = quantiser.quantise(x, bits, 16)
        (alpha,), (beta,) = got.alpha, got.beta
        assert np.abs(x - quantiser.dequantise(got)).max() <= bound(x, alpha, bits)
        if 2**-11 * (abs(beta) + np.ptp(x)) < alpha / 2 and alpha >= 2**-14:
            assert got.codes[np.argmin(x)] == 0
            assert got.codes[np.argmax(x)] == 2**bits - 1


@each_bits
@pytest.mark.parametrize("value", [0.0, 1.0, -0.0078125, 3.5e4])
def test_constant_groups_come_back_exactly(bits, value):
    value = float(np.float16(value))
    got = quantiser.quantise(np.full(8, value), bits, 4)
    assert got.codes == [0] * 8
    assert quantiser.dequantise(got).tolist() == [value] * 8


def test_halves_round_to_even():
    assert quantiser.quantise(np.array([0, 0.5, 1.5, 2.5, 3]), 2, 5).codes == [0, 0, 2, 2, 3]


def test_codes_follow_the_stored_metadata():
    # 1/3 is stored as .333252: .4999 is 1.50007 of these steps, 1.4997 of the unrounded ones; 2.0003 is stored as 2.
    assert quantiser.quantise(np.array([0, 0.4999, 1, 1.0]), 2, 4).codes == [0, 2, 3, 3]
    assert quantiser.quantise(np.array([2.0003, 2.0003]), 2, 2).beta == [2.0]


def test_a_matrix_product_needs_no_widened_codes():
    rng = np.random.default_rng(3)
    q, x = rng.normal(size=(2, 16))
    got = quantiser.quantise(x, 2, 4)
    total = 0.0
    for i, (alpha, beta) in enumerate(zip(got.alpha, got.beta, strict=True)):
        part = slice(4 * i, 4 * i + 4)
        total += alpha * (q[part] @ got.codes[part]) + beta * q[part].sum()
    assert_allclose(total, q @ quantiser.dequantise(got), atol=1e-12)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="fill"):
        quantiser.quantise(np.zeros(6), 2, 4)
    with pytest.raises(ValueError, match="range"), np.errstate(over="ignore"):
        quantiser.quantise(np.array([-1e5, 0.0]), 2, 2)

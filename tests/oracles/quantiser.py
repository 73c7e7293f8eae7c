"""The asymmetric quantiser that MiKV and KIVI share, its packing, and MiKV's channel balancer.

Sources: Yang et al. 2024, arXiv:2402.18096, eqs. 1-4; Liu et al. 2024, arXiv:2402.02750. Vectors are 1-D here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SMALLEST_STEP = 2.0**-24  # the smallest positive float16


@dataclass(frozen=True)
class Quantised:
    """Codes 0..2^b-1 of one vector, and per group the step alpha and the minimum beta, at their stored precision."""

    codes: list[int]
    alpha: list[float]
    beta: list[float]
    group: int


def quantise(x: np.ndarray, bits: int, group: int, meta: type = np.float16) -> Quantised:
    """Rounds groups of consecutive entries to `bits` bits; half to even, against the stored alpha and beta."""
    if len(x) % group:
        raise ValueError(f"groups of {group} do not fill a vector of {len(x)}")
    levels = 2**bits - 1
    codes, alphas, betas = [], [], []
    for start in range(0, len(x), group):
        part = [float(entry) for entry in x[start : start + group]]
        alpha = max(float(meta((max(part) - min(part)) / levels)), SMALLEST_STEP)
        beta = float(meta(min(part)))
        if not (np.isfinite(alpha) and np.isfinite(beta)):
            raise ValueError(f"{meta.__name__} cannot hold the range of {part}")
        codes += [min(max(round((entry - beta) / alpha), 0), levels) for entry in part]
        alphas.append(alpha)
        betas.append(beta)
    return Quantised(codes, alphas, betas, group)


def dequantise(x: Quantised) -> np.ndarray:
    """alpha * code + beta, f64."""
    return np.array([x.alpha[i // x.group] * code + x.beta[i // x.group] for i, code in enumerate(x.codes)])


def rounded(x: np.ndarray, bits: int, group: int, meta: type = np.float16) -> np.ndarray:
    """x as it comes back from its codes."""
    return dequantise(quantise(x, bits, group, meta))


def pack_plane(codes: Sequence[int], bits: int) -> list[int]:
    """32-bit words, the first code in the lowest bits; the last word is filled up with code 0."""
    per_word = 32 // bits
    words = []
    for start in range(0, len(codes), per_word):
        word = 0
        for j, code in enumerate(codes[start : start + per_word]):
            word |= int(code) << (bits * j)
        words.append(word)
    return words


def unpack_plane(words: Sequence[int], bits: int, count: int) -> list[int]:
    per_word = 32 // bits
    return [int(words[i // per_word]) >> (bits * (i % per_word)) & (2**bits - 1) for i in range(count)]


def pack(codes: Sequence[int], bits: int) -> np.ndarray:
    """u32 words of 1, 2, 3, 4 or 8 bit codes; 3 bits are a plane of the low two bits, then a plane of the third."""
    if bits == 3:
        words = pack_plane([code & 3 for code in codes], 2) + pack_plane([code >> 2 for code in codes], 1)
    else:
        words = pack_plane(codes, bits)
    return np.array(words, np.uint32)


def unpack(words: np.ndarray, bits: int, count: int) -> list[int]:
    """The first `count` codes of what `pack` made."""
    if bits != 3:
        return unpack_plane(words, bits, count)
    split = -(-count // 16)  # words of the two-bit plane
    low, high = unpack_plane(words[:split], 2, count), unpack_plane(words[split:], 1, count)
    return [a + 4 * b for a, b in zip(low, high, strict=True)]


def balancer(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Per channel sqrt(max |q| / max |k|), f64[D]: k * bal and q / bal then have the same maxima.

    q is f64[n, G, D], the prompt's queries of a group; k is f64[n, D], its keys; both rotated.
    """
    bal = np.ones(k.shape[-1])
    for j in range(k.shape[-1]):
        top_q, top_k = np.abs(q[..., j]).max(), np.abs(k[..., j]).max()
        if np.isfinite(top_q) and np.isfinite(top_k) and top_q > 0 and top_k > 0:
            bal[j] = min(max(np.sqrt(top_q / top_k), 1e-4), 1e4)
    return bal

"""Where kvpress and kvjax define a method alike, they keep the same tokens of the real model."""

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import kvjax
from kvjax import policies
from tests.methods import kept_positions
from tests.plain import smollm2

REFERENCES = Path(__file__).parent / "references"
REFERENCE = np.load(REFERENCES / "kvpress_kept.npz")
BUDGET = REFERENCE["tova"].shape[-1]
POLICIES = {
    "snapkv": policies.snapkv(BUDGET),
    "streaming_llm": policies.streaming_llm(BUDGET),
    "keydiff": policies.keydiff(BUDGET),
    "tova": policies.tova(BUDGET),
}


@pytest.mark.real_model
@pytest.mark.parametrize("name", POLICIES)
def test_the_kept_positions_are_those_of_kvpress(name):
    _, cache = kvjax.prefill(smollm2().params, POLICIES[name], REFERENCE["tokens"][None])
    for layer, want in zip(REFERENCE["layers"], REFERENCE[name], strict=True):
        assert_array_equal(kept_positions(cache.layers[layer], 0), want)


@pytest.mark.real_model
def test_compactor_keeps_what_kvpress_keeps_on_the_same_projection_but_for_near_ties():
    reference = np.load(REFERENCES / "kvpress_compactor.npz")
    policy = policies.compactor(reference["kept"].shape[-1])
    _, cache = kvjax.prefill(smollm2().params, policy, reference["tokens"][None])
    differ = 0
    for layer, want in zip(reference["layers"], reference["kept"], strict=True):
        differ += sum(
            len(np.setdiff1d(*pair)) for pair in zip(kept_positions(cache.layers[layer], 0), want, strict=True)
        )
    # of 1179. The first layer's Gram matrix has a condition of 2e5, so that in f32 both libraries' scores are off by
    # 2e-3 or 3e-3 there; in f64 two tokens at the edge of the budget are 4e-4 apart, and kvjax swaps them.
    assert differ <= 2

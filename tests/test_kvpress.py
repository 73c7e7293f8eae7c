"""Where kvpress and kvjax define a method alike, they keep the same tokens of the real model."""

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import kvjax
from kvjax import policies
from tests.methods import kept_positions
from tests.plain import smollm2

REFERENCE = np.load(Path(__file__).parent / "references" / "kvpress_kept.npz")
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

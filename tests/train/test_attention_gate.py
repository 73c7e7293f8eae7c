"""Training of gates: attention with a gate inside, its gradients and the losses, against the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests.oracles import attention_gate as oracle
from tests.plain import plain_logits
from tests.tiny import CONFIG, random_params, random_tokens
from train import attention_gate, backbone, gated
from train.gated import gated_attention

GROUP, COUNT, DIM = 2, 11, 4
FIXED = [9, 10]  # seen by all
BATCH = {"tokens": random_tokens(2, 16), "prompt_lengths": jnp.array([9, 6]), "lengths": jnp.array([16, 13])}
FROZEN = backbone.stacked(random_params())
SETTINGS = attention_gate.Settings(
    model="", files=(), folder="", output="", sequence=16, steps=40, heads=2, head_dim=4, batch=2
)


@pytest.fixture(autouse=True)
def in_blocks(monkeypatch):
    monkeypatch.setattr(gated, "BLOCK_LOGITS", 4 * COUNT)  # four queries at a time, the last block not full


def streams(seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(shape) for shape in ((COUNT, GROUP, DIM), (COUNT, DIM), (COUNT, DIM)))
    return q, k, v, (rng.random(COUNT) > 0.5).astype(float), rng.standard_normal(q.shape)


def attended(q, k, v, flags, clamp=None):
    """One row, one kv_head: [T, G, D]."""
    q, k, v, flags = (jnp.asarray(x, jnp.float32) for x in (q, k, v, flags))
    free = jnp.ones((1, COUNT), bool).at[0, jnp.array(FIXED)].set(False)
    scaled = q.transpose(1, 0, 2)[None, None] * DIM**-0.5
    return gated_attention(scaled, k[None, None], v[None, None], flags[None, None], free, clamp)[0, 0].transpose(
        1, 0, 2
    )


@pytest.mark.parametrize("kept", ["some", "none", "all"])
def test_a_gate_inside_the_softmax_hides_what_it_does_not_let_pass(kept):
    q, k, v, flags, _ = streams()
    flags = {"some": flags, "none": 0 * flags, "all": 0 * flags + 1}[kept]
    assert_allclose(attended(q, k, v, flags), oracle.gated_attention(q, k, v, flags, FIXED), atol=1e-5)


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_gradients_are_those_of_the_oracle_also_of_keys_that_took_no_part(clamp):
    q, k, v, flags, out_grad = streams(1)

    def loss(*args):
        return (attended(*args, clamp=clamp) * jnp.asarray(out_grad, jnp.float32)).sum()

    got = jax.grad(loss, argnums=(0, 1, 2, 3))(*(jnp.asarray(x, jnp.float32) for x in (q, k, v, flags)))
    for gradient, want in zip(got[:3], oracle.input_gradients(q, k, v, flags, out_grad, FIXED), strict=True):
        assert_allclose(gradient, want, atol=1e-4)
    assert_allclose(got[3], oracle.gate_gradient(q, k, v, flags, out_grad, FIXED, clamp), atol=1e-4)


def test_a_flag_is_0_or_1_and_passes_its_gradient_to_the_probability():
    p = jnp.array([0.2, 0.5, 0.500001, 0.9])
    value, gradient = jax.value_and_grad(lambda p: (attention_gate.straight_through(p, 0.5) * jnp.arange(4.0)).sum())(p)
    assert value == 2 + 3
    assert_array_equal(gradient, np.arange(4.0))


@pytest.mark.parametrize("bracket", ["abs", "square", "hinge"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_share_that_is_kept_costs_what_the_oracle_says(bracket, scope):
    values = np.random.default_rng(2).random((3, 2, 5, 2))
    want, _ = oracle.eviction_loss(values, np.ones((2, 5), bool), target=0.5, bracket=bracket, scope=scope)
    settings = dataclasses.replace(SETTINGS, bracket=bracket, scope=scope)
    assert_allclose(attention_gate.keep_loss(jnp.asarray(values.mean(axis=(1, 2, 3))), settings), want, rtol=1e-5)


def test_a_new_gate_changes_nothing_and_the_loss_is_that_of_the_answers_alone():
    trained = attention_gate.task(CONFIG, SETTINGS).init(jax.random.key(0))
    _, metrics = attention_gate.losses(trained, FROZEN, BATCH, 1.0, SETTINGS)
    logits = np.asarray(plain_logits(random_params(), BATCH["tokens"]), np.float64)
    want = [
        oracle.continuation_loss(logits[b, :stop], BATCH["tokens"][b, :stop].tolist(), start)
        for b, (start, stop) in enumerate(zip(BATCH["prompt_lengths"].tolist(), BATCH["lengths"].tolist(), strict=True))
    ]
    assert_allclose(metrics["answer_loss"], np.mean(want), rtol=1e-5)
    assert metrics["kept"] == 1


def fitted(settings, steps):
    task = attention_gate.task(CONFIG, settings)
    trained = task.init(jax.random.key(0))
    state = task.optimizer.init(trained)

    @jax.jit
    def step(trained, state, i):
        gradient, metrics = task.gradients(trained, FROZEN, BATCH, i)
        updates, state = task.optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, metrics

    for i in range(steps):
        trained, state, metrics = step(trained, state, i)
    return trained, task.evaluate(trained, FROZEN, BATCH)


def test_a_linear_gate_comes_to_keep_the_share_that_it_shall():
    settings = dataclasses.replace(SETTINGS, gate="linear", learning_rate=0.05, strength=20.0, bracket="square")
    _, metrics = fitted(settings, 40)
    assert abs(float(metrics["kept"]) - 0.5) < 0.1  # of 15 tokens, 2 heads and 2 layers


def test_lora_alone_lowers_the_loss_and_is_part_of_the_weights():
    settings = dataclasses.replace(SETTINGS, gate="none", lora_rank=2, lora_rate=0.05)
    before = attention_gate.task(CONFIG, settings).init(jax.random.key(0))
    _, at_first = attention_gate.losses(before, FROZEN, BATCH, 1.0, settings)
    trained, metrics = fitted(settings, 20)
    assert metrics["loss"] < at_first["loss"] - 0.1
    merged = dataclasses.replace(FROZEN, blocks=attention_gate.adapted(FROZEN.blocks, trained["lora"]))
    _, same = attention_gate.losses({"gate": None, "lora": {}}, merged, BATCH, 1.0, settings)
    assert_allclose(same["loss"], metrics["loss"], rtol=1e-5)


def test_no_gate_and_no_lora_leave_nothing_to_train():
    with pytest.raises(ValueError, match="gate='none' and lora_rank=0 leave nothing to train. Give lora_rank"):
        attention_gate.task(CONFIG, dataclasses.replace(SETTINGS, gate="none"))

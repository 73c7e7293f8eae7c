"""Training of retaining heads: labels, errors and recall against the oracle, and gradients against `jax.grad`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from numpy.testing import assert_allclose, assert_array_equal

from kvjax.models import llama
from kvjax.models.llama import Projected
from tests.oracles import locret as oracle
from tests.plain import plain_attention
from tests.tiny import CONFIG, random_heads, random_params, random_tokens
from tests.train import cases
from train import backbone, locret, loop
from train import mesh as meshes

BATCH = {  # of uneven rows; the third is all prompt, without an answer to learn from
    "tokens": random_tokens(4, 14),
    "prompt_lengths": jnp.array([9, 3, 8, 1]),
    "lengths": jnp.array([14, 10, 8, 3]),
}
ANSWER = 4  # tokens of an answer that count
FROZEN = backbone.stacked(random_params())
HEADS = random_heads()["locret"]


def spans(batch=BATCH, answer=ANSWER):
    """(row, tokens of its prompt, end of what counts of its answer) of the rows that have one."""
    for b, prompt in enumerate(batch["prompt_lengths"].tolist()):
        if (stop := int(batch["lengths"][b])) > prompt:
            yield b, prompt, min(stop, prompt + answer)


def random_projected(count, seed=0):
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((4, count, heads, CONFIG.head_dim)) for heads in (CONFIG.q_heads, CONFIG.kv_heads))
    return q, k, backbone.positions_of(BATCH)


def wanted(q, k, positions, batch=BATCH, answer=ANSWER):
    made = Projected(None, *(jnp.asarray(x, jnp.float32) for x in (q, k, k)), positions)
    q, k, _ = backbone.by_head(made, CONFIG)
    return locret.labels(q, k, batch, answer)


# ---- worked examples ----


def test_the_labels_of_the_example():
    # largest over two answer queries of each query head: [1 2 4 1 0] [2 0 3 -1 0] and [2 2 1 0 2] [0 -2 0 2 2]
    q = np.zeros((1, 2, 2, 7, 2))
    q[0, :, :, 5:] = [[[[1, 2], [0, 1]], [[2, -1], [1, 0]]], [[[1, 1], [-1, 0]], [[0, -2], [1, -1]]]]
    k = np.zeros((1, 2, 7, 2))
    k[0, :, :5] = [[[1, 0], [0, 1], [2, 1], [-1, 1], [0, 0]], [[1, 1], [0, 2], [-1, 0], [1, -1], [2, 0]]]
    got = locret.labels(f32(q), f32(k), {"prompt_lengths": jnp.array([5]), "lengths": jnp.array([7])}, 2)
    assert_allclose(got.wanted[0, :, :5] * np.sqrt(2), [[2, 2, 4, 1, 0], [2, 2, 1, 2, 2]], rtol=1e-6)
    assert got.asked.tolist() == [[True] * 5 + [False] * 2]


SAID = [[[0.5, 1, -0.5], [2, 0, 0.25]], [[1, 1.5, 3], [-1, 0, 0]]]
WANTED = [[[1, 1, 1.5], [0.5, 0, 0]], [[1, 2, 0.5], [0, 0.5, 0]]]


def f32(x):
    return jnp.asarray(np.asarray(x, np.float32))


def test_the_errors_of_the_example():
    error, rough = locret.errors(f32(SAID), locret.Labels(f32(WANTED), jnp.ones((2, 3), bool)))  # its layers as rows
    assert_allclose(error, [2.65625 / 6, 2.75 / 6], rtol=1e-6)
    assert_allclose(rough, [1.640625, 0.875], rtol=1e-6)
    assert_allclose(error.mean() + 0.0025 * rough.sum(), 0.45680990, rtol=1e-6)


# ---- labels ----


@pytest.mark.parametrize("block", [1, 3, 128])
def test_labels_are_the_largest_logits_of_answers_over_the_group(monkeypatch, block):
    monkeypatch.setattr(locret, "QUERIES", block)
    q, k, positions = random_projected(14)
    got = wanted(q, k, positions)
    for b, prompt, end in spans():
        want = oracle.labels(q[b, prompt:end], k[b, :prompt], range(prompt, end))
        assert_allclose(got.wanted[b, :, :prompt], want, atol=1e-5)


def test_nothing_is_asked_of_padding_of_answers_and_of_rows_without_one():
    got = wanted(*random_projected(14))
    assert got.asked.sum(axis=1).tolist() == [9, 3, 0, 1]
    assert_array_equal(got.asked[1], np.arange(14) < 3)
    assert (got.wanted == 0).all(where=~np.asarray(got.asked)[:, None])  # and nothing is infinite


def test_labels_do_not_change_when_a_token_of_the_answer_comes_twice():
    q, k, positions = random_projected(14)
    longer = BATCH | {"lengths": BATCH["lengths"] + 1}  # the first row's 14 tokens, and the last of them again
    one = wanted(q, k, positions, answer=14)
    twice = np.concatenate([q, q[:, -1:]], axis=1), np.concatenate([k, k[:, -1:]], axis=1)
    more = jnp.concatenate([positions, positions[:, -1:]], axis=1)
    assert_array_equal(one.wanted[0], wanted(*twice, more, longer, answer=15).wanted[0, :, :14])


# ---- errors and recall ----


def random_scores(seed=0, values=None):
    rng = np.random.default_rng(seed)
    shape = (4, CONFIG.kv_heads, 14)
    return rng.standard_normal(shape) * 2 if values is None else rng.integers(0, values, shape).astype(float)


def test_errors_are_those_of_the_oracle_for_each_row():
    said, target = random_scores(), wanted(*random_projected(14))
    error, rough = locret.errors(f32(said), target)
    for b, prompt, _ in spans():
        assert_allclose(error[b], oracle.regression(said[b, :, :prompt], target.wanted[b, :, :prompt]), rtol=1e-5)
        assert_allclose(rough[b], oracle.roughness(said[b, :, :prompt]), rtol=1e-5)
    assert error[2] == rough[2] == 0  # without an answer


def test_recall_is_that_of_the_oracle_for_each_row_with_many_equal_scores():
    said, other = random_scores(1, values=3), random_scores(2, values=4)
    said, other = (np.tile(x, (1, 1, 3)) for x in (said, other))  # of up to 40 tokens
    prompts = np.array([40, 21, 9, 1])
    target = locret.Labels(f32(other), jnp.asarray(np.arange(42) < prompts[:, None]))
    want = [oracle.recall(said[b : b + 1, :, :n], other[b : b + 1, :, :n]) for b, n in enumerate(prompts)]
    assert_allclose(locret.recall(f32(said), target), want, rtol=1e-6)
    assert len({*want}) > 1


# ---- gradients ----


def plain_loss(trained, params, batch, answer=ANSWER, smoothing=0.0025):
    """The loss of a batch as one function of all heads, layer by layer and without a scan; and its scores and labels.

    Attention is the plain one, and what is read of the labels is held to the oracle above.
    """
    config, positions, x = params.config, backbone.positions_of(batch), llama.embed(params, batch["tokens"])
    regression, roughness, seen = [], [], []
    blocks, heads = (backbone.unstack(tree, config.layers) for tree in (params.blocks, trained))
    for block, head in zip(blocks, heads, strict=True):
        made = llama.project(block, x, config, positions)
        q, k, v = backbone.by_head(made, config)
        target = locret.labels(q, k, batch, answer)
        error, rough = locret.errors(head(made), target)
        regression, roughness = [*regression, error.mean()], [*roughness, rough.mean()]
        seen.append((head(made), target.wanted))
        out = plain_attention(backbone.joined(q), k.swapaxes(1, 2), v.swapaxes(1, 2))
        x = llama.finish(block, x, out, config)
    return sum(regression) / config.layers + smoothing * sum(roughness), seen


@pytest.fixture(scope="module")
def compared():
    trained = backbone.stack(HEADS)
    got, metrics = jax.jit(lambda *args: locret.gradients(*args, None, answer=ANSWER, smoothing=0.0025))(
        trained, FROZEN, BATCH
    )
    want, seen = jax.jit(jax.grad(plain_loss, has_aux=True))(trained, FROZEN, BATCH)
    return got, metrics, want, seen


def test_gradients_of_each_layer_by_itself_are_those_of_the_whole_loss(compared):
    got, _, want, _ = compared
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=2e-4, atol=1e-6), got, want)  # sums of f32, another attention


def test_the_loss_of_a_batch_is_the_mean_of_the_oracles(compared):
    _, metrics, _, seen = compared
    said, labels = (np.asarray([layer[i] for layer in seen], np.float64) for i in range(2))  # [L, B, H, T]
    losses = [oracle.loss(said[:, b, :, :prompt], labels[:, b, :, :prompt]) for b, prompt, _ in spans()]
    assert_allclose(metrics["loss"], sum(losses) / len(BATCH["lengths"]), rtol=1e-4)  # a row without an answer is 0
    assert_allclose(metrics["loss"], metrics["regression"] + 0.0025 * CONFIG.layers * metrics["roughness"], rtol=1e-5)
    assert metrics["recall_by_layer"].shape == (CONFIG.layers,)


# ---- the run ----


def settings(**some):
    """Those of a run, whose files nobody reads."""
    needed = dict(model="", files=(), folder="", output="", sequence=16, steps=3000)
    return locret.Settings(**(needed | some))


def test_the_rate_goes_up_to_the_warm_up_and_down_to_nothing():
    rate = locret.schedule(settings())
    for step in (0, 1, 1000, 1999, 2000, 2001, 2500, 2999, 3000):
        assert_allclose(rate(step), oracle.learning_rate(step), rtol=1e-5, atol=1e-10)
    assert_allclose([rate(1000), rate(2000), rate(2500), rate(2999)], [2.5e-4, 5e-4, 2.5e-4, 5e-7], rtol=1e-4)


def test_each_number_of_a_gradient_is_clipped():
    optimizer = locret.task(CONFIG, settings(clip=0.5)).optimizer
    weights = jnp.ones(2)
    state = optimizer.init(weights)
    (_, one), (_, other) = (optimizer.update(f32(g), state, weights) for g in ([90.0, -0.25], [0.5, -0.25]))
    jax.tree.map(assert_array_equal, one, other)


def test_training_leaves_the_model_bit_for_bit_as_it_was(tmp_path):
    task, frozen, batches = cases.locret_case()
    mesh = meshes.make_mesh()
    before = jax.tree.map(np.array, frozen)
    params = meshes.place(frozen, meshes.replicated(mesh))
    first = jax.device_get(task.init(jax.random.key(0)))
    trained = loop.train(task, params, batches, steps=3, folder=tmp_path, mesh=mesh, seed=0, save_every=3)
    jax.tree.map(assert_array_equal, params, before)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), trained, first)
    assert all(jax.tree.leaves(changed))


def test_one_example_is_learnt_by_heart():
    tokens = jax.random.permutation(jax.random.key(1), CONFIG.vocab)[
        None, :48
    ]  # a first layer cannot tell equals apart
    batch = {"tokens": tokens, "prompt_lengths": jnp.array([40]), "lengths": jnp.array([48])}
    task = locret.task(CONFIG, settings(width=128, answer=8, steps=300, warm_up=20, learning_rate=1e-2))

    @jax.jit
    def run(trained):
        def step(state, _):
            trained, optimizer = state
            gradient, metrics = task.gradients(trained, FROZEN, batch, None)
            updates, optimizer = task.optimizer.update(gradient, optimizer, trained)
            return (optax.apply_updates(trained, updates), optimizer), metrics

        (trained, _), metrics = jax.lax.scan(step, (trained, task.optimizer.init(trained)), length=300)
        return metrics, task.evaluate(trained, FROZEN, batch)

    metrics, last = run(task.init(jax.random.key(0)))
    assert metrics["recall"][0] < 0.5  # a tenth, by chance
    assert last["recall"] > 0.99 and last["regression"] < metrics["regression"][0] / 20


# ---- the stacked model ----


def test_unstack_undoes_stack():
    again = backbone.unstack(backbone.stack(HEADS), CONFIG.layers)
    jax.tree.map(assert_array_equal, again, HEADS)
    assert jax.tree.structure(again) == jax.tree.structure(HEADS)
    assert FROZEN.heads == {} and FROZEN.blocks.wq.shape == (CONFIG.layers, 32, CONFIG.width)


def test_a_stacked_model_lies_as_its_layers_do_and_layers_are_not_split():
    mesh = AbstractMesh((2, 2, 2), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    got, one = backbone.shardings(FROZEN, mesh), meshes.shardings(random_params(), mesh)
    for field in dataclasses.fields(one.blocks[0]):
        whole, each = getattr(got.blocks, field.name), getattr(one.blocks[0], field.name)
        assert each is None and whole is None or tuple(whole.spec) == (None, *each.spec)
    assert got.embed == one.embed and got.norm == one.norm

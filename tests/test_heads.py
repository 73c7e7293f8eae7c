"""Trained heads: what they compute, the files they come in, and the models that take them along."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal
from safetensors import safe_open
from safetensors.numpy import save as to_bytes

import kvjax
from kvjax import heads, policies
from kvjax.heads import AttentionGate, LinearGate, RetainingHead, files
from kvjax.heads import attention_gate as gates
from kvjax.models.llama import Projected
from tests.methods import kept_positions
from tests.oracles import attention_gate, locret
from tests.tiny import CONFIG, random_params, random_tokens

ONE_LAYER = dataclasses.replace(CONFIG, layers=1)
PARAMS = random_params()
TOKENS, LENGTHS = random_tokens(3, 24), (24, 13, 3)
KINDS = {
    "retaining": (RetainingHead, {"width": 5}),
    "gate": (AttentionGate, {"heads": 2, "head_dim": 4}),
    "causal gate, not rotated": (AttentionGate, {"heads": 1, "head_dim": 6, "reach": "causal", "rotated": False}),
    "linear gate": (LinearGate, {}),
}
every_kind = pytest.mark.parametrize("kind, settings", KINDS.values(), ids=KINDS)


def random_heads(kind, settings, config=CONFIG, seed=0, size=0.5):
    """Heads of one kind, with weights far from their first ones."""
    rng = np.random.default_rng(seed)
    made = heads.make(kind, config, rngs=nnx.Rngs(seed), **settings)
    return jax.tree.map(lambda leaf: jnp.asarray(size * rng.standard_normal(leaf.shape), jnp.float32), made)


# ---- what they compute, against the oracles ----

COUNTS = (13, 7, 1)  # tokens of the rows; the rest is padding


def random_projected():
    rng = np.random.default_rng(1)
    x, q, k, v = (
        rng.standard_normal((3, 13, *shape))
        for shape in ((CONFIG.width,), *((each, CONFIG.head_dim) for each in (CONFIG.q_heads, 2, 2)))
    )
    positions = np.where(np.arange(13) < np.array(COUNTS)[:, None], np.arange(13), -1)
    return Projected(*(jnp.asarray(part, jnp.float32) for part in (x, q, k, v)), jnp.asarray(positions))


def wide(weights):
    return np.asarray(weights[...], np.float64)


def test_a_retaining_head_reads_q_k_and_v_of_all_heads_in_this_order():
    made, (head, *_) = random_projected(), random_heads(RetainingHead, {"width": 5})
    said = head(made)
    for b, t in ((0, 0), (0, 12), (2, 0)):
        q, k, v = (np.asarray(part[b, t], np.float64) for part in (made.q, made.k, made.v))
        assert_allclose(said[b, :, t], locret.head(q, k, v, wide(head.w1), wide(head.w2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [gates.BLOCK_LOGITS, 40], ids=["all queries at once", "three at a time"])
@pytest.mark.parametrize("kind, mask", [("gate", "prefix_bidirectional"), ("causal gate, not rotated", "causal")])
def test_a_gate_reads_its_reach_and_no_padding(monkeypatch, kind, mask, block):
    monkeypatch.setattr(gates, "BLOCK_LOGITS", block)
    made, (gate, *_) = random_projected(), random_heads(*KINDS[kind])
    said, narrow = gate(made), gate.wq.shape[1] * gate.wq.shape[2]
    weights = attention_gate.Gate(
        *(wide(w).reshape(-1, narrow) for w in (gate.wq, gate.wk, gate.wv)),
        wide(gate.wo).reshape(narrow, -1),
        wide(gate.bias),
    )
    base = None if gate.rope is None else gate.rope.base
    for b, count in enumerate(COUNTS):
        x = np.asarray(made.x[b, :count], np.float64)
        want = attention_gate.keep_probability(x, weights, heads=gate.wq.shape[1], mask=mask, base=base)
        assert_allclose(said[b, :, :count], want.T, atol=2e-5)


def test_a_linear_gate_reads_each_token_by_itself():
    made, (gate, *_) = random_projected(), random_heads(LinearGate, {})
    want = attention_gate.linear_keep_probability(np.asarray(made.x[0], np.float64), wide(gate.w), wide(gate.bias))
    assert_allclose(gate(made)[0].T, want, atol=2e-6)


@pytest.mark.parametrize("kind", [AttentionGate, LinearGate])
def test_new_gates_keep_every_token_and_change_no_logit(kind):
    first = heads.make(kind, ONE_LAYER, rngs=nnx.Rngs(0))
    params = dataclasses.replace(random_params(ONE_LAYER), heads={"attention_gate": first})
    want, _ = kvjax.prefill(params, policies.full(), TOKENS, lengths=LENGTHS)
    got, cache = kvjax.prefill(params, policies.attention_gate(), TOKENS, lengths=LENGTHS)
    assert_array_equal(got, want)
    for b, count in enumerate(LENGTHS):
        assert kept_positions(cache.layers[0], b) == [[*range(count)]] * CONFIG.kv_heads
    assert_allclose(cache.layers[0].stats["attention_gate"][0], 0.88079708, rtol=1e-6)


def test_a_linear_gate_reads_a_prompt_in_chunks_as_it_reads_it_whole():
    params = kvjax.with_heads(PARAMS, {"attention_gate": random_heads(LinearGate, {}, size=1.0)})
    policy = policies.attention_gate(threshold=0.6, sinks=1)
    want, whole = kvjax.prefill(params, policy, TOKENS, lengths=LENGTHS)
    got, chunked = kvjax.prefill(params, policy, TOKENS, lengths=LENGTHS, chunk=7)
    assert_allclose(got, want, atol=1e-5)
    for layer, other in zip(chunked.layers, whole.layers, strict=True):
        assert [kept_positions(layer, b) for b in range(3)] == [kept_positions(other, b) for b in range(3)]
        assert (layer.pos[0] >= 0).sum() < CONFIG.kv_heads * LENGTHS[0]  # so that some are dropped


@pytest.mark.parametrize("kind", ["gate", "causal gate, not rotated"])
def test_gates_that_attend_refuse_a_prompt_in_chunks(kind):
    params = kvjax.with_heads(PARAMS, {"attention_gate": random_heads(*KINDS[kind])})
    with pytest.raises(ValueError, match=r"heads 'attention_gate' .* must see a prompt whole; leave out chunk=7"):
        kvjax.prefill(params, policies.attention_gate(), TOKENS, chunk=7)


def test_a_reach_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"reach='all' must be one of \('prompt', 'causal'\)"):
        AttentionGate(CONFIG, reach="all", rngs=nnx.Rngs(0))


# ---- as a part of the model ----


def test_heads_are_arguments_of_a_program_and_not_baked_into_it():
    params = random_params(ONE_LAYER)
    decode = jax.jit(lambda params: kvjax.decode(params, policies.locret(5, tail=1), TOKENS, max_new_tokens=3).cache)
    turned = jax.tree.map(jnp.negative, params.heads["locret"][0].w2)
    other = jax.tree.map(lambda leaf: leaf, params)  # a copy, whose heads can be changed
    other.heads["locret"][0].w2 = turned
    one, two = decode(params), decode(other)
    assert decode._cache_size() == 1
    assert kept_positions(one.layers[0], 0) != kept_positions(two.layers[0], 0)
    want = kvjax.decode(other, policies.locret(5, tail=1), TOKENS, max_new_tokens=3).cache
    assert kept_positions(two.layers[0], 0) == kept_positions(want.layers[0], 0)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (PARAMS.heads["locret"][:1], r"heads\['locret'\] has 1, and must be a sequence of one head for each of .* 2"),
        (PARAMS.heads["locret"] * 2, r"heads\['locret'\] has 4"),
        (PARAMS.heads["locret"][0], r"heads\['locret'\] has a RetainingHead"),
        (None, r"heads\['locret'\] has a NoneType"),
    ],
    ids=["too few", "too many", "one, not in a sequence", "nothing"],
)
def test_a_model_takes_one_head_for_each_layer(wrong, said):
    with pytest.raises(ValueError, match=f"with_heads: {said}"):
        kvjax.with_heads(PARAMS, {"locret": wrong})


def test_heads_are_not_looked_for_where_no_policy_wants_them():
    bare = kvjax.with_heads(PARAMS, {})
    assert heads.with_heads_for(bare, [policies.full(), policies.tova(4)]).heads == {}
    assert heads.with_heads_for(PARAMS, [policies.locret(5)]).heads == PARAMS.heads


def test_a_policy_that_wants_heads_of_which_none_come_for_this_model_is_refused():
    with pytest.raises(ValueError, match="locret needs heads trained for this model, and none come with kvjax"):
        heads.with_heads_for(kvjax.with_heads(PARAMS, {}), [policies.locret(5)])


# ---- files ----


@every_kind
def test_a_file_holds_heads_in_f16(kind, settings, tmp_path):
    wanted = random_heads(kind, settings)
    heads.save(tmp_path / "a.safetensors", wanted, PARAMS)
    ((method, got),) = heads.load(tmp_path / "a.safetensors", PARAMS).items()
    assert method == kind.method and [type(head) for head in got] == [kind] * CONFIG.layers
    assert jax.tree.structure(got) == jax.tree.structure(wanted)  # settings included
    jax.tree.map(lambda a, b: assert_array_equal(a, np.asarray(b, np.float16)), got, wanted)
    assert kvjax.with_heads(PARAMS, {method: got}).heads[method] == got


def test_heads_take_the_dtype_of_the_model(tmp_path):
    heads.save(tmp_path / "a", random_heads(*KINDS["retaining"]), PARAMS)
    got = heads.load(tmp_path / "a", random_params(dtype=jnp.bfloat16))  # the same model, rounded
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("heads") / "a.safetensors"
    heads.save(path, random_heads(*KINDS["retaining"]), PARAMS, data="some text")
    return path


def rewritten(saved, path, change=lambda header, tensors: None):
    """The saved file again, its header and tensors changed in place."""
    with safe_open(saved, "numpy") as file:
        header, tensors = json.loads(file.metadata()["kvjax"]), {name: file.get_tensor(name) for name in file.keys()}
    change(header, tensors)
    path.write_bytes(to_bytes(tensors, metadata={"kvjax": json.dumps(header)}))
    return path


def test_the_note_is_kept(saved):
    with safe_open(saved, "numpy") as file:
        assert json.loads(file.metadata()["kvjax"])["note"] == {"data": "some text"}


@pytest.mark.parametrize(
    "other, said",
    [
        (random_params(dataclasses.replace(CONFIG, kv_heads=4)), "is for a model with kv_heads=2, and this one has 4"),
        (random_params(dataclasses.replace(CONFIG, layers=1)), "is for a model with layers=2, and this one has 1"),
        (random_params(seed=1), "is for a model of the same shape with other weights"),
    ],
    ids=["kv_heads", "layers", "weights"],
)
def test_heads_of_another_model_are_refused(saved, other, said):
    with pytest.raises(ValueError, match=f"{said}.* train some for this one"):
        heads.load(saved, other)


class Unread:
    """A file whose tensors have shapes that can be asked for, and nothing else."""

    def __init__(self, path, framework):
        self.opened = safe_open(path, framework)

    def __enter__(self):
        self.file = self.opened.__enter__()
        return SimpleNamespace(metadata=self.file.metadata, keys=self.file.keys, get_slice=self.file.get_slice)

    def __exit__(self, *error):
        return self.opened.__exit__(*error)


DAMAGE = {
    "another version": (lambda header, _: header.update(version=2), "has version 2, and this kvjax reads 1"),
    "an unknown kind": (lambda header, _: header.update(kind="Other"), r"kind 'Other'; this kvjax knows \['Attention"),
    "a kind that is no name": (lambda header, _: header.update(kind=[1]), r"kind \[1\]"),
    "another kind": (lambda header, _: header.update(kind="LinearGate", settings={}), r"lacks \['0.bias', '0.w'"),
    "a missing tensor": (lambda _, tensors: tensors.pop("1.w2"), r"lacks \['1.w2'\]"),
    "a tensor too many": (lambda _, tensors: tensors.update({"2.w2": tensors["1.w2"]}), r"not belong, \['2.w2'\]"),
    "a tensor of another shape": (
        lambda _, tensors: tensors.update({"1.w2": tensors["1.w2"][:2]}),
        r"w2 has shapes \[\(2, 2\), \(5, 2\)\], not \(5, 2\)",
    ),
    "a head of terabytes": (lambda header, _: header.update(settings={"width": 10**12}), "w1 has shapes"),
    "unknown settings": (lambda header, _: header.update(settings={"wdth": 5}), "no RetainingHead has its settings"),
    "settings of another type": (lambda header, _: header.update(settings={"width": "x"}), "has its settings"),
    "no settings": (lambda header, _: header.pop("settings"), "does not say that it holds heads of kvjax"),
    "a backbone that is none": (lambda header, _: header.update(backbone=[1]), "does not say that it holds heads"),
    "norms that are none": (lambda header, _: header["backbone"].update(norms="x"), "does not say that it holds"),
    "norms of more layers": (lambda header, _: header["backbone"]["norms"].append(1.0), "with other weights"),
}


@pytest.mark.parametrize("change, said", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_says_something_else_is_refused_before_a_tensor_is_read(saved, tmp_path, monkeypatch, change, said):
    path = rewritten(saved, tmp_path / "b", change)
    monkeypatch.setattr(files, "safe_open", Unread)
    with pytest.raises(ValueError, match=rf"heads\.load: .*/b\b.*{said}"):
        heads.load(path, PARAMS)


@pytest.mark.parametrize("cut", [0, 4, 300, -10])
def test_a_truncated_file_is_refused(saved, tmp_path, cut):
    (tmp_path / "b").write_bytes(saved.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"/b is damaged, or no safetensors file \(.*\)\. Get it anew"):
        heads.load(tmp_path / "b", PARAMS)


def test_what_is_no_file_of_heads_is_refused(saved, tmp_path):
    (tmp_path / "text").write_text("no heads are in here, and this is longer than eight bytes")
    with pytest.raises(ValueError, match="is damaged, or no safetensors file"):
        heads.load(tmp_path / "text", PARAMS)
    (tmp_path / "other").write_bytes(to_bytes({"x": np.zeros(3)}))
    with pytest.raises(ValueError, match=r"does not say that it holds heads of kvjax\. Was it saved by heads\.save"):
        heads.load(tmp_path / "other", PARAMS)
    for absent in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"there is no file .*With the package come smollm2-locret"):
            heads.load(absent, PARAMS)


RETAINING = random_heads(*KINDS["retaining"])


@pytest.mark.parametrize(
    "wrong, said",
    [
        ((), r"heads is a tuple, and must be a sequence of one for each layer"),
        ({"locret": RETAINING}, r"heads is a dict, and must be a sequence"),
        (RETAINING[:1], r"1 heads RetainingHead\({'width': 5}\) do not fit a model of 2 layers"),
        ((RETAINING[0], *random_heads(LinearGate, {}, ONE_LAYER)), "do not fit"),
        ((RETAINING[0], *random_heads(RetainingHead, {"width": 4}, ONE_LAYER)), "do not fit"),
        (random_heads(RetainingHead, {"width": 5}, dataclasses.replace(CONFIG, kv_heads=1)), "do not fit"),
        (random_heads(RetainingHead, {"width": 5}, size=1e5), r"\['0.w1', .* beyond 65504, the largest of f16"),
        (random_heads(RetainingHead, {"width": 5}, size=np.nan), "not finite"),
    ],
    ids=["none", "a dictionary", "too few", "kinds", "widths", "another model", "too large", "not finite"],
)
def test_heads_that_could_not_be_loaded_are_not_saved(tmp_path, wrong, said):
    (tmp_path / "a").write_bytes(b"what was there")
    with pytest.raises(ValueError, match=f"heads.save: .*{said}"):
        heads.save(tmp_path / "a", wrong, PARAMS)
    assert (tmp_path / "a").read_bytes() == b"what was there"

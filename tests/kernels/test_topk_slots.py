import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.selects import top_k
from pallas_kernels.topk_slots import gpu, reference, topk_slots, tpu

LOWEST = np.finfo(np.float32).min


def loop(score, pos, k, protected=None):
    """The k best of each row and head by a sort of (worth, position), one slot at a time."""
    kept, index = np.zeros(score.shape, bool), np.full((*score.shape[:2], k), score.shape[2], np.int32)
    for b, h in np.ndindex(score.shape[:2]):
        order = []
        for n in range(score.shape[2]):
            if pos[b, h, n] == -1:
                continue
            worth = float(score[b, h, n])
            if not worth > LOWEST:
                worth = float(LOWEST)
            if abs(worth) < np.finfo(np.float32).tiny:
                worth = 0.0
            if protected is not None and protected[b, h, n]:
                worth = np.inf
            order.append((-worth, int(pos[b, h, n]), n))
        chosen = sorted(n for _, _, n in sorted(order)[:k])
        kept[b, h, chosen] = True
        index[b, h, : len(chosen)] = chosen
    return kept, index


def make(fill, slots, seed=0, lead=(2, 1)):
    """Scores and shuffled positions with free slots; "some" of all that is peculiar in one row."""
    rng = np.random.default_rng(seed)
    score = rng.normal(size=(*lead, slots)).astype(np.float32)
    pos = np.stack([rng.permutation(3 * slots)[:slots] for _ in range(np.prod(lead))]).reshape(score.shape)
    pos = np.where(rng.random(score.shape) < 0.2, -1, pos).astype(np.int32)
    if fill == "ties":
        score = rng.integers(-1, 2, score.shape).astype(np.float32) * rng.choice([1.0, -1.0], score.shape)
        score = score.astype(np.float32)  # with -0
    elif fill == "odd":
        odd = np.array([np.nan, -np.inf, np.inf, LOWEST, -0.0, 0.0, 1e-40, -1e-40, 1.0], np.float32)
        score = rng.choice(odd, score.shape).astype(np.float32)
    elif fill == "all_free":
        pos = np.full_like(pos, -1)
        pos[0, 0, 0] = 3  # and one that is not
    elif fill == "full":
        pos = np.where(pos < 0, 3 * slots + np.arange(slots), pos).astype(np.int32)
    elif fill in ("minus_inf", "nan", "plus_inf"):
        score[0] = {"minus_inf": -np.inf, "nan": np.nan, "plus_inf": np.inf}[fill]
    return score, pos


def check(run, score, pos, k, protected=None):
    kept, index = run(jnp.asarray(score), jnp.asarray(pos), k, protected=protected)
    assert (kept.dtype, index.dtype) == (jnp.bool_, jnp.int32)
    want_kept, want_index = loop(score, pos, k, protected)
    np.testing.assert_array_equal(kept, want_kept)
    np.testing.assert_array_equal(index, want_index)


def run_tpu(*args, **settings):
    return tpu.topk_slots(*args, **settings, interpret=True)


RUNS = {"reference": reference.topk_slots, "tpu": run_tpu, "gpu": gpu.topk_slots}
every_implementation = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


@every_implementation
def test_a_small_case_by_hand(run):
    # Slots 0 and 4 tie at 2 and 4 has the lower position; slot 2 is free, whatever its score; slot 5 is a nan.
    score = jnp.array([[[2.0, 3.0, 9.0, -1.0, 2.0, jnp.nan]]])
    pos = jnp.array([[[7, 6, -1, 5, 4, 3]]], jnp.int32)
    assert run(score, pos, 2).index.tolist() == [[[1, 4]]]
    assert run(score, pos, 4).index.tolist() == [[[0, 1, 3, 4]]]
    assert run(score, pos, 6).index.tolist() == [[[0, 1, 3, 4, 5, 6]]]  # five there, then N
    assert run(score, pos, 2).kept.tolist() == [[[False, True, False, False, True, False]]]


@every_implementation
@pytest.mark.parametrize(
    ("fill", "slots", "k"),
    [
        ("normal", 1, 1),
        ("normal", 130, 1),
        ("normal", 300, 300),
        ("normal", 1030, 129),
        ("ties", 300, 77),
        ("ties", 257, 256),
        ("odd", 130, 40),
        ("odd", 200, 110),
        ("odd", 64, 64),
        ("all_free", 140, 9),
        ("full", 128, 127),
        ("full", 129, 129),
        ("minus_inf", 129, 40),
        ("nan", 100, 30),
        ("plus_inf", 129, 40),
    ],
)
def test_it_keeps_what_a_loop_keeps(run, fill, slots, k):
    check(run, *make(fill, slots), k)


@every_implementation
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_protected_slots_rank_first_and_by_position_where_they_are_too_many(run, share):
    score, pos = make("odd", 150)
    protected = np.random.default_rng(1).random(score.shape) < share
    check(run, score, pos, 40, protected)


@every_implementation
@pytest.mark.parametrize("fill", ["odd", "full"])
def test_it_keeps_what_top_k_of_kvjax_keeps(run, fill):
    score, pos = map(jnp.asarray, make(fill, 70, seed=2))
    for k in (30, 69):
        np.testing.assert_array_equal(run(score, pos, k).kept, top_k(score, pos, k))


@every_implementation
def test_the_order_of_slots_carries_no_meaning(run):
    score, pos = make("ties", 90, seed=3)
    shuffled = np.random.default_rng(4).permutation(90)
    kept = np.asarray(run(jnp.asarray(score), jnp.asarray(pos), 31).kept)
    again = np.asarray(run(jnp.asarray(score[..., shuffled]), jnp.asarray(pos[..., shuffled]), 31).kept)
    np.testing.assert_array_equal(again, kept[..., shuffled])


@pytest.mark.parametrize("lead", [(1, 3), (4, 2)])
def test_tpu_takes_any_number_of_rows(lead):
    check(run_tpu, *make("ties", 140, lead=lead), 33)


def test_tpu_counts_long_rows_in_several_groups_of_chunks():
    check(run_tpu, *make("ties", 16500, lead=(1, 1)), 700)


@pytest.mark.parametrize("fill", ["normal", "ties", "odd", "all_free"])
def test_gpu_keeps_what_a_loop_keeps_of_rows_in_several_splits(monkeypatch, fill):
    monkeypatch.setattr(gpu, "config", lambda slots: gpu.Config(256, -(-slots // 256), 1))
    score, pos = make(fill, 600)
    check(gpu.topk_slots, score, pos, {"normal": 1, "ties": 200, "odd": 300, "all_free": 600}[fill])


def test_gpu_protects_in_several_splits(monkeypatch):
    monkeypatch.setattr(gpu, "config", lambda slots: gpu.Config(256, -(-slots // 256), 1))
    score, pos = make("normal", 600, lead=(1, 1))
    check(gpu.topk_slots, score, pos, 200, np.random.default_rng(1).random(score.shape) < 0.5)


def test_gpu_splits_rows_that_do_not_fit_into_registers():
    assert gpu.config(16384) == (16384, 1, 16)
    assert gpu.config(16385) == (8192, 3, 8)
    check(gpu.topk_slots, *make("normal", 16385, lead=(1, 1)), 900)


def test_it_runs_under_jit_and_takes_the_reference_here():
    score, pos = map(jnp.asarray, make("ties", 40))
    got = jax.jit(topk_slots, static_argnums=2)(score, pos, 11)
    np.testing.assert_array_equal(got.index, reference.topk_slots(score, pos, 11).index)


def test_wrong_calls_are_told_what_is_wrong():
    score, pos = jnp.zeros((1, 2, 8)), jnp.zeros((1, 2, 8), jnp.int32)
    for args, settings, message in [
        ((score[0], pos[0], 2), {}, r"score \(2, 8\) must be \[B, H, N\]"),
        ((score.astype(jnp.bfloat16), pos, 2), {}, "score is bfloat16, and must be float32; cast it"),
        ((score, pos[..., :7], 2), {}, r"pos \(1, 2, 7\) must be .* \(1, 2, 8\)"),
        ((score, pos.astype(jnp.float32), 2), {}, "pos is float32, and must be int32"),
        ((score, pos, 0), {}, r"k=0 must be an int in 1\.\.8"),
        ((score, pos, 9), {}, r"k=9 must be an int in 1\.\.8"),
        ((score, pos, 2.0), {}, r"k=2\.0 must be an int"),
        ((score, pos, 2), {"protected": pos}, r"protected int32\[1, 2, 8\] must be bool\[1, 2, 8\]"),
        ((score, pos, 2), {"implementation": "cuda"}, "'cuda' must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            topk_slots(*args, **settings)


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_a_kernel_that_cannot_run_here_is_refused(name):
    score, pos = jnp.zeros((1, 2, 8)), jnp.zeros((1, 2, 8), jnp.int32)
    with pytest.raises(ValueError, match="cannot run here"):
        topk_slots(score, pos, 2, implementation=name)


def test_tpu_refuses_rows_beyond_its_memory():
    long = jax.ShapeDtypeStruct((1, 1, 300_000), jnp.float32), jax.ShapeDtypeStruct((1, 1, 300_000), jnp.int32)
    with pytest.raises(ValueError, match="300000 slots, and the kernel takes 262144 at most"):
        jax.eval_shape(lambda s, p: topk_slots(s, p, 5, implementation="tpu"), *long)

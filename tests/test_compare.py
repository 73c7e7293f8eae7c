"""`kvjax compare`: what it measures on a small random model, what it writes, and once on the real one."""

import csv
import dataclasses
import functools
import io
import pathlib
import zlib

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import kvjax
from kvjax import compare, policies, tables, tasks
from kvjax.compare import Row, Size
from tests.methods import POLICIES
from tests.plain import smollm2
from tests.test_cost import documented_bytes
from tests.tiny import CONFIG, random_params, random_tokens

SIZE = Size(tokens=640, fractions=(1 / 2, 1 / 4), contexts=4, per_kind=1, prose=4, forced=6, group=2)
KINDS = [kind.name for kind in tasks.KINDS]


@functools.cache
def tiny_model() -> kvjax.Model:
    """A random model with large weights, and the tokenizer and chat template of a small checkpoint."""
    read = kvjax.load(pathlib.Path(__file__).parent / "references" / "llama3")
    config = dataclasses.replace(CONFIG, vocab=read.config.vocab, context=2048)
    return dataclasses.replace(read, params=random_params(config))


@functools.cache
def measured() -> tuple[list[Row], list[tuple[str, int, int]]]:
    """The rows of three methods, one of which numbers positions anew, and what was said on the way."""
    said = []
    rows = compare.compare(tiny_model(), ["h2o", "full", "streaming_llm"], SIZE, lambda *step: said.append(step))
    return rows, said


# ---- the rows ----


def test_full_comes_first_and_once_then_every_method_at_every_budget():
    rows, _ = measured()
    expected = [("full", 640), ("h2o", 320), ("h2o", 160), ("streaming_llm", 320), ("streaming_llm", 160)]
    assert [(row.method, row.budget) for row in rows] == expected


def test_full_agrees_with_itself():
    full = measured()[0][0]
    assert (full.kl, full.top1) == (0.0, 1.0)


def test_full_takes_what_a_full_cache_takes():
    full = measured()[0][0]
    assert_allclose(full.share, 1.0, atol=0.08)  # rows are padded to the longest context, of this or another group


def test_less_cache_is_less_agreement():
    rows, _ = measured()
    for method in ("h2o", "streaming_llm"):
        half, quarter = (row for row in rows if row.method == method)
        assert 0.001 < half.kl < quarter.kl
        assert quarter.top1 < 1


def test_speeds_and_scores_are_numbers_of_their_kind():
    for row in measured()[0]:
        assert list(row.scores) == KINDS
        assert all(0 <= score <= 1 for score in row.scores.values())
        assert 0 < row.prefill_speed < np.inf
        assert 0 < row.decode_speed < np.inf


@pytest.mark.parametrize("row", range(1, 5))
def test_bytes_are_those_of_the_formula_for_one_context(row):
    row, config = measured()[0][row], tiny_model().config
    group = documented_bytes(row.policy, config=config, batch=SIZE.group, tokens=0, number=4)
    assert row.bytes == group / SIZE.group
    full = measured()[0][0]
    assert_allclose(row.share, row.bytes / full.bytes, rtol=0.08)  # as above


def test_progress_counts_every_step_up_to_the_last():
    _, said = measured()
    steps = said[0][2]
    assert [done for _, done, _ in said] == list(range(1, steps + 1))
    assert {total for *_, total in said} == {steps}
    assert {what for what, *_ in said} >= {"reading", "facts: h2o(budget=160, window=80)", "speed of prefill: full"}


def test_the_same_seed_gives_the_same_figures():
    size = dataclasses.replace(SIZE, fractions=(1 / 4,), contexts=2, prose=2)
    first, again = (compare.compare(tiny_model(), ["h2o"], size)[1] for _ in range(2))
    assert (first.scores, first.kl, first.top1) == (again.scores, again.kl, again.top1)


# ---- one prefill for all ----


@pytest.mark.parametrize("renumbered", [False, True], ids=["true positions", "renumbered"])
def test_each_policy_gets_the_cache_of_its_own_prefill(renumbered):
    """Twice, with different budgets, for every method that caches the same keys; rows are ragged."""
    made = [POLICIES[name].make(budget) for name in POLICIES for budget in (10, 17)]
    rows = [Row("any", 0, policy) for policy in made if (policy.ranks is not None) == renumbered]
    tokens, lengths = random_tokens(3, 30), np.array([30, 19, 4], np.int32)
    caches = compare._compressed(random_params(), rows, tokens, lengths, lambda what: None, room=5)
    seen = 0
    for row, (logits, cache) in caches:
        own_logits, own = kvjax.prefill(random_params(), row.policy, tokens, lengths=lengths, room=5)
        assert_allclose(logits, own_logits, atol=1e-5)
        assert_array_equal(cache.length, own.length)
        assert (cache.policy, cache.config) == (own.policy, own.config)
        for layer, own_layer in zip(cache.layers, own.layers, strict=True):
            assert_array_equal(layer.pos, own_layer.pos)
            assert layer.stats.keys() == own_layer.stats.keys()
            for part in ("k", "v", "stats", "carry"):
                ours, theirs = (np.asarray(leaf) for leaf in _leaves(getattr(layer, part), getattr(own_layer, part)))
                assert_allclose(ours, theirs, atol=1e-5)
        seen += 1
    assert seen == len(rows)


def _leaves(*trees):
    """Each tree as one vector."""
    return [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)] or [np.zeros(0)]) for tree in trees]


# ---- a budget that holds everything ----


@pytest.fixture
def heard(monkeypatch):
    """What was said to each question, in the order asked; a score that depends on every letter of it."""
    said = []

    def score(question, answer):
        said.append(answer)
        return zlib.crc32(answer.encode()) % 1000 / 1000

    monkeypatch.setattr(tasks.Question, "score", score)
    return said


def test_a_budget_that_holds_everything_gives_the_answers_of_full(heard, monkeypatch):
    size = dataclasses.replace(SIZE, fractions=(1.0,), contexts=2, prose=2)
    ample = {name: (lambda to, row=row: row.make(to.budget + 100)) for name, row in POLICIES.items()}
    monkeypatch.setattr(compare, "AT_BUDGET", ample)
    monkeypatch.setattr(compare, "_measure_prefill", lambda *given: None)  # compiles a program for each method
    full, *others = compare.compare(tiny_model(), list(POLICIES), size)
    assert len({*heard}) > 3  # the questions are not answered alike
    assert len(others) == len(POLICIES) - 1
    for row in others:
        assert row.kl < 1e-4, row.method
        assert row.top1 == 1.0, row.method
        assert row.scores == full.scores, row.method


def test_answers_are_those_of_decode(heard):
    """A context read with its group, then each question in a row of its own; against one row by itself."""
    model, size = tiny_model(), dataclasses.replace(SIZE, fractions=(1 / 4,), contexts=2, prose=2)
    compare.compare(model, ["h2o"], size)
    policy = policies.h2o(160, window=80)
    before, after = compare._frame(model)
    left = size.tokens - len(model.tokenizer.encode(before + compare.PROMPT, add_special_tokens=False).ids)
    contexts = tasks.fact_contexts(
        lambda text: len(model.tokenizer.encode(text, add_special_tokens=False).ids),
        contexts=2,
        tokens=left,
        per_kind=1,
        seed=0,
    )
    expected = []
    for context in contexts:
        prompt, _ = model.encode([before + compare.PROMPT.format(context=context.text)], add_special_tokens=False)
        assert prompt.shape[1] <= size.tokens
        _, cache = kvjax.prefill(model.params, policy, prompt)
        for question in context.questions:
            asked, _ = model.encode([question.text + after], add_special_tokens=False)
            out = kvjax.decode(
                model.params,
                policy,
                asked,
                cache=cache,
                max_new_tokens=compare.ANSWER_TOKENS,
                stop=model.stop_tokens,
            )
            expected.append(model.decode(np.asarray(out.tokens)[0, : int(out.lengths[0])]))
    assert heard[6:] == expected  # after those of full


# ---- what cannot be measured ----


@pytest.mark.parametrize("name", ["tokens", "contexts", "per_kind", "prose", "forced", "group"])
def test_nothing_to_measure_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least"):
        Size(**{name: 0})


def test_a_size_that_is_no_whole_number_is_refused():
    with pytest.raises(ValueError, match="tokens=nan must be a whole number"):
        Size(tokens=float("nan"))
    with pytest.raises(ValueError, match="forced=8.0 must be a whole number"):
        Size(forced=8.0)


@pytest.mark.parametrize("given", [{"contexts": 3}, {"prose": 5}, {"group": 3}])
def test_rows_that_do_not_fill_a_group_are_refused(given):
    with pytest.raises(ValueError, match=r"must be multiples of group=\d"):
        Size(**given)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan"), "1/4", None])
def test_a_fraction_outside_the_context_is_refused(fraction):
    with pytest.raises(ValueError, match=f"fractions={fraction!r} must be a finite number above 0 and at most 1"):
        Size(fractions=(0.5, fraction))


def test_an_unknown_method_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="no method 'best'; there are full, "):
        compare.compare(None, ["h2o", "best"], SIZE)


def test_a_budget_too_small_for_a_method_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="streaming_llm: sinks=4 is outside 0..2"):
        compare.compare(None, ["streaming_llm"], dataclasses.replace(SIZE, fractions=(1 / 200,)))


def test_every_method_can_be_compared():
    assert set(compare.AT_BUDGET) == set(policies.__all__)


@pytest.mark.parametrize("fraction", [1 / 2, 1 / 4, 1 / 8])
def test_all_methods_at_one_budget_take_its_bytes_within_three_per_cent(fraction):
    # statistics of a token are 4 or 8 bytes beside the 516 of its key, value and position: up to 1.6 %
    params = random_params(dataclasses.replace(CONFIG, layers=1, head_dim=64, context=1024))
    tokens = jax.ShapeDtypeStruct((1, 1000), np.int32)
    full, *rows = compare.plan(list(compare.AT_BUDGET), dataclasses.replace(SIZE, tokens=1000, fractions=(fraction,)))

    def size(policy):
        return kvjax.nbytes(jax.eval_shape(lambda tokens: kvjax.prefill(params, policy, tokens)[1], tokens))

    shares = {row.method: size(row.policy) / size(full.policy) / fraction for row in rows}
    kivi = shares.pop("kivi", 0.0)  # which has 8, 4, 3 or 2 bits and nothing between; none at all at an eighth
    assert len(shares) == len(compare.AT_BUDGET) - 2
    assert all(0.97 < share < 1.03 for share in shares.values()), shares
    assert kivi < 1.03


# ---- tables ----

FULL = Row("full", 400, policies.full(), dict.fromkeys(KINDS, 1.0), 0.0, 1.0, 2**20, 1.0, 1000.0, 50.0)
H2O = Row(
    "h2o", 100, policies.h2o(100, window=50), {"number": 0.5, "name": 0.25, "words": 0.0}, 0.1, 0.9,
    2**18, 0.25, 900.0, 60.5,
)  # fmt: skip


def test_markdown_is_a_table():
    assert tables.markdown([FULL, H2O]).splitlines() == [
        "| method | budget | MiB/context | of full | number | name | words | KL [nats] | top-1 | prefill [tok/s] "
        "| decode [tok/s] |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| full | 400 | 1.00 | 100.0% | 100% | 100% | 100% | 0.000 | 100.0% | 1000 | 50 |",
        "| h2o | 100 | 0.25 | 25.0% | 50% | 25% | 0% | 0.100 | 90.0% | 900 | 60 |",
    ]


def test_csv_has_a_row_for_each_method_and_budget_with_every_digit():
    rows, _ = measured()
    read = list(csv.DictReader(io.StringIO(tables.comma_separated(rows))))
    assert len(read) == len(rows)
    for line, row in zip(read, rows, strict=True):
        assert (line["method"], line["policy"], int(line["budget"])) == (row.method, str(row.policy), row.budget)
        assert (float(line["bytes_per_context"]), float(line["share_of_full"])) == (row.bytes, row.share)
        assert [float(line[f"score_{kind}"]) for kind in KINDS] == list(row.scores.values())
        assert float(line["score_mean"]) == row.score
        assert (float(line["kl_nats"]), float(line["top1_agreement"])) == (row.kl, row.top1)
        assert float(line["prefill_tokens_per_second"]) == row.prefill_speed
        assert float(line["decode_tokens_per_second"]) == row.decode_speed


def test_mean_score_is_over_kinds():
    assert H2O.score == 0.25


@pytest.mark.parametrize(
    "rows", [[FULL], [FULL, H2O], [FULL, *(dataclasses.replace(H2O, method=f"m{i}") for i in range(12))]],
    ids=["full alone", "one method", "twelve methods"],
)  # fmt: skip
def test_picture_is_a_png_of_a_sensible_size(rows):
    image = pytest.importorskip("PIL.Image")
    png = tables.picture(rows, "title")
    with image.open(io.BytesIO(png)) as read:
        read.load()
        assert read.format == "PNG"
        assert 1000 <= read.width <= 3000
        assert 400 <= read.height <= 1500
    assert 10_000 < len(png) < 500_000


def test_picture_is_not_blank():
    image = pytest.importorskip("PIL.Image")
    pixels = np.asarray(image.open(io.BytesIO(tables.picture([FULL, H2O], "title"))).convert("RGB"))
    first_colour = tuple(int(tables.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5))
    assert (pixels == first_colour).all(axis=-1).sum() > 100  # the line of h2o, and its marks


# ---- the real model ----


@pytest.mark.real_model
def test_smollm2_finds_facts_with_a_full_cache_and_loses_by_method():
    size = Size(tokens=400, fractions=(1 / 4,), contexts=2, per_kind=1, prose=2, forced=16, group=2)
    full, h2o, random = compare.compare(smollm2(), ["h2o", "random"], size)
    assert full.score > 0.8
    assert 0.2 < h2o.share < 0.3
    assert 0.2 < random.share < 0.3
    assert 0.001 < h2o.kl < random.kl
    assert random.score < full.score
    assert full.decode_speed < 2000  # tokens/s: a unit gone wrong

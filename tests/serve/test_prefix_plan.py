"""Plans save what worked examples and an enumeration of all partitions say; generators save what the paper reports."""

import subprocess
import sys

import numpy as np
import pytest

from kvjax.serve.prefix_plan import Group, bound, ordered, partition, plan
from kvjax.serve.workloads import industry, lru_saving, micro
from tests.oracles import prefix_plan as oracle

METHODS = ("naive", "paper", "exact")
A = [*range(1, 10)]  # nine common tokens, of which others share four
V1 = [[*A, 20, 21], [30, 31, 40, 41, 42], [*A, 22], [*A[:4], 50, 51, 52], [30, 31, 43], [*A[:4], 53]]
V2 = [[*[1] * 10, *[branch] * 8, end] for branch, end in ((2, 10), (3, 11), (2, 12), (3, 13))]
V3 = [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2], [1, 2, 3, 4, 5]]
V4 = [
    *[[1, 2, *[3] * 6, *[5] * 9, end] for end in (10, 11, 12)],
    *[[1, 2, *[3] * 6, end] for end in (13, 14)],
    *[[1, 2, end] for end in (15, 16)],
]


def saved(prompts, method, page=1):
    made = plan(prompts, method=method, page=page)
    return made.logical_tokens - made.physical_tokens


def draw(rng, most):
    """Prompts that often begin as an earlier one does: duplicates and beginnings of others among them."""
    prompts = []
    for _ in range(rng.integers(2, most + 1)):
        known = prompts[rng.integers(len(prompts))] if prompts and rng.random() < 0.8 else []
        known = known[: rng.integers(len(known) + 1)]
        prompts.append([*known, *rng.integers(1, 4, size=rng.integers(0 if known else 1, 7)).tolist()])
    return prompts


@pytest.mark.parametrize(
    "prompts, naive, paper, exact, multi",
    [(V1, 14, 15, 15, 19), (V2, 30, 30, 36, 46), (V3, 3, 6, 6, 7), (V4, 12, 44, 44, 54)],
    ids=["V1", "V2", "V3", "V4"],
)
def test_worked_examples_save(prompts, naive, paper, exact, multi):
    assert [saved(prompts, method) for method in METHODS] == [naive, paper, exact]
    assert bound(prompts) == multi


def test_groups_of_worked_examples():
    assert plan(V1, method="naive").groups == (Group(4, (0, 2, 3, 5)), Group(2, (1, 4)))
    assert plan(V1, method="paper").groups == (Group(4, (3, 5)), Group(2, (1, 4)), Group(9, (0, 2)))
    assert set(plan(V1).groups) == set(plan(V1, method="paper").groups)
    assert set(plan(V4).groups) == {Group(17, (0, 1, 2)), Group(8, (3, 4)), Group(2, (5, 6))}
    assert plan(V1).saving == pytest.approx(36.5854, abs=1e-4)


def test_the_paper_lifts_only_what_gains():
    shorter = [[t for t in prompt if t != 9] for prompt in V1]  # the branch of two prompts has 4 tokens, as its parent
    assert Group(4, (0, 2, 3, 5)) in plan(shorter, method="paper").groups


@pytest.mark.parametrize("method, wanted", [("paper", [15, 14, 12, 8]), ("naive", [14, 14, 12, 0])])
def test_prefixes_are_cut_to_pages(method, wanted):
    assert [saved(V1, method, page) for page in (1, 2, 4, 8)] == wanted


def test_exact_is_the_best_of_all_partitions():
    rng = np.random.default_rng(0)
    for _ in range(250):
        prompts = draw(rng, most=6)
        for page in (1, 2, 3):
            assert saved(prompts, "exact", page) == oracle.best(prompts, page), (prompts, page)


def test_naive_and_paper_group_as_the_recursion_on_token_lists_does():
    rng = np.random.default_rng(1)
    for _ in range(600):
        prompts, page = draw(rng, most=16), int(rng.integers(1, 4))
        for method in ("naive", "paper"):
            wanted = oracle.first_branches(prompts, lift=method == "paper", page=page)
            assert list(plan(prompts, method=method, page=page).groups) == wanted, (prompts, page)


def test_methods_are_in_order_below_the_bound():
    rng = np.random.default_rng(2)
    for _ in range(600):
        prompts = draw(rng, most=16)
        naive, paper, exact = (saved(prompts, method) for method in METHODS)
        assert 0 <= naive <= paper <= exact <= bound(prompts) == oracle.on_all_levels(prompts), prompts


def test_dynamic_programming_on_pages_is_never_below_cutting_the_exact_plan():
    rng = np.random.default_rng(3)
    better = 0
    for _ in range(300):
        prompts = draw(rng, most=16)
        cut = sum(group.prefix_length // 2 * 2 * (len(group.members) - 1) for group in plan(prompts).groups)
        assert saved(prompts, "exact", page=2) >= cut
        better += saved(prompts, "exact", page=2) > cut
    assert better


@pytest.mark.parametrize("method", METHODS)
def test_every_prompt_is_in_one_group_and_begins_with_its_prefix_and_has_a_token_of_its_own(method):
    rng = np.random.default_rng(4)
    for _ in range(200):
        prompts = draw(rng, most=16)
        made = plan(prompts, method=method, page=2)
        assert sorted(i for group in made.groups for i in group.members) == [*range(len(prompts))]
        for length, members in made.groups:
            assert length % 2 == 0 and (length > 0) == (len(members) > 1) and list(members) == sorted(members)
            assert len({tuple(prompts[i][:length]) for i in members}) == 1
            assert all(len(prompts[i]) > length for i in members)
        read = sum(length for length, _ in made.groups)
        read += sum(len(prompts[i]) - length for length, members in made.groups for i in members)
        assert read == made.physical_tokens


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_does_not_depend_on_the_names_of_tokens(method):
    rng = np.random.default_rng(5)
    for _ in range(100):
        prompts = draw(rng, most=16)
        names = rng.choice(2**31 - 1, size=4, replace=False)
        assert plan([names[prompt] for prompt in prompts], method=method) == plan(prompts, method=method)


def test_what_exact_saves_does_not_depend_on_the_order_of_prompts():
    rng = np.random.default_rng(6)
    for _ in range(100):
        prompts = draw(rng, most=16)
        assert saved([prompts[i] for i in rng.permutation(len(prompts))], "exact") == saved(prompts, "exact")


@pytest.mark.parametrize("method", METHODS)
def test_a_deep_tree_needs_no_recursion(method):
    prompts = [[7] * (count + 2) for count in range(3000)]  # a chain of 3000 nodes
    assert saved(prompts, method) >= 2999  # the one token that all share


def test_lists_and_arrays_give_the_same_digest_in_another_process():
    program = (
        "import numpy as np; from kvjax.serve.prefix_plan import plan; "
        f"print(plan([np.array(p, np.int64) for p in {V1}]).digest)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == plan(V1).digest
    assert len({plan(V1, method=method).digest for method in METHODS}) == 3


def test_groups_that_decode_much_for_what_they_read_go_first():
    lengths = [len(prompt) for prompt in V1]
    groups = ordered(plan(V1, method="paper"), lengths, [3] * 6).groups
    assert groups == (Group(2, (1, 4)), Group(4, (3, 5)), Group(9, (0, 2)))
    # 12 tokens are read for 9 + 40 outputs, 6 for 6, 8 for 6
    assert ordered(plan(V1), lengths, [9, 3, 40, 3, 3, 3]).groups == (groups[2], groups[0], groups[1])


def test_ties_of_the_order_go_to_the_smallest_prompt():
    made = plan([[5, 6, 1], [7, 8, 1], [7, 8, 2], [5, 6, 2]])
    assert [group.members for group in ordered(made, [3] * 4, [1] * 4).groups] == [(0, 3), (1, 2)]


def test_parts_take_the_largest_group_first():
    made = plan(V1)  # groups of 8, 12 and 6 tokens
    largest, others = Group(9, (0, 2)), (Group(4, (3, 5)), Group(2, (1, 4)))
    assert partition(made, [len(prompt) for prompt in V1], 2) == ((largest,), others)
    assert partition(made, [len(prompt) for prompt in V1], 1) == (made.groups,)


def test_a_group_is_split_only_beyond_a_quarter_above_the_mean():
    lengths = [20] * 8  # a prefix of 12, and 8 tokens of each
    made = plan([[*[1] * 12, i, *[2] * 7] for i in range(8)])
    assert made.groups == (Group(12, tuple(range(8))),)
    assert partition(made, lengths, 2) == ((Group(12, (0, 1, 2, 3)),), (Group(12, (4, 5, 6, 7)),))  # 44 > 1.25 * 38
    two = plan([[*[1] * 12, i, *[2] * 7] for i in range(8)] + [[3] * 62])  # 76 and 62: mean 69
    assert [len(part) for part in partition(two, [*lengths, 62], 2)] == [1, 1]
    assert partition(two, [*lengths, 62], 3)[0] == (Group(0, (8,)),)  # mean 46: 76 is split in two pieces of 44


@pytest.mark.parametrize("prefix, suffix, degree", [(200, 20, 16), (200, 100, 16), (100, 100, 16), (200, 20, 4)])
def test_the_microbenchmark_saves_what_its_sizes_say(prefix, suffix, degree):
    work = micro(prefix, suffix, degree, 12 * degree, out=10, seed=3)
    made = plan(work.prompts)
    assert made.physical_tokens == 12 * (prefix + degree * suffix)
    assert plan(work.prompts, method="naive").physical_tokens == made.physical_tokens
    assert {len(group.members) for group in made.groups} == {degree}
    assert not all(np.diff(group.members).max() == 1 for group in made.groups)  # shuffled


def test_an_lru_cache_saves_what_the_paper_measured_for_vllm():
    work = micro(2000, 200, 16, 6400, out=100)
    made = plan(work.prompts)
    assert made.saving == pytest.approx(85.23, abs=0.01)
    lengths = [len(prompt) for prompt in work.prompts]
    # 40.1 % measured; the model gives 39.7, and varies by a point with the order of requests
    assert lru_saving(made, lengths, work.outputs, capacity=450_000) == pytest.approx(39.7, abs=1)
    assert lru_saving(made, lengths, work.outputs, capacity=10**9) == pytest.approx(85.23, abs=0.01)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_industrial_batch_saves_as_the_paper_says(seed):
    prompts = industry(2000, seed).prompts
    naive, paper, exact = (plan(prompts, method=method).saving for method in METHODS)
    assert 56.8 < paper <= exact < 60.5  # 58.1 in the paper
    assert naive == pytest.approx(3.7, abs=0.5)  # eight instructions hide all documents
    multi = 100 * bound(prompts) / sum(map(len, prompts))
    assert multi - exact == pytest.approx(0.9, abs=0.1)


@pytest.mark.parametrize(
    "prompts, said",
    [
        ([], "there are no prompts"),
        ([[1], []], r"prompts\[1\] is empty"),
        ([[1], np.zeros(0, np.int32)], r"prompts\[1\] is empty"),
        ([[1], 2], r"prompts\[1\] is no sequence of integers"),
        ([[1], [1.5]], r"prompts\[1\] is no sequence of integers"),
        (["words"], r"prompts\[0\] is no sequence of integers"),
        ([[2**31]], r"prompts\[0\] is no sequence of integers of 32 bits"),
        ([np.array([2**31])], "no token id of 32 bits"),
        ([np.array([-(2**32) + 5])], "no token id of 32 bits"),
        ([np.zeros((2, 2), np.int32)], r"int32\[2, 2\], and must be integers \[T\]"),
        ([np.zeros(2)], r"float64\[2\], and must be integers"),
        ([[1, 2], [3, -1]], r"prompts\[1\] holds -1.* padded"),
    ],
)
def test_wrong_prompts_are_refused(prompts, said):
    for call in (plan, bound):
        with pytest.raises(ValueError, match=said):
            call(prompts)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"method": "best"}, "method='best' is unknown. Take one of naive, paper, exact"),
        ({"page": 0}, "page=0 must be at least 1"),
        ({"page": 1.5}, "page=1.5 must be a whole number"),
    ],
)
def test_wrong_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        plan(V1, **settings)


def test_lengths_that_are_not_those_of_the_plan_are_refused():
    made, lengths = plan(V1), [len(prompt) for prompt in V1]
    with pytest.raises(ValueError, match="5 lengths, and the plan has 6 prompts"):
        ordered(made, lengths[1:], [3] * 6)
    with pytest.raises(ValueError, match="5 outputs for 6 prompts"):
        ordered(made, lengths, [3] * 5)
    with pytest.raises(ValueError, match=r"outputs\[5\]=0 must be at least 1"):
        ordered(made, lengths, [3] * 5 + [0])
    with pytest.raises(ValueError, match=r"lengths\[2\]=9, and its group has a prefix of 9"):
        partition(made, [*lengths[:2], 9, *lengths[3:]], 2)
    with pytest.raises(ValueError, match="parts=0 must be at least 1"):
        partition(made, lengths, 0)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: micro(0, 1, 1, 1, 1), "prefix=0 must be at least 1"),
        (lambda: micro(1, 1, 1, 11, 1, vocab=10), "vocab=10 must be at least 11"),
        (lambda: micro(1, 1, 1, 1, 1, seed=-1), "seed=-1 must be at least 0"),
        (lambda: industry(0), "n=0 must be at least 1"),
        (lambda: industry(1, vocab=7), "vocab=7 must be at least 8"),
    ],
)
def test_wrong_sizes_of_workloads_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()

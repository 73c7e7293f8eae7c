"""Generated facts: wide, answerable from their context, and none of the evaluation's."""

import inspect
import json
import re

import numpy as np
import pytest

from kvjax import tasks
from train import facts
from train.data import read_rows
from train.facts import FORMS, draw_facts, fact_examples

SENTENCES = [f"The clerk wrote page {i} of a long report on nothing in particular." for i in range(50)]


def count_words(text):
    return len(text.split())


def examples(count=40, **settings):
    return list(fact_examples(SENTENCES, count_words, **{"count": count, "tokens": (100, 400), "seed": 5, **settings}))


def test_no_word_of_the_evaluations_lists_is_among_the_trained_ones():
    evaluated = [*tasks.CITIES, *tasks.TOWNS, *tasks.NAMES, *tasks.PORTS, *tasks.WORDS]
    words = re.findall(r"\w+", inspect.getsource(facts).lower())
    assert not set(" ".join(evaluated).lower().split()) & set(words)


def test_no_wording_of_the_evaluation_is_among_the_trained_ones():
    words = re.findall(r"\w+", inspect.getsource(facts).lower())
    for kind in tasks.KINDS:
        for text in (kind.sentence, kind.question):
            frame = text.format(key="{s}", answer="{v}")
            assert not any(frame in (*form.sentences, *form.questions, form.answer) for form in FORMS)
        assert not {"mayor", "secret", "password"} & set(words)  # what those facts are about


def test_there_are_over_forty_forms_with_two_wordings_of_sentence_and_question():
    assert len(FORMS) >= 40
    assert all(len(set(form.sentences)) >= 2 and len(set(form.questions)) >= 2 for form in FORMS)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.questions[0])
def test_subjects_are_many_and_values_are_hard_to_guess(form):
    rng = np.random.default_rng(0)
    assert len({form.subject(rng) for _ in range(200)}) >= 20
    assert len({form.value(rng) for _ in range(200)}) >= 7  # days of the week are the fewest


def test_a_fact_and_its_answer_hold_its_value():
    for fact in draw_facts(np.random.default_rng(0), 1000):
        assert fact.value in fact.sentence and fact.value in fact.answer and fact.value not in fact.question


def test_what_is_asked_in_a_context_is_told_in_it_once():
    for example in examples(200):
        context, answers = example["prompt"], example["answer"][::2]
        assert len(answers) == len(example["values"]) >= 2
        assert all(value in context and value in answer
                   for value, answer in zip(example["values"], answers, strict=True))  # fmt: skip
        questions = [example.get("question", context), *example["answer"][1::2]]
        assert len(set(questions)) == len(questions)


def test_half_of_the_prompts_end_before_any_question():
    without = [example for example in examples() if "question" in example]
    assert len(without) == 20
    assert not any("?" in example["prompt"] for example in without)


def test_contexts_are_as_long_as_asked_and_more_often_short():
    lengths = [count_words(example["prompt"]) for example in examples(200, facts=(2, 4))]
    # beyond the range: the opening, the question, and the end of the last sentence
    assert 100 <= min(lengths) and max(lengths) < 440
    assert np.median(lengths) < 250


def test_an_example_depends_on_its_number_and_the_seed_alone():
    assert examples(12)[:5] == examples(5) != examples(5, seed=6)


def test_ranges_that_are_empty_are_refused():
    with pytest.raises(ValueError, match=r"tokens=\(9, 3\)"):
        examples(tokens=(9, 3))
    with pytest.raises(ValueError, match="sentences is empty"):
        list(fact_examples([], count_words, count=1, tokens=(1, 2), seed=0))


def test_the_trainers_read_every_example(tmp_path):
    from tests.train.test_data import MODEL

    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in examples(20)))
    rows = read_rows(path, MODEL, sequence=8000)
    assert rows.summary.rows == 20 and not rows.summary.left_out

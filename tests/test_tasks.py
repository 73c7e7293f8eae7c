"""Contexts, questions and prose of `kvjax compare`: frozen, repeatable, and scored fairly."""

import functools
import itertools
import re

import numpy as np
import pytest

from kvjax import tasks
from kvjax.tasks import KINDS, Question


def words(text: str) -> list[str]:
    """A tokenizer for tests: words and single marks, so that a text has as many tokens as its pieces together."""
    return re.findall(r"\w+|[^\w\s]", text)


def ids(text: str) -> list[int]:
    return [sum(word.encode()) for word in words(text)]


@functools.cache
def make_contexts(contexts: int = 3, tokens: int = 600, per_kind: int = 2, seed: int = 0) -> tuple[tasks.Context, ...]:
    made = tasks.fact_contexts(
        lambda text: len(words(text)), contexts=contexts, tokens=tokens, per_kind=per_kind, seed=seed
    )
    return tuple(made)


def facts_of(context: tasks.Context) -> list[str]:
    """The sentence that answers each question."""
    found = []
    for question in context.questions:
        kind = next(kind for kind in KINDS if kind.name == question.kind)
        (key,) = (key for key in kind.keys if kind.question.format(key=key) == question.text)
        found.append(kind.sentence.format(key=key, answer=question.answer))
    return found


# ---- prose ----


def test_prose_is_sentences_without_markup():
    sentences = tasks.prose()
    assert len(sentences) > 1000
    odd = [one for one in sentences if not re.fullmatch(r"[^\n*`|_]{39,299}[.]", one)]
    assert odd == []


def test_prose_gives_no_answer_away():
    sentences = " ".join(tasks.prose())
    told = [
        word for kind in KINDS for word in (*kind.keys, *(kind.answers or ())) if re.search(rf"\b{word}\b", sentences)
    ]
    assert told == []
    assert not re.search(r"\b\d{7}\b", sentences)


# ---- contexts ----


def test_contexts_repeat():
    make_contexts.cache_clear()
    first = make_contexts()
    make_contexts.cache_clear()
    assert make_contexts() == first


def test_seeds_and_places_in_the_batch_give_other_contexts():
    texts = [context.text for seed in (0, 1) for context in make_contexts(seed=seed)]
    assert len(set(texts)) == 6


def test_a_context_does_not_depend_on_how_many_there_are():
    assert make_contexts(contexts=3)[:2] == make_contexts(contexts=2)


@pytest.mark.parametrize("tokens", [600, 1000, 2000])
@pytest.mark.parametrize("seed", range(5))
def test_contexts_fill_the_limit_and_do_not_pass_it(tokens, seed):
    counts = [len(words(context.text)) for context in make_contexts(tokens=tokens, seed=seed)]
    longest_sentence = max(len(words(sentence)) for sentence in tasks.prose())
    assert all(tokens - longest_sentence - 6 <= count <= tokens for count in counts)  # 6 facts, each with a space


@pytest.mark.parametrize("seed", range(5))
def test_contexts_hold_every_fact_and_its_answer_once(seed):
    for context in make_contexts(seed=seed):
        facts = facts_of(context)
        assert [context.text.count(fact) for fact in facts] == [1] * 6
        assert [context.text.count(question.answer) for question in context.questions] == [1] * 6


def test_contexts_have_as_many_questions_of_each_kind_as_asked_for():
    (context,) = make_contexts(contexts=1, per_kind=3, tokens=1000)
    assert [question.kind for question in context.questions] == [kind.name for kind in KINDS for _ in range(3)]
    assert len({question.text for question in context.questions}) == 9


def test_facts_do_not_follow_one_another():
    for context in make_contexts():
        places = sorted(context.text.index(fact) for fact in facts_of(context))
        for (a, b), fact in zip(
            itertools.pairwise(places), sorted(facts_of(context), key=context.text.index), strict=False
        ):
            assert b - a > len(fact) + 40  # at least a sentence of prose between them


def test_facts_lie_in_every_part_of_a_context():
    contexts = make_contexts(contexts=20, tokens=1000)
    depth = [context.text.index(fact) / len(context.text) for context in contexts for fact in facts_of(context)]
    share = np.histogram(depth, bins=4, range=(0, 1))[0] / len(depth)
    assert (share > 0.15).all()  # a quarter each, were there no chance in it


def test_contexts_longer_than_the_prose_begin_it_again():
    (context,) = make_contexts(contexts=1, tokens=60_000)
    assert 59_900 < len(words(context.text)) <= 60_000
    assert [context.text.count(fact) for fact in facts_of(context)] == [1] * 6


def test_a_context_too_short_for_its_facts_is_refused():
    with pytest.raises(ValueError, match="150 tokens hold . sentences of prose, too few to hide 6 facts between"):
        make_contexts(tokens=150)


# ---- questions ----


@pytest.mark.parametrize(
    "answer, said",
    [
        ("1234567", "The secret code of Oslo is 1234567."),
        ("1234567", "1,234,567"),
        ("1234567", "It is 1 234 567, I think"),
        ("1234567", "1.234.567."),
        ("1234567", "*1234567*"),
        ("Victor", "the mayor is called VICTOR!"),
        ("silver tiger", "Silver Tiger"),
        ("silver tiger", 'The password is "silver tiger".'),
    ],
)
def test_score_finds_the_answer(answer, said):
    assert Question("any", "?", answer).score(said) == 1.0


@pytest.mark.parametrize(
    "answer, said",
    [
        ("1234567", ""),
        ("1234567", "123456"),
        ("1234567", "12345678"),
        ("1234567", "01234567"),
        ("1234567", "1,234,567,890"),
        ("1234567", "1234-567"),
        ("Victor", "Victoria"),
        ("Nora", "Honora"),
        ("silver tiger", "silver rabbit, purple tiger"),
        ("silver tiger", "silver tigers"),
        ("silver tiger", "silvertiger"),
    ],
)
def test_score_refuses_what_is_not_the_answer(answer, said):
    assert Question("any", "?", answer).score(said) == 0.0


def test_every_fact_answers_its_own_question_and_no_other():
    for context in make_contexts():
        facts = facts_of(context)
        scores = np.array([[question.score(fact) for fact in facts] for question in context.questions])
        np.testing.assert_array_equal(scores, np.eye(6))


def test_no_question_tells_its_answer():
    for context in make_contexts(contexts=10):
        asked = " ".join(question.text for question in context.questions)
        assert [question.score(asked) for question in context.questions] == [0.0] * 6


# ---- rows of prose ----


def test_prose_rows_have_the_shape_that_was_asked_for():
    rows = tasks.prose_rows(ids, rows=4, tokens=300, seed=0)
    assert rows.shape == (4, 300)
    assert rows.dtype == np.int32


def test_prose_rows_are_prose():
    encoded = ids(" ".join(tasks.prose()))
    text = "".join(f"{one:06}" for one in encoded)
    for row in tasks.prose_rows(ids, rows=4, tokens=300, seed=0):
        assert "".join(f"{one:06}" for one in row) in text


def test_prose_rows_can_be_long():
    assert tasks.prose_rows(ids, rows=2, tokens=6000, seed=0).shape == (2, 6000)


def test_prose_rows_repeat_and_differ():
    rows = tasks.prose_rows(ids, rows=4, tokens=300, seed=0)
    np.testing.assert_array_equal(tasks.prose_rows(ids, rows=4, tokens=300, seed=0), rows)
    assert len({row.tobytes() for row in (*rows, *tasks.prose_rows(ids, rows=4, tokens=300, seed=1))}) == 8

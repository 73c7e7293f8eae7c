"""Tasks that need no download: facts hidden in prose, and prose to be predicted.

The prose is that of Python's own documentation (`pydoc_data.topics`), so another version of Python gives other text.
Templates, questions and the rule of scoring are frozen here; the context is always compressed before a question.
"""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

CITIES = "Lisbon Oslo Cairo Lima Quito Hanoi Dublin Athens Nairobi Havana Warsaw Ankara".split()
TOWNS = "Bristol Leeds Toledo Verona Lucerne Bergen Odessa Mobile Tampa Austin Boston Denver".split()
NAMES = "Martha Edgar Sylvia Victor Helena Oscar Irene Walter Clara Hugo Nora Felix".split()
PORTS = "Genoa Hamburg Kobe Perth Durban Malaga Antwerp Bilbao Mumbai Naples Seattle Tangier".split()
WORDS = [
    f"{a} {b}"
    for a, b in zip(
        "silver purple golden yellow orange crimson green white black brown copper pink".split(),
        "tiger rabbit eagle dolphin spider turtle monkey camel beaver lizard falcon otter".split(),
        strict=True,
    )
]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fact: the sentence that hides it and the question that asks for it, with {key} and {answer}."""

    name: str
    sentence: str
    question: str
    keys: tuple[str, ...]
    answers: tuple[str, ...] | None  # None: seven-digit numbers


KINDS = (
    Kind("number", "The secret code of {key} is {answer}.", "What is the secret code of {key}?", tuple(CITIES), None),
    Kind("name", "The mayor of {key} is called {answer}.", "What is the mayor of {key} called?",
         tuple(TOWNS), tuple(NAMES)),
    Kind("words", "The password of {key} is {answer}.", "What is the password of {key}?", tuple(PORTS), tuple(WORDS)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about a context, and what the answer must contain."""

    kind: str
    text: str
    answer: str

    def score(self, said: str) -> float:
        """1.0 if the answer is in what was said, ignoring case and the separators of digits; else 0.0."""
        plain = re.sub(r"(?<=\d)[ ,.](?=\d)", "", said).lower()
        return float(re.search(rf"\b{re.escape(self.answer.lower())}\b", plain) is not None)


@dataclasses.dataclass(frozen=True)
class Context:
    """A text with facts hidden in it, and its questions."""

    text: str
    questions: tuple[Question, ...]


def prose() -> list[str]:
    """Sentences of real English, in order, without code or markup."""
    from pydoc_data.topics import topics  # late: half a megabyte

    found = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            flat = " ".join(paragraph.split())
            if paragraph.startswith((" ", ">>>")) or "::" in flat or not re.match(r"[A-Z].*[.]$", flat):
                continue
            flat = re.sub(r"[*`|_]|\[\d+\]", "", flat)
            found += re.split(r"(?<=[.]) (?=[A-Z])", flat)
    return [sentence for sentence in found if 40 <= len(sentence) <= 300]


def _repeated(sentences: list[str], tokens: int) -> list[str]:
    """The sentences again and again, until there are enough for `tokens` from anywhere in the first half."""
    return sentences * (2 + tokens // (4 * len(sentences)))  # a sentence has 4 tokens at least


def fact_contexts(count_tokens, *, contexts: int, tokens: int, per_kind: int, seed: int) -> Iterator[Context]:
    """Contexts of prose of at most `tokens` tokens, with `per_kind` facts of each kind hidden at random places.

    Args:
      count_tokens: Text to its number of tokens.
      contexts: How many.
      tokens: Longest context.
      per_kind: Facts, and questions, of each kind in a context.
      seed: Of facts, places and prose.
    """
    sentences = _repeated(prose(), tokens)
    for i in range(contexts):
        rng = np.random.default_rng([seed, i])
        facts, questions = [], []
        for kind in KINDS:
            keys = rng.choice(kind.keys, per_kind, replace=False)
            if kind.answers is None:
                answers = rng.integers(1_000_000, 10_000_000, per_kind).astype(str)
            else:
                answers = rng.choice(kind.answers, per_kind, replace=False)
            for key, answer in zip(keys, answers, strict=True):
                facts.append(kind.sentence.format(key=key, answer=answer))
                questions.append(Question(kind.name, kind.question.format(key=key), str(answer)))
        start = int(rng.integers(len(sentences) // 2))
        left = tokens - count_tokens(" ".join(facts)) - len(facts)
        filler = []
        while (left := left - count_tokens(" " + sentences[start + len(filler)])) >= 0:
            filler.append(sentences[start + len(filler)])
        if len(filler) < len(facts):
            raise ValueError(
                f"tasks: {tokens} tokens hold {len(filler)} sentences of prose, too few to hide {len(facts)} facts "
                f"between. Give more tokens or fewer facts."
            )
        places = np.sort(rng.choice(len(filler), len(facts), replace=False))
        shuffled = rng.permutation(len(facts))
        for place, fact in zip(places[::-1], shuffled, strict=True):
            filler.insert(place, facts[fact])
        yield Context(" ".join(filler), tuple(questions))


def prose_rows(encode, *, rows: int, tokens: int, seed: int) -> np.ndarray:
    """Token ids i32[rows, tokens] of real prose, from different places.

    Args:
      encode: Text to a list of token ids.
      rows: How many.
      tokens: Length of each.
      seed: Of the places.
    """
    sentences = _repeated(prose(), tokens)
    places = np.random.default_rng([seed, 10**6]).choice(len(sentences) // 2, rows, replace=False)
    texts = (" ".join(sentences[place : place + tokens // 4]) for place in places)
    return np.array([encode(text)[:tokens] for text in texts], np.int32)

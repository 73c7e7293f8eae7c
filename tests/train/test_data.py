"""Rows and batches: what is left out is named, and batches are the same for any number of processes and workers."""

import itertools
import json

import grain
import numpy as np
import orbax.checkpoint
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvjax.models.weights import Model
from train.data import SYSTEM, batches, held_out_batches, read_rows

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
END = 256
ROWS = 40


def make_model(template=TEMPLATE):
    """No weights; a token for each byte, and special ones."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"])
    return Model(None, tokenizer, template, (END,), None, "<|endoftext|>")


MODEL = make_model()


def encode(text):
    return MODEL.tokenizer.encode(text, add_special_tokens=False).ids


def write(path, lines):
    said = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in said))
    return path


def read(tmp_path, lines, **settings):
    return read_rows(write(tmp_path / "a.jsonl", lines), MODEL, **{"sequence": 64, **settings})


def halves(rows, index):
    """The prompt's and the answer's text of a row, special tokens and all."""
    row = rows.row(index)
    cut, end = row["prompt_lengths"], row["lengths"]
    assert not row["tokens"][end:].any()
    return tuple(
        MODEL.tokenizer.decode(part.tolist(), skip_special_tokens=False)
        for part in (row["tokens"][:cut], row["tokens"][cut:end])
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    lines = [{"prompt": f"Question {i}?", "answer": f"Answer {i}."} for i in range(ROWS)]
    return read(tmp_path_factory.mktemp("rows"), lines, format="raw")


# --- reading


def test_every_line_that_is_left_out_is_counted_by_its_reason_and_named(tmp_path):
    good = [{"prompt": "Why?", "answer": "So."}] * 4
    bad = {
        "not JSON": [b"{broken", b'{"text": "\xff"}', b"[" * 100_000],
        "no known keys": [{"question": "?"}, [1, 2], {"prompt": "without an answer"}],
        "wrong types": [{"prompt": 3, "answer": "a"}, {"text": ["a"]}, {"prompt": "a", "answer": ["a", "b"]},
                        {"text": "\ud800"}],
        "empty": [b"", {"prompt": " ", "answer": "a"}, {"prompt": "a", "answer": ""}, {"text": "\n"}],
        "longer than the sequence": [{"prompt": "a" * 65, "answer": "a"}, {"prompt": "a", "answer": "a" * 64}],
    }  # fmt: skip
    rows = read(tmp_path, [*good, *itertools.chain(*bad.values())], most_broken=0.9)
    assert rows.summary.left_out == {reason: len(lines) for reason, lines in bad.items()}
    number = 5
    for reason, lines in bad.items():
        assert rows.summary.named[reason] == tuple(f"{tmp_path}/a.jsonl:{number + i}" for i in range(len(lines)))
        assert reason in str(rows.summary)
        number += len(lines)
    assert rows.summary.lines == number - 1 and rows.summary.rows == len(good)


def test_a_file_of_mostly_broken_lines_is_refused_and_the_lines_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"2 of 4 lines are broken \(not JSON: .*a.jsonl:2, .*a.jsonl:4\)"):
        read(tmp_path, [{"text": "a" * 100}, b"{", {"text": "b" * 100}, b"}"])


def test_a_prompt_ends_where_the_answer_of_a_chat_begins(tmp_path):
    rows = read(tmp_path, [{"prompt": "Hi?", "answer": ["Ho.", "And?", "No."]}])
    assert halves(rows, 0) == (MODEL.chat("Hi?"), "Ho.<|end|><|user|>And?<|end|><|assistant|>No.<|end|>")


def test_a_prompt_ends_before_the_question_where_the_row_has_one(tmp_path):
    rows = read(tmp_path, [{"prompt": "A text. ", "question": "Hi?", "answer": "Ho."}])
    assert halves(rows, 0) == ("<|user|>A text. ", "Hi?<|end|><|assistant|>Ho.<|end|>")


def test_the_plain_format_is_that_of_the_paper(tmp_path):
    rows = read(tmp_path, [{"prompt": "Hi?", "answer": ["Ho.", "And?", "No."]}], format="plain", sequence=256)
    assert halves(rows, 0) == (
        f"{SYSTEM}\n### Human: Hi?\n### Assistant: ",
        " Ho.\n### Human: And?\n### Assistant:  No.\n### ",
    )


def test_a_row_whose_words_the_chat_template_changes_is_left_out(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": " Hi?", "question": "x", "answer": "Ho."}, {"text": "a" * 64}])
    trimming = make_model(TEMPLATE.replace("['content']", "['content'] | trim"))
    assert read_rows(path, trimming, sequence=64).summary.left_out == {"changed by the chat template": 1}


def test_text_is_packed_into_whole_rows_with_end_of_text_between_documents(tmp_path):
    texts = ["one " * 10, "two " * 25, "three " * 20]
    rows = read(tmp_path, [{"text": text} for text in texts], sequence=32)
    joined = [token for text in texts for token in (*encode(text), END)]
    whole = len(joined) // 32 * 32
    np.testing.assert_array_equal(rows.tokens, joined[:whole])
    np.testing.assert_array_equal(np.diff(rows.ends), 32)
    assert rows.summary.remainder == len(joined) - whole


def test_packed_text_is_split_somewhere_in_its_middle_half_by_the_seed(tmp_path):
    lines = [{"text": "word " * 2000}]
    one, again, other = (read(tmp_path, lines, seed=seed).prompt_lengths for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert one.min() >= 16 and one.max() <= 48 and len(set(one.tolist())) > 16


def test_parquet_gives_the_rows_of_json_lines(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = [{"prompt": f"Q{i}", "answer": [f"A{i}"], "other": i, "text": None} for i in range(700)]
    parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "a.parquet", row_group_size=400)
    rows = read_rows(tmp_path / "a.parquet", MODEL, sequence=64)
    assert rows.summary.digest == read(tmp_path, lines).summary.digest
    assert rows.names[650] == f"{tmp_path}/a.parquet:651"


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2],
                                    lambda content: content[:8] + bytes(200) + content[208:]],
                         ids=["cut short", "overwritten"])  # fmt: skip
def test_a_damaged_parquet_file_is_refused_by_name(tmp_path, damage):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"text": f"words {i}"} for i in range(100)]), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(damage((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(ValueError, match="a.parquet is a damaged Parquet file"):
        read_rows(tmp_path / "a.parquet", MODEL, sequence=64)


def test_workers_give_the_rows_of_one_process(tmp_path):
    lines = [{"prompt": f"Q{i}", "answer": f"A{i}"} if i % 3 else {"text": f"text {i} " * 9} for i in range(600)]
    assert read(tmp_path, lines, workers=2).summary.digest == read(tmp_path, lines).summary.digest


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"sequence": 2}, "sequence=2"),
        ({"format": "html"}, "format='html'; wanted one of"),
        ({"workers": -1}, "workers=-1"),
        ({"most_broken": 2}, "most_broken=2 is outside 0..1"),
        ({"sequence": 4}, "no row is left of 1 lines .longer than the sequence: 1"),
    ],
)
def test_settings_of_reading_that_do_not_fit_are_refused(tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        read(tmp_path, [{"prompt": "a", "answer": "b"}], **settings)


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"here.jsonl, .*there.jsonl is no file"):
        read_rows([tmp_path / "here.jsonl", tmp_path / "there.jsonl"], MODEL, sequence=64)


# --- batches


def ids(iterator, count=None):
    return [batch["ids"].tolist() for batch in itertools.islice(iterator, count)]


def test_a_batch_holds_rows_with_their_lengths(rows):
    batch = next(batches(rows, batch=4, seed=0))
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "tokens": ((4, 64), "int32"),
        "prompt_lengths": ((4,), "int32"),
        "lengths": ((4,), "int32"),
        "ids": ((4,), "int32"),
    }
    np.testing.assert_array_equal(batch["tokens"][1], rows.row(batch["ids"][1])["tokens"])


def test_an_epoch_has_every_row_once_and_the_next_one_another_order(rows):
    order = sum(ids(batches(rows, batch=8, seed=0, epochs=2)), [])
    first, second = order[:ROWS], order[ROWS:]
    assert sorted(first) == sorted(second) == list(range(ROWS)) and first != second


def test_held_out_rows_never_come_and_the_others_do(rows):
    held = sum(ids(held_out_batches(rows, batch=4, seed=3, held_out=8)), [])
    trained = sum(ids(batches(rows, batch=4, seed=3, held_out=8, epochs=3)), [])
    assert len(set(held)) == 8
    assert set(trained) == set(range(ROWS)) - set(held)
    assert held_out_batches(rows, batch=4, seed=3, held_out=0) == []


@pytest.mark.parametrize("count", [2, 4])
def test_a_batch_of_several_processes_together_is_that_of_one(rows, count):
    settings = {"batch": 4, "seed": 1, "held_out": 7, "epochs": 3}  # 99 rows: the last batch is cut everywhere
    alone = ids(batches(rows, **settings))
    parts = [ids(batches(rows, **settings, process=(index, count))) for index in range(count)]
    assert {len(part) for part in parts} == {len(alone)} == {24}
    for number, whole in enumerate(alone):
        assert sorted(sum((part[number] for part in parts), [])) == sorted(whole)


def test_a_restored_iterator_goes_on_with_the_next_batch(rows):
    stopped = batches(rows, batch=8, seed=0)
    ids(stopped, 7)  # in the second epoch
    state = json.loads(json.dumps(stopped.get_state()))
    resumed = batches(rows, batch=8, seed=0)
    resumed.set_state(state)
    assert ids(resumed, 9) == ids(batches(rows, batch=8, seed=0), 16)[7:]


def test_orbax_keeps_the_place_of_an_iterator(rows, tmp_path):
    stopped = batches(rows, batch=8, seed=0)
    ids(stopped, 3)
    with orbax.checkpoint.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=orbax.checkpoint.args.Composite(rows=grain.checkpoint.CheckpointSave(stopped)))
        manager.wait_until_finished()
        resumed = batches(rows, batch=8, seed=0)
        manager.restore(3, args=orbax.checkpoint.args.Composite(rows=grain.checkpoint.CheckpointRestore(resumed)))
    assert ids(resumed, 2) == ids(stopped, 2)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"batch": 3, "process": (0, 2)}, "batch=3 is no positive multiple of 2 processes"),
        ({"batch": 2, "process": (2, 2)}, "wanted an index in 0..1"),
        ({"batch": 2, "held_out": ROWS}, f"held_out={ROWS} of {ROWS} rows"),
        ({"batch": 64, "epochs": 1}, f"epochs=1 of {ROWS} rows fill no batch of 64"),
    ],
)
def test_settings_of_batches_that_do_not_fit_are_refused(rows, settings, said):
    with pytest.raises(ValueError, match=said):
        batches(rows, seed=0, **settings)


def test_held_out_rows_fill_whole_batches(rows):
    with pytest.raises(ValueError, match="Hold out 8 or 12 rows"):
        held_out_batches(rows, batch=4, seed=0, held_out=10)

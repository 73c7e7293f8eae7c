"""Text: the ids, chats and words of a loaded model are those of transformers."""

import dataclasses
import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from kvjax.models.gguf_file import open_gguf
from kvjax.models.gguf_tokenizer import read_text
from kvjax.models.weights import Model, _find_smollm2, load
from tests.gguf_writing import write_gguf

REFERENCES = Path(__file__).parent / "references"
KINDS = ["llama-bpe", "qwen2", "llama"]


@functools.cache
def smollm2() -> Model:
    """The real model without its weights."""
    return Model(None, *open_gguf(_find_smollm2()).text)


@functools.cache
def small() -> Model:
    return load(REFERENCES / "llama3")


def reference(name) -> dict:
    return json.loads((REFERENCES / name).read_text(encoding="utf-8"))


def metadata_of(kind) -> dict:
    return {f"tokenizer.ggml.{key}": value for key, value in reference(f"tokenizer_{kind}.json")["metadata"].items()}


# The real model


@pytest.mark.real_model
@pytest.mark.parametrize("entry", reference("smollm2_text.json")["texts"], ids=lambda entry: ascii(entry["text"][:20]))
def test_awkward_strings_of_the_real_model_get_the_ids_of_transformers(entry):
    tokens, lengths = smollm2().encode([entry["text"]])
    assert tokens.tolist() == [entry["ids"]] and lengths.tolist() == [len(entry["ids"])]


@pytest.mark.real_model
@pytest.mark.parametrize("chat", reference("smollm2_text.json")["chats"])
def test_chats_of_the_real_model_are_those_of_transformers(chat):
    text = smollm2().chat(chat["messages"], add_generation_prompt=chat["add_generation_prompt"])
    assert text == chat["text"]
    assert smollm2().encode([text], add_special_tokens=False)[0].tolist() == [chat["ids"]]


@pytest.mark.real_model
def test_digits_of_the_real_model_stand_apart():
    tokens, _ = smollm2().encode(["1234567"])
    assert [smollm2().decode([token]) for token in tokens[0]] == list("1234567")


@pytest.mark.real_model
def test_decoding_the_real_model_gives_back_the_text():
    for entry in reference("smollm2_text.json")["texts"]:
        if "<" not in entry["text"]:  # special tokens are left out
            assert smollm2().decode(entry["ids"]) == entry["text"]


@pytest.mark.real_model
def test_the_real_model_stops_at_the_end_of_a_turn():
    model = smollm2()
    assert model.stop_tokens == (2,) and model.eos_token == "<|im_end|>" and model.bos_token == "<|im_start|>"


# The other kinds of tokenizer that GGUF files of the family have


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_from_metadata_give_the_ids_of_transformers(kind):
    tokenizer = read_text(metadata_of(kind), "here").tokenizer
    for entry in reference(f"tokenizer_{kind}.json")["texts"]:
        assert tokenizer.encode(entry["text"]).ids == entry["ids"], entry["text"]


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_from_metadata_decode_as_transformers(kind):
    tokenizer = read_text(metadata_of(kind), "here").tokenizer
    for entry in reference(f"tokenizer_{kind}.json")["texts"]:
        assert tokenizer.decode(entry["ids"], skip_special_tokens=True) == entry["decoded"]


def test_llama_3_takes_a_word_of_the_vocabulary_whole():
    metadata = {"model": "gpt2", "tokens": ["a", "b", "c", "ab", "bc", "abc"], "merges": ["a b", "b c", "a bc"]}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    # joining a b first leaves ab c, from which abc is not reached
    for pre, ids in (("llama-bpe", [5]), ("gpt-2", [3, 2])):
        text = read_text(metadata | {"tokenizer.ggml.pre": pre}, "here")
        assert text.tokenizer.encode("abc", add_special_tokens=False).ids == ids


def test_metadata_says_whether_first_and_last_tokens_are_added():
    def ids(**flags):
        flags = {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
        return read_text(metadata_of("llama-bpe") | flags, "here").tokenizer.encode("a").ids

    (a,) = ids(add_bos_token=False)
    assert ids() == [0, a]
    assert ids(add_eos_token=True) == [0, a, 1]
    assert ids(add_bos_token=False, add_eos_token=True) == [a, 1]


def test_stop_tokens_of_metadata_are_the_ends_of_text_and_turn():
    assert read_text(metadata_of("llama-bpe"), "here").stop_tokens == (1, 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eos_token_id": 400}, "here: the eos token has id 400, and the vocabulary 400 entries"),
        ({"merges": ["a"]}, "here: no tokenizer can be made.*merges do not fit"),
        ({"token_type": [1]}, "here: no tokenizer can be made"),
        ({"pre": "falcon"}, "here: no tokenizer can be made.*pre='falcon'.*Hugging Face directory"),
        ({"model": "t5"}, "here: no tokenizer can be made.*model='t5'"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(changes, message):
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        read_text(metadata_of("llama-bpe") | changes, "here")


def test_a_gguf_file_brings_its_tokenizer_and_template(tmp_path):
    metadata = metadata_of("qwen2") | {"tokenizer.chat_template": "{{ messages[0].content }}"}
    model = load(write_gguf(tmp_path / "model.gguf", small().params, metadata=metadata))
    entry = reference("tokenizer_qwen2.json")["texts"][2]
    assert model.encode([entry["text"]])[0].tolist() == [entry["ids"]]
    assert model.chat("Hi") == "Hi"


# A Hugging Face directory


def test_a_directory_gives_the_ids_of_its_tokenizer_json():
    for entry in reference("tokenizer_llama-bpe.json")["texts"]:
        assert small().encode([entry["text"]])[0].tolist() == [entry["ids"]]


def test_stop_tokens_of_a_directory_are_those_of_its_configs_and_its_tokenizer():
    assert small().stop_tokens == (2, 3)


def test_a_directory_gives_its_chat_template():
    messages = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi <b>"}]
    assert small().chat(messages) == "<|bos|>[system]Be brief.<|eot|>[user]Hi <b><|eot|>[assistant]"
    assert small().chat("Hi", add_generation_prompt=False) == "<|bos|>[user]Hi<|eot|>"


def test_a_template_in_tokenizer_config_is_found(tmp_path):
    text = {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]}
    for said, wanted in ((text, "yes"), ({"chat_template": "plain"}, "plain"), ({}, None)):
        folder = tmp_path / str(wanted)
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).symlink_to(REFERENCES / "qwen2" / name)
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        assert load(folder).chat_template == wanted


# encode and decode


def test_rows_are_padded_on_the_right():
    texts = ["a longer text", "b", "some words"]
    tokens, lengths = small().encode(texts)
    assert tokens.dtype == lengths.dtype == np.int32 and tokens.shape == (3, lengths.max())
    for row, length, text in zip(tokens, lengths, texts, strict=True):
        assert_array_equal(row[:length], small().tokenizer.encode(text).ids)
        assert not row[length:].any()


def test_special_tokens_are_added_unless_refused():
    with_them, without = (small().encode(["a"], add_special_tokens=add)[0].tolist() for add in (True, False))
    assert with_them == [[0, *without[0]]]


@pytest.mark.parametrize("texts, message", [("a", "wanted a list"), ([], "wanted a list"), (["a", ""], "text 1 gives")])
def test_texts_without_tokens_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        small().encode(texts, add_special_tokens=False)


@pytest.mark.parametrize("form", [list, tuple, np.array, jnp.array])
def test_decode_takes_any_row_of_ids_and_leaves_special_tokens_out(form):
    ids = small().encode(["a few words"])[0][0].tolist()
    assert small().decode(form([*ids, 1])) == "a few words"


def test_a_checkpoint_without_a_tokenizer_says_so(tmp_path):
    model = load(write_gguf(tmp_path / "model.gguf", small().params))
    for use in (lambda: model.encode(["a"]), lambda: model.decode([1])):
        with pytest.raises(ValueError, match="came without a tokenizer. Put its tokenizer.json"):
            use()


# Chat templates


def chat(template, messages="Hi", **keywords):
    return dataclasses.replace(small(), chat_template=template).chat(messages, **keywords)


def test_templates_are_rendered_as_transformers_does():
    assert chat("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"  # blocks are trimmed
    assert chat("{{ messages | tojson }}", [{"role": "é", "content": "<"}]) == '[{"role": "é", "content": "<"}]'
    assert chat("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert chat("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "Hi"
    assert len(chat("{{ strftime_now('%Y') }}")) == 4
    assert chat("{% if tools is none and documents is none %}none{% endif %}") == "none"


def test_a_special_token_that_the_model_lacks_is_undefined():
    model = dataclasses.replace(small(), chat_template="{{ bos_token }}|{{ eos_token }}", bos_token=None)
    assert model.chat("Hi") == "|<|eot|>"


@pytest.mark.parametrize(
    "template, messages, message",
    [
        (None, "Hi", "no chat template"),
        ("{{ raise_exception('alternate, please') }}", "Hi", r"the roles \['user'\]: alternate, please"),
        ("{% if %}", "Hi", "does not take"),
        ("{{ messages[0].content + 'a' }}", [{"role": "user"}], "does not take"),
        ("{{ messages[0].content + 'a' }}", [{"role": "user", "content": []}], "does not take"),
        ("{{ ''.__class__.__mro__ }}", "Hi", "unsafe"),
        ("{{ messages }}", [], "wanted at least one"),
        ("{{ messages }}", ["Hi"], "wanted at least one"),
    ],
)
def test_what_a_template_does_not_take_is_a_value_error(template, messages, message):
    with pytest.raises(ValueError, match=message):
        chat(template, messages)
